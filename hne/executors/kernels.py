"""Computes layers by the differentiable kernels, for training and wherever gradients are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hne_kernels as K

from ..layers import (
    ACTIVATIONS,
    BranchConv,
    BranchLinear,
    BranchNorm,
    ConvNorm,
    Features,
    batch_normalization,
    check_kind,
    running_normalization,
    uses_batch_statistics,
    warn_of_global_hooks,
)
from .base import SubtreeExecutor


class KernelExecutor(SubtreeExecutor):
    """Features are ``[branches, batch, height, width, channels]``.

    Features may not be normalised yet: the next kernel does so while reading them
    (:mod:`hne_kernels.lazy`). Convolutions read a parent's features for all its children, without copies.
    """

    def of_tensors(self) -> KernelExecutor:
        warn_of_global_hooks()
        return _TENSORS

    def from_images(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1).unsqueeze(0)

    def select_samples(self, x: Tensor, samples: Tensor) -> Tensor:
        return x.index_select(1, samples)

    def conv_norm(
        self,
        module: ConvNorm,
        x: Features,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Features | None = None,
    ) -> Features:
        check_kind(module, ConvNorm)
        if activation not in K.ACTIVATIONS:
            y = self.conv_norm(module, x, branches, replicate, "none", residual)
            return ACTIVATIONS[activation](K.materialize(y))
        if module.groups > 1:
            return self._grouped_conv_norm(module, x, branches, replicate, activation, residual)
        weight = module.weight(branches)
        if uses_batch_statistics(module):
            conv = K.conv_stats(x, weight, stride=module.stride, padding=module.padding, replicate=replicate)
            norm = batch_normalization(module, branches, conv.mean, conv.var, conv.count)
            return conv.normalize(norm, activation, residual)
        convolve = K.branch_depthwise_conv2d if module.depthwise else K.branch_conv2d
        y = convolve(K.materialize(x), weight, stride=module.stride, padding=module.padding, replicate=replicate)
        residual = None if residual is None else K.materialize(residual)
        return K.LazyNorm(y, running_normalization(module, branches), activation, residual)

    def entry_conv(
        self, module: ConvNorm, x: Features, branches: slice, replicate: int, activation: str
    ) -> tuple[Tensor, Features]:
        check_kind(module, ConvNorm)
        if not uses_batch_statistics(module) or module.groups > 1 or activation not in K.ACTIVATIONS:
            x = K.materialize(x)
            return x, self.conv_norm(module, x, branches, replicate, activation)
        weight = module.weight(branches)
        x, conv = K.entry_conv_stats(x, weight, stride=module.stride, padding=module.padding, replicate=replicate)
        norm = batch_normalization(module, branches, conv.mean, conv.var, conv.count)
        return x, conv.normalize(norm, activation)

    def _grouped_conv_norm(
        self, module: ConvNorm, x: Features, branches: slice, replicate: int, activation: str, residual: Features | None
    ) -> Features:
        """The kernels know the groups of a branch as branches of their own, so that the channels are rearranged."""
        groups = split_groups(self.replicate(x, branches, replicate, module.in_channels), module.groups)
        weight = group_weight(module.weight(branches), module.groups)
        residual = None if residual is None else K.materialize(residual)
        if uses_batch_statistics(module):
            conv = K.conv_stats(groups, weight, stride=module.stride, padding=module.padding)
            assert isinstance(conv.x, Tensor)  # only a convolution of features that are not computed yet is deferred
            mean, var = (statistic.view(-1, module.channels) for statistic in (conv.mean, conv.var))
            norm = batch_normalization(module, branches, mean, var, conv.count)
            return K.LazyNorm(join_groups(conv.x, module.groups), norm, activation, residual)
        y = K.branch_conv2d(groups, weight, stride=module.stride, padding=module.padding)
        return K.LazyNorm(join_groups(y, module.groups), running_normalization(module, branches), activation, residual)

    def norm(self, module: BranchNorm, x: Features, branches: slice, activation: str = "none") -> Features:
        """No kernel takes the statistics of features that it only reads, so they are sums of PyTorch's. The next
        convolution normalises while reading, as after a :meth:`conv_norm`."""
        check_kind(module, BranchNorm)
        module.check_hooks()
        x = K.materialize(x)
        if uses_batch_statistics(module):
            norm = batch_normalization(module, branches, *_batch_statistics(x))
        else:
            norm = running_normalization(module, branches)
        if activation in K.ACTIVATIONS:
            return K.LazyNorm(x, norm, activation)
        return ACTIVATIONS[activation](K.branch_normalize(x, norm))

    def materialize(self, x: Features) -> Tensor:
        return K.materialize(x)

    def conv(
        self,
        module: BranchConv,
        x: Features,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Features | None = None,
    ) -> Tensor:
        check_kind(module, BranchConv)
        weight, bias = module.weight_and_bias(branches)
        x = K.materialize(x)
        y = K.branch_conv2d(x, weight, bias, stride=module.stride, padding=module.padding, replicate=replicate)
        return ACTIVATIONS[activation](y if residual is None else y + K.materialize(residual))

    def pool(self, x: Features) -> Tensor:
        x = K.materialize(x)
        # The gradient of a sum is expanded from one pixel and not stored; the gradient of a mean would be stored.
        return x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])  # numel() would be a constant when traced

    def replicate(self, x: Features, branches: slice, replicate: int, channels: int) -> Tensor:
        x = K.materialize(x)
        if replicate == 1:
            return x
        return x.repeat_interleave(replicate, 0)[: branches.stop - branches.start]

    def to_maps(self, x: Features, channels: int) -> Tensor:
        return K.materialize(x).permute(0, 1, 4, 2, 3)

    def from_maps(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 1, 3, 4, 2)

    def logits(self, head: BranchLinear, x: Tensor, leaves: slice, replicate: int) -> Tensor:
        return self.conv(head, x, leaves, replicate).flatten(2)

    def prefix_logits(
        self, head: BranchLinear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]
    ) -> Tensor:
        check_kind(head, BranchLinear)
        features = self.replicate(x.flatten(2), leaves, replicate, head.in_channels)
        weight, bias = head.weight_and_bias(leaves)
        return K.prefix_logits(features, weight[..., 0, 0], bias, sizes)[1]


def split_groups(x: Tensor, groups: int) -> Tensor:
    """Features ``[G, B, H, W, groups * C]`` with each group of channels as a branch, ``[G * groups, B, H, W, C]``."""
    return x.unflatten(4, (groups, -1)).permute(0, 4, 1, 2, 3, 5).flatten(0, 1)


def join_groups(x: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`split_groups`."""
    return x.unflatten(0, (-1, groups)).permute(0, 2, 3, 4, 1, 5).flatten(4)


def group_weight(weight: Tensor, groups: int) -> Tensor:
    """Filters ``[G, groups * C_out, C_in, k, k]`` with each group as a branch, ``[G * groups, C_out, C_in, k, k]``."""
    return weight.unflatten(1, (groups, -1)).flatten(0, 1)


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of features over batch, height and width, ``[G, C]`` in float32 at least; and the number
    of values of each. Both are sums over leading dimensions, which PyTorch vectorises; it does not in ``var_mean``."""
    count = x.shape[1] * x.shape[2] * x.shape[3]  # numel() would be a constant when traced
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    values = count if isinstance(count, Tensor) else max(count, 1)  # without values, both are 0
    mean = wide.sum((1, 2, 3)) / values
    return mean, (wide - mean[:, None, None, None]).square().sum((1, 2, 3)) / values, count


class _TensorExecutor(KernelExecutor):
    """Computes every operation at once, so that features are always tensors."""

    def conv_norm(self, *arguments: Any, **options: Any) -> Tensor:
        return K.materialize(super().conv_norm(*arguments, **options))

    def entry_conv(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, y = super().entry_conv(*arguments)
        return x, K.materialize(y)

    def norm(self, *arguments: Any) -> Tensor:
        return K.materialize(super().norm(*arguments))


_TENSORS = _TensorExecutor()
