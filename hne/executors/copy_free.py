"""Inference in plain PyTorch as one would write it by hand, for export: batch norms are folded into weights, constants
are prepared, and features are not copied where the tree branches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import (
    ACTIVATIONS,
    AveragePoolLayer,
    BasicBlockLayer,
    BatchNormModule,
    BottleneckLayer,
    BranchConv,
    BranchLinear,
    BranchModule,
    BranchNorm,
    BranchParameters,
    ConvLayer,
    ConvNorm,
    DenseBottleneckLayer,
    Executor,
    Layer,
    LayerNormLayer,
    MaxPoolLayer,
    ModuleLayer,
    NormLayer,
    PatchEmbeddingLayer,
    PoolLinearLayer,
    PreActivationLayer,
    SelectTokenLayer,
    SkippedModuleError,
    TransformerBlockLayer,
    called_modules,
    running_normalization,
    uses_batch_statistics,
)
from .base import Network, check_containers
from .folded_transformer import fold_transformer_block
from .folding import fold_conv
from .naive import NaiveExecutor

FoldedWeights = Mapping[BranchModule, tuple[Tensor, ...]]


class Part(NamedTuple):
    """Neighbouring branches, side by side in one tensor; those with the same parent share its features.

    Args:
        x: Features of the parents, ``[batch, parents * channels, height, width]``.
        parents: Number of parents.
        replicate: Number of branches per parent; 1 if the branches have features of their own.
    """

    x: Tensor
    parents: int = 1
    replicate: int = 1

    @property
    def branches(self) -> int:
        return self.parents * self.replicate

    def combined(self, function: Callable[..., Tensor], *others: Tensor) -> Tensor:
        """An elementwise function of these features and of ``others``, ``[..., branches * channels, ...]``, which each
        branch has of its own. The features are not copied for it."""
        if self.replicate == 1:
            return function(self.x, *others)
        shape = self.parents, self.replicate, -1
        y = function(self.x.unflatten(1, (self.parents, 1, -1)), *(other.unflatten(1, shape) for other in others))
        return y.expand(-1, -1, self.replicate, -1, -1, -1).flatten(1, 3)

    def copied(self) -> Tensor:
        """The features of each branch, ``[batch, branches * channels, height, width]``."""
        return self.combined(lambda x: x)


class CopyFreeExecutor(Executor):
    """Features are a list of :class:`Part`.

    The branches of a layer are one part: the children of a parent are one convolution with more outputs, and those of
    all parents a grouped convolution. If the last parent has fewer children, they are a part of their own. With
    ``separate`` each branch is a part, and so a convolution of its own.

    The first call of an operation makes its constants; the later ones have the same arguments.

    Args:
        folded: What replaces the parameters of each module, with all branches.
        dtype: The dtype to compute in.
        separate: Whether each branch is a part.

    Attributes:
        constants: The constants of each module, as modules of ``torch.nn``.
    """

    def __init__(self, folded: FoldedWeights, dtype: torch.dtype, separate: bool) -> None:
        self._folded, self._dtype, self._separate = folded, dtype, separate
        self.constants: dict[BranchModule, Any] = {}

    def replicate(self, x: list[Part], branches: slice, replicate: int, channels: int) -> list[Part]:
        if replicate == 1:
            return x
        count = branches.stop - branches.start
        if self._separate:
            return [part for part in x for _ in range(replicate)][:count]
        *parts, last = x
        missing = replicate * sum(part.branches for part in x) - count  # children of the last branch
        if missing:
            *whole, least = last.copied().split(channels, 1)
            last = Part(least, 1, replicate - missing)
            if whole:
                parts.append(Part(_join(whole), len(whole)))
        parts = [part._replace(replicate=part.replicate * replicate) for part in parts]
        return [*parts, last if missing else last._replace(replicate=last.replicate * replicate)]

    def to_branches(self, x: list[Part], channels: int) -> list[Tensor]:
        parents = ((part, features) for part in x for features in part.x.split(channels, 1))
        return [features for part, features in parents for _ in range(part.replicate)]

    def from_branches(self, maps: Sequence[Tensor]) -> list[Part]:
        return [Part(x) for x in maps] if self._separate else [Part(_join(list(maps)), len(maps))]

    def to_tensor(self, x: list[Part]) -> Tensor:
        """The features as those of :class:`NaiveExecutor`."""
        return _join([part.copied() for part in x])

    def to_maps(self, x: list[Part], channels: int) -> Tensor:
        return self.to_tensor(x).unflatten(1, (-1, channels)).transpose(0, 1)

    def from_maps(self, maps: Tensor) -> list[Part]:
        return self.from_branches(maps.unbind()) if self._separate else [Part(_side_by_side(maps), len(maps))]

    def channelwise(self, function: Callable[..., Tensor], channels: int, *features: list[Part]) -> list[Part]:
        if len(features) == 1:
            return [part._replace(x=function(part.x)) for part in features[0]]
        parts = zip(*features, strict=True)
        return [Part(function(*(part.copied() for part in same)), same[0].branches) for same in parts]

    def conv_norm(
        self,
        module: ConvNorm,
        x: list[Part],
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: list[Part] | None = None,
    ) -> list[Part]:
        x = self.replicate(x, branches, replicate, module.in_channels)
        groups = module.channels if module.depthwise else module.groups
        if groups > 1:  # the outputs of a group would be side by side, those of all children
            x = [Part(part.copied(), part.branches) for part in x]
        return self._conv(module, x, branches, groups, activation, residual)

    def conv(  # type: ignore[override]
        self,
        module: BranchConv,
        x: list[Part],
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: list[Part] | None = None,
    ) -> list[Part]:
        x = self.replicate(x, branches, replicate, module.in_channels)
        return self._conv(module, x, branches, 1, activation, residual)

    def _conv(
        self,
        module: ConvNorm | BranchConv,
        x: list[Part],
        branches: slice,
        groups: int,
        activation: str,
        residual: list[Part] | None,
    ) -> list[Part]:
        if module not in self.constants:
            weights = self._of_parts(module, x, branches)
            convs = (self._make_conv(module, part, groups, *some) for part, some in zip(x, weights, strict=True))
            self.constants[module] = nn.ModuleList(convs)
        outputs = []
        for index, (part, conv) in enumerate(zip(x, self.constants[module], strict=True)):
            y = conv(part.x)
            if residual is not None:
                y = residual[index].combined(torch.add, y)
            outputs.append(Part(ACTIVATIONS[activation](y), part.branches))
        return outputs

    def _of_parts(self, module: BranchModule, x: list[Part], branches: slice) -> list[tuple[Tensor, ...]]:
        """The folded weights of a module for the branches of each part."""
        sizes = [part.branches for part in x]
        return list(zip(*(weight[branches].split(sizes) for weight in self._folded[module]), strict=True))

    def _make_conv(
        self, module: ConvNorm | BranchConv, part: Part, groups: int, weight: Tensor, bias: Tensor
    ) -> nn.Conv2d:
        settings = module.kernel_size, module.stride, module.padding
        inputs, outputs = part.parents * module.in_channels, part.branches * module.channels
        conv = nn.Conv2d(inputs, outputs, *settings, groups=part.parents * groups, device="meta")
        conv.weight, conv.bias = self._constant(weight.flatten(0, 1)), self._constant(bias.flatten())
        return conv

    def _constant(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(self._dtype, copy=True).contiguous(), requires_grad=False)

    def norm(self, module: BranchNorm, x: list[Part], branches: slice, activation: str = "none") -> list[Part]:
        if module not in self.constants:
            self.constants[module] = nn.ModuleList(
                nn.ParameterList(self._constant(t.reshape(shape)) for t in (scale, shift - mean * scale))
                for part, (mean, scale, shift) in zip(x, self._of_parts(module, x, branches), strict=True)
                for shape in [(1, -1, 1, 1) if part.replicate == 1 else (1, part.parents, part.replicate, -1, 1, 1)]
            )
        parts = zip(x, self.constants[module], strict=True)
        return [
            Part(ACTIVATIONS[activation](part.combined(_normalize(*constants))), part.branches)
            for part, constants in parts
        ]

    def pool(self, x: list[Part]) -> list[Part]:  # type: ignore[override]
        return [part if part.x.shape[2:] == (1, 1) else part._replace(x=F.adaptive_avg_pool2d(part.x, 1)) for part in x]

    def read(self, module: BranchParameters, branches: slice) -> tuple[Tensor, ...]:
        if module not in self.constants:
            self.constants[module] = nn.ParameterList(self._constant(t[branches]) for t in self._folded[module])
        return tuple(self.constants[module])

    def logits(self, head: BranchLinear, x: list[Part], leaves: slice, replicate: int) -> Tensor:
        """Logits of each leaf, ``[leaves, batch, classes]``, from pooled features."""
        return self.to_maps(self.conv(head, x, leaves, replicate), head.channels).flatten(2)

    def mean_logits(self, head: BranchLinear, x: list[Part], leaves: slice, replicate: int) -> Tensor:
        """The mean of the leaves' logits, ``[batch, classes]``, from pooled features: one linear layer of all."""
        if head not in self.constants:
            weight, bias = (t[leaves] for t in self._folded[head])
            parents = torch.arange(len(weight), device=weight.device) // replicate
            sums = weight.new_zeros(sum(part.branches for part in x), *weight.shape[1:3])
            sums.index_add_(0, parents, weight[..., 0, 0])
            linear = nn.Linear(sums.shape[0] * sums.shape[2], head.channels, device="meta")
            linear.weight = self._constant(sums.transpose(0, 1).flatten(1) / len(weight))
            linear.bias = self._constant(bias.mean(0))
            self.constants[head] = linear
        y: Tensor = self.constants[head](self.to_tensor(x).flatten(1))
        return y


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _side_by_side(maps: Tensor) -> Tensor:
    """``[branches, batch, channels, height, width]`` to ``[batch, branches * channels, height, width]``."""
    return maps.transpose(0, 1).flatten(1, 2)


def _normalize(scale: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * scale + bias


class CopyFreeNetwork(nn.Module):
    """Some members of a network in eval mode, as one network of ``torch.nn`` modules.

    Layers of other packages, and those of which a submodule was replaced or has hooks, compute as in
    :class:`NaiveExecutor`.

    Args:
        network: The network, in eval mode. Later changes of its parameters have no effect.
        leaves: The first n members, ``slice(0, n)``; or a single one, ``slice(n, n + 1)``.
        x: Example input: features of block ``first`` of a single member, or images for block 0.
        first: The first block to compute.
        keep: The blocks whose features are returned, too, before the logits; of a single member.
        mean: Whether the output is the mean of the members' logits, ``[batch, classes]``; else it is the logits of
            each, ``[leaves, batch, classes]``.
        separate: Whether each branch has convolutions of its own; else those of a layer are a grouped convolution.

    Raises:
        SkippedModuleError: A module of the network relies on being called, but is not.
    """

    def __init__(
        self,
        network: Network,
        leaves: slice,
        x: Tensor,
        *,
        first: int = 0,
        keep: Collection[int] = (),
        mean: bool = True,
        separate: bool = False,
    ) -> None:
        super().__init__()
        *nodes, (heads, replicate) = network.hierarchy.nodes(leaves, first)
        self._mean, self._head = mean, (network.head, heads, replicate)  # not a submodule
        folded: dict[BranchModule, tuple[Tensor, ...]] = {}
        self._executor = CopyFreeExecutor(folded, x.dtype, separate)
        self._steps = []
        self.called = nn.ModuleList()  # layers that read parameters of their own
        try:
            check_containers(network)
            folded |= _fold(network.head)
            blocks = zip(network.layers_of_blocks()[first:], nodes, strict=True)
            for number, (block, (branches, children)) in enumerate(blocks, first):
                for layer in block:
                    weights = _folded_weights(layer)
                    if weights is None or any(True for _ in _own_tensors(layer)):
                        self.called.append(layer)
                    folded |= weights or {}
                    kept = number in keep and layer is block[-1]
                    self._steps.append((layer, weights is None, branches, children, kept))
                    children = 1  # only the first layer of a block branches
            with torch.no_grad():
                self(x)
        except SkippedModuleError as error:
            raise error.within(network) from None
        names = {module: name for name, module in network.named_modules()}  # type: ignore[attr-defined]
        constants = self._executor.constants.items()
        self.constants = nn.ModuleDict({names[module].replace(".", "_"): value for module, value in constants})

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits of features ``[batch, channels, height, width]``; with ``keep`` after those that are kept."""
        executor, x = self._executor, [Part(features)]
        results = []
        for layer, naive, branches, children, kept in self._steps:
            if naive:
                y = layer(_NAIVE, executor.to_tensor(x), branches, children)
                x = executor.from_maps(_NAIVE.to_maps(y, layer.channels))
            else:
                x = layer(executor, x, branches, children)
            if kept:
                results.append(executor.to_tensor(x))
        head, leaves, replicate = self._head
        logits = executor.mean_logits if self._mean else executor.logits
        y = logits(head, executor.pool(x), leaves, replicate)
        return (*results, y) if results else y


_NAIVE = NaiveExecutor()
_KINDS = (  # layers that compute by an executor's operations alone; others may do arithmetic with features
    AveragePoolLayer,
    BasicBlockLayer,
    BottleneckLayer,
    ConvLayer,
    DenseBottleneckLayer,
    LayerNormLayer,
    MaxPoolLayer,
    ModuleLayer,
    NormLayer,
    PatchEmbeddingLayer,
    PoolLinearLayer,
    PreActivationLayer,
    SelectTokenLayer,
    TransformerBlockLayer,
)


def _own_tensors(layer: Layer) -> Iterator[Tensor]:
    """Parameters and buffers that no executor reads."""
    for module in called_modules(layer):
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


def _folded_weights(layer: Layer) -> FoldedWeights | None:
    """What replaces the parameters of each module of a layer; None if :class:`NaiveExecutor` has to call them."""
    if type(layer) not in _KINDS:
        return None
    try:
        if any(isinstance(module, BatchNormModule) and uses_batch_statistics(module) for module in layer.modules()):
            return None
        return _fold(layer)
    except SkippedModuleError:
        return None


def _fold(layer: nn.Module) -> FoldedWeights:
    """Fold in float64."""
    wide = copy.deepcopy(layer).double()
    found: dict[BranchModule, tuple[Tensor, ...]] = {}
    if isinstance(wide, TransformerBlockLayer):
        found = fold_transformer_block(wide)
    else:
        for module in wide.modules():
            if isinstance(module, BranchNorm):
                module.check_hooks()
                found[module] = tuple(running_normalization(module, slice(0, module.branches)))
            elif isinstance(module, ConvNorm | BranchConv):
                found[module] = fold_conv(module)
            elif isinstance(module, BranchParameters):
                found[module] = module.read(slice(0, module.branches))
    originals = zip(wide.modules(), layer.modules(), strict=True)
    return {original: found[module] for module, original in originals if module in found}  # type: ignore[misc]
