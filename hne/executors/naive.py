"""Computes layers in plain PyTorch, as in the paper's Figure 2: the channels of all branches side by side, grouped
convolutions, and features copied where the tree branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import (
    ACTIVATIONS,
    BatchNormModule,
    BranchConv,
    BranchLinear,
    BranchModule,
    BranchNorm,
    ConvNorm,
    batch_normalization,
    check_kind,
    count_batch,
    is_synchronised,
    uses_batch_statistics,
)
from .base import SubtreeExecutor


class NaiveExecutor(SubtreeExecutor):
    """Features are ``[batch, branches * channels, height, width]``.

    Convolutions and batch norms are called if all their branches are computed, so their hooks run and they may be
    replaced. Otherwise the parameters of the computed branches are read.
    """

    def from_images(self, images: Tensor) -> Tensor:
        return images

    def select_samples(self, x: Tensor, samples: Tensor) -> Tensor:
        return x.index_select(0, samples)

    def conv_norm(
        self,
        module: ConvNorm,
        x: Tensor,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        check_kind(module, ConvNorm)
        x = self.replicate(x, branches, replicate, module.in_channels)
        if _is_whole(module, branches):
            module.check_hooks()
            x = module.conv(x)
        else:
            weight = module.weight(branches).flatten(0, 1)
            groups = (branches.stop - branches.start) * module.groups
            if module.depthwise:
                weight, groups = weight[:, None], len(weight)
            x = F.conv2d(x, weight, None, module.stride, module.padding, groups=groups)
        x = _batch_norm(module, x, branches)
        return ACTIVATIONS[activation](x if residual is None else x + residual)

    def norm(self, module: BranchNorm, x: Tensor, branches: slice, activation: str = "none") -> Tensor:
        check_kind(module, BranchNorm)
        module.check_hooks()
        return ACTIVATIONS[activation](_batch_norm(module, x, branches))

    def conv(
        self,
        module: BranchConv,
        x: Tensor,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        check_kind(module, BranchConv)
        x = self.replicate(x, branches, replicate, module.in_channels)
        if _is_whole(module, branches):
            module.check_hooks()
            x = module.conv(x)
        else:
            weight, bias = module.weight_and_bias(branches)
            groups = branches.stop - branches.start
            bias = None if bias is None else bias.flatten()
            x = F.conv2d(x, weight.flatten(0, 1), bias, module.stride, module.padding, groups=groups)
        return ACTIVATIONS[activation](x if residual is None else x + residual)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def replicate(self, x: Tensor, branches: slice, replicate: int, channels: int) -> Tensor:
        if replicate == 1:
            return x
        children = x.unflatten(1, (-1, channels)).repeat_interleave(replicate, 1)
        return children[:, : branches.stop - branches.start].flatten(1, 2)

    def to_maps(self, x: Tensor, channels: int) -> Tensor:
        return x.unflatten(1, (-1, channels)).transpose(0, 1)

    def from_maps(self, maps: Tensor) -> Tensor:
        return maps.transpose(0, 1).flatten(1, 2)

    def channelwise(self, function: Callable[..., Tensor], channels: int, *features: Tensor) -> Tensor:
        return function(*features)

    def to_branches(self, x: Tensor, channels: int) -> Sequence[Tensor]:
        return x.split(channels, 1)

    def from_branches(self, maps: Sequence[Tensor]) -> Tensor:
        return maps[0] if len(maps) == 1 else torch.cat(list(maps), 1)

    def logits(self, head: BranchLinear, x: Tensor, leaves: slice, replicate: int) -> Tensor:
        y = self.conv(head, x, leaves, replicate)
        return y.flatten(1).unflatten(1, (-1, head.channels)).transpose(0, 1)

    def prefix_logits(
        self, head: BranchLinear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]
    ) -> Tensor:
        logits = self.logits(head, x, leaves, replicate)
        return torch.stack([logits[:size].mean(0) for size in sizes])


def _is_whole(module: BranchModule, branches: slice) -> bool:
    """Whether these are all parameters of a module, so that its submodules can be called."""
    return branches == slice(0, module.branches) and not module.is_slice


def _batch_norm(module: BatchNormModule, x: Tensor, branches: slice) -> Tensor:
    bn = module.bn
    if is_synchronised(module):
        uses_batch_statistics(module)  # checks that the parameters may be read
        y = x.unflatten(1, (-1, module.channels)).transpose(0, 1)  # [branches, batch, channels, height, width]
        rows = y.transpose(2, 1).flatten(2)
        if rows.shape[2] == 0:  # this process has no samples
            mean = var = rows.sum(2)
        else:
            mean, var = rows.mean(2), rows.var(2, correction=0)
        norm = batch_normalization(module, branches, mean, var, rows.shape[2])
        mean, scale, shift = norm[:, :, None, :, None, None]
        return ((y - mean) * scale + shift).to(y.dtype).transpose(0, 1).flatten(1, 2)
    if _is_whole(module, branches) and not isinstance(bn, nn.SyncBatchNorm):
        return bn(x)
    by_batch = uses_batch_statistics(module)
    momentum = count_batch(module) if bn.training else 0.0
    statistics = (bn.running_mean, bn.running_var) if bn.track_running_stats or not bn.training else (None, None)
    mean, var, weight, bias = (
        None if t is None else module.select_branches(t, branches).flatten() for t in (*statistics, bn.weight, bn.bias)
    )
    return F.batch_norm(x, mean, var, weight, bias, by_batch, momentum, bn.eps)
