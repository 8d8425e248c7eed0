"""Layers that take several kernels in inference: their forward, with weights that were folded before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

import hne_kernels as K

from ..layers import ACTIVATIONS, BranchConv, BranchModule, BranchNorm, BranchParameters, ConvNorm, Layer, check_kind
from .kernels import KernelExecutor, join_groups, split_groups


class FoldedConv(NamedTuple):
    """A convolution whose weight and bias contain the batch norm.

    Args:
        weight: Packed filters ``[G * groups, panels, k, k, C_in, 16]``; ``[G, C, k, k]`` if depthwise.
        bias: ``[G * groups, C_out]``.
        stride, padding: As in ``nn.Conv2d``.
        groups: Groups of a branch, each of which has weights of its own.
        depthwise: Each channel has a filter of its own.
    """

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int
    groups: int = 1
    depthwise: bool = False

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    def map_weights(self, function: Callable[[Tensor], Tensor]) -> FoldedConv:
        return self._replace(weight=function(self.weight), bias=function(self.bias))

    def select_branches(self, branches: slice) -> FoldedConv:
        rows = slice(branches.start * self.groups, branches.stop * self.groups)
        return self.map_weights(lambda weight: weight[rows])

    def __call__(self, x: Tensor, replicate: int, activation: str, residual: Tensor | None = None) -> Tensor:
        """``activation(conv(x) + bias + residual)``; grouped convolutions take no ``replicate``."""
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "replicate": replicate}
        if self.depthwise:
            y = K.branch_depthwise_conv2d(x, *self.weights, **options)
        elif self.groups > 1:
            groups = split_groups(x, self.groups)
            y = join_groups(K.fused_conv2d(groups, *self.weights, **options), self.groups)
        else:
            known = activation in K.ACTIVATIONS
            fused = activation if known else "none"
            y = K.fused_conv2d(x, *self.weights, residual, activation=fused, **options)
            return y if known else ACTIVATIONS[activation](y)
        return ACTIVATIONS[activation](y if residual is None else y + residual)


class FoldedNorm(NamedTuple):
    """A batch norm by running statistics: rows mean, scale and shift, ``[G, 3, C]``."""

    rows: Tensor

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return (self.rows,)

    def map_weights(self, function: Callable[[Tensor], Tensor]) -> FoldedNorm:
        return FoldedNorm(function(self.rows))

    def select_branches(self, branches: slice) -> FoldedNorm:
        return FoldedNorm(self.rows[branches])

    def __call__(self, x: Tensor, activation: str) -> Tensor:
        norm = self.rows.transpose(0, 1)
        if activation in K.ACTIVATIONS:
            return K.branch_normalize(x, norm, activation=activation)
        return ACTIVATIONS[activation](K.branch_normalize(x, norm))


class FoldedParameters(NamedTuple):
    """Parameters ``[G, ...]`` that the layer reads; none if a convolution beside them contains them."""

    weights: tuple[Tensor, ...] = ()

    def map_weights(self, function: Callable[[Tensor], Tensor]) -> FoldedParameters:
        return FoldedParameters(tuple(map(function, self.weights)))

    def select_branches(self, branches: slice) -> FoldedParameters:
        return self.map_weights(lambda weight: weight[branches])


Folded = FoldedConv | FoldedNorm | FoldedParameters


class FoldedStep(KernelExecutor):
    """Computes the forward of one layer in inference, with folded weights.

    It serves layers that are no sequence of :class:`hne_kernels.FusedLayer`. The layer may read parameters through the
    executor only: in :meth:`conv_norm`, :meth:`conv`, :meth:`norm` and :meth:`read`.

    Args:
        layer: The layer.
        folded: What replaces each of its modules, with the branches of the step.
        branches: The branches of the output that the step computes, set by :meth:`select_branches`.
        replicate: Number of output branches per input branch.
    """

    def __init__(
        self,
        layer: Layer,
        folded: Mapping[BranchModule, Folded],
        branches: slice = slice(None),
        replicate: int = 1,
    ) -> None:
        self.layer = layer
        self._folded: Mapping[BranchModule, Any] = folded
        self._branches, self._replicate = branches, replicate

    @property
    def weights(self) -> Iterator[Tensor]:
        """The folded weights."""
        return (weight for folded in self._folded.values() for weight in folded.weights)

    def independent(self, function: Callable[[Tensor], Tensor]) -> FoldedStep:
        """The same step with ``function`` of each weight, and with the layer as it is now: later changes of its
        attributes have no effect."""
        folded = {module: value.map_weights(function) for module, value in self._folded.items()}
        return FoldedStep(_snapshot(self.layer), folded, self._branches, self._replicate)

    def select_branches(self, branches: slice, replicate: int) -> FoldedStep:
        """Some branches of a step with all branches; views of its weights."""
        folded = {module: value.select_branches(branches) for module, value in self._folded.items()}
        return FoldedStep(self.layer, folded, branches, replicate)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute the layer for features ``[G, B, H, W, C]``."""
        return self.materialize(self.layer(self, x, self._branches, self._replicate))

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
        return self._convolve(module, x, branches, replicate, activation, residual)

    def entry_conv(
        self, module: ConvNorm, x: Tensor, branches: slice, replicate: int, activation: str
    ) -> tuple[Tensor, Tensor]:
        return x, self.conv_norm(module, x, branches, replicate, activation)

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
        return self._convolve(module, x, branches, replicate, activation, residual)

    def norm(self, module: BranchNorm, x: Tensor, branches: slice, activation: str = "none") -> Tensor:
        check_kind(module, BranchNorm)
        y: Tensor = self._folded[module](x, activation)
        return y

    def read(self, module: BranchParameters, branches: slice) -> tuple[Tensor, ...]:
        parameters: tuple[Tensor, ...] = self._folded[module].weights
        return parameters

    def _convolve(
        self,
        module: ConvNorm | BranchConv,
        x: Tensor,
        branches: slice,
        replicate: int,
        activation: str,
        residual: Tensor | None = None,
    ) -> Tensor:
        folded = self._folded[module]
        if folded.groups > 1 and replicate > 1:
            x, replicate = self.replicate(x, branches, replicate, module.in_channels), 1
        y: Tensor = folded(x, replicate, activation, residual)
        return y


def _snapshot(module: nn.Module) -> Any:
    """A copy of a layer whose attributes and submodules do not change with the original's; it shares the modules whose
    parameters are read."""
    if isinstance(module, BranchModule):
        return module
    twin = copy.copy(module)
    twin._modules = {name: None if child is None else _snapshot(child) for name, child in module._modules.items()}
    return twin
