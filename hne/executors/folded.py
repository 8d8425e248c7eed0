"""Execution for inference: batch norms folded into packed weights, and one call for a whole layer, or for all of them.

The folded tensors are derived once and kept with the layer until its parameters change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import hne_kernels as K
from hne_kernels import checks, dispatch

from ..hierarchy import Hierarchy
from ..layers import batch_norm
from ..layers.modules import BottleneckLayer, ConvLayer, Foldable, Layer, Linear, PoolLinearLayer, Unit, units
from .kernels import Fused, linear_parameters
from .parameter_versions import Snapshot

# Of a part of the batch, where layers are called one by one: 16 images of CIFAR, and of larger ones no fewer than eight
# (weights are read once for a part). A network in one call has parts of its own, see csrc/cpu/fused_layers.cpp.
IMAGES, PIXELS = 8, 16 * 32 * 32

Weights = tuple[Any, ...]  # tensors (or None) of a layer, in the order in which its kernel takes them


class Inference(Fused):
    """Features as in :class:`Fused`; no gradients, and batch norm by the running statistics."""

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        # On a CPU, a few images at a time: the features of one layer are in the cache when the next one reads them, and
        # their memory is used again. A traced program does not depend on the size of its batch.
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return (images,)
        batch, _, height, width = images.shape
        most = max(IMAGES, PIXELS // (height * width))
        return (images,) if batch <= most else images.split(most)

    def block(self, layers: Sequence[Layer], x: Tensor, branches: slice, replicate: int) -> Tensor:
        for layer in layers:
            x = described(layer, branches, replicate)(x)
            replicate = 1  # only the first layer branches
        return x

    def logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int) -> Tensor:
        return described_head(head, leaves, replicate)(x).flatten(2)

    def prefix_logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]) -> Tensor:
        return K.prefix_mean(self.logits(head, x, leaves, replicate), sizes)


def described(layer: Layer, branches: slice, replicate: int) -> K.FusedLayer:
    """A layer as the kernels take it, with the folded weights of some branches."""
    if isinstance(layer, ConvLayer):
        c = layer.description
        return K.FusedLayer(folded(layer, branches), c.stride, layer.unit.padding, replicate, c.activation)
    if isinstance(layer, BottleneckLayer):
        b = layer.description
        return K.FusedLayer(
            folded(layer, branches),
            stride=b.stride,
            replicate=replicate,
            activation=b.activation,
            final_activation=b.final_activation,
            identity=layer.identity,
        )
    assert isinstance(layer, PoolLinearLayer)
    return described_head(layer.linear, branches, replicate, layer.description.activation)


def described_head(linear: Linear, branches: slice, replicate: int, activation: str = "none") -> K.FusedLayer:
    """A linear layer of the mean over the map, as the kernels take it."""
    return K.FusedLayer(folded(linear, branches), replicate=replicate, activation=activation, mean=True)


# Folding --------------------------------------------------------------------------------------------------------------


def fold(layer: Foldable) -> Weights:
    """The weights of a layer with its batch norms folded in and its matrices packed, for all branches."""
    if isinstance(layer, ConvLayer):
        return _fold_dense(layer.unit)
    if isinstance(layer, BottleneckLayer):
        depthwise, depthwise_bias = _fold(layer.depthwise)
        return (
            *_fold_dense(layer.expand),
            depthwise.squeeze(2).permute(0, 2, 3, 1).contiguous(),
            depthwise_bias,
            *_fold_dense(layer.project),
            *((None, None) if layer.shortcut is None else _fold_dense(layer.shortcut)),
        )
    assert isinstance(layer, Linear)
    weight, bias = linear_parameters(layer, slice(0, layer.branches))
    return K.pack_weight(weight), bias


def _fold(unit: Unit) -> tuple[Tensor, Tensor]:
    """Weight ``[branches, channels, inputs, k, k]`` and bias ``[branches, channels]`` of both, batch norm folded in."""
    everything = slice(0, unit.branches)
    weight = unit.part(unit.conv.weight, everything)
    mean, var = batch_norm.running(unit, everything)
    scale, shift = batch_norm.scale_and_shift(unit, everything, var)
    return (weight * scale[..., None, None, None]).to(weight.dtype), (shift - mean * scale).to(weight.dtype)


def _fold_dense(unit: Unit) -> tuple[Tensor, Tensor]:
    weight, bias = _fold(unit)
    return K.pack_weight(weight), bias


# Keeping --------------------------------------------------------------------------------------------------------------


def folded(layer: Foldable, branches: slice) -> Weights:
    """The folded weights of some branches of ``layer``: of an earlier call, while its parameters stay as they were.

    Changes in place and replaced tensors are noticed. Writing through ``parameter.data`` is hidden from PyTorch's
    version counter, and takes effect with the next ``train()`` or ``eval()``. Parameters that have no version counter
    (made under ``torch.inference_mode()``) are folded for every call.

    A CUDA graph reads the weights of an earlier call, which then stay as long as the layer does. Captured without an
    earlier call, it folds them itself, anew in every replay.
    """
    if torch.compiler.is_compiling():
        return _slice(fold(layer), branches)
    kept: Folded | None = layer.kept()
    capturing = is_capturing()
    if kept is None:
        if capturing:  # what a graph computes is there when it is replayed, not now
            return _slice(fold(layer), branches)
        with torch.no_grad():
            kept = Folded(layer)
        layer.folded = kept
    if capturing:
        layer.captured.append(kept)
    return kept.part(branches)


def is_capturing() -> bool:
    """Whether kernels that are launched now become part of a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Networks:
    """The layers of a model for inference on a CPU, one call for each part of the tree that has been asked for."""

    def __init__(self, hierarchy: Hierarchy, blocks: Sequence[Sequence[Layer]], head: Linear) -> None:
        self._hierarchy, self._blocks, self._head = hierarchy, blocks, head
        layers = [layer for block in blocks for layer in block]
        self._parameters = Snapshot(
            child for layer in (*layers, head) for unit in units(layer) for child in unit.children()
        )
        self._networks: dict[tuple[int, int, int, bool], K.FusedLayers] = {}

    @staticmethod
    def serve(x: Tensor) -> bool:
        """Whether networks that are prepared can take images like ``x``."""
        return (
            type(x) in (Tensor, Parameter)  # no stand-in that is not in memory
            and not torch.compiler.is_compiling()
            and not is_capturing()
            and checks.autocast_dtype(x.device.type) is None
            and dispatch.select(x) == "cpp"
        )

    def is_current(self) -> bool:
        """Whether the parameters are unchanged, as far as that can be told: see :func:`folded`."""
        return self._parameters.is_current()

    def run(
        self, x: Tensor, leaves: slice, first: int = 0, *, keep: bool = False, sizes: Sequence[int] | None = None
    ) -> list[Tensor]:
        """See :class:`hne.layers.Runner`."""
        key = leaves.start, leaves.stop, first, keep
        network = self._networks.get(key)
        if network is None:
            with torch.no_grad():
                network = self._networks[key] = self._network(leaves, first, keep)
        results = network(x)
        if sizes is not None:
            results[-1] = K.prefix_mean(results[-1], sizes)
        return results

    def _network(self, leaves: slice, first: int, keep: bool) -> K.FusedLayers:
        layers, ends = [], []
        *nodes, (heads, replicate) = self._hierarchy.nodes(leaves, first)
        for block, (branches, children) in zip(self._blocks[first:], nodes, strict=True):
            for layer in block:
                layers.append(described(layer, branches, children))
                children = 1  # only the first layer branches
            ends.append(len(layers) - 1)
        layers.append(described_head(self._head, heads, replicate))
        return K.FusedLayers(layers, ends if keep else (), images=first == 0)


class Folded:
    """The folded weights of a layer, and the state of the parameters that they come from."""

    def __init__(self, layer: Foldable) -> None:
        self._parameters = Snapshot(module for unit in units(layer) for module in unit.children())
        self._weights = fold(layer)
        self._parts: dict[tuple[int, int], Weights] = {}
        device = next(layer.parameters()).device
        if device.type == "cuda":
            # Once, so that every stream may read the new weights, and none still reads those that they replace.
            torch.cuda.synchronize(device)

    def is_current(self) -> bool:
        """Whether the parameters are unchanged, as far as that can be told."""
        return self._parameters.is_current()

    def part(self, branches: slice) -> Weights:
        """The weights of some branches."""
        key = branches.start, branches.stop
        if key not in self._parts:
            self._parts[key] = _slice(self._weights, branches)
        return self._parts[key]


def _slice(weights: Weights, branches: slice) -> Weights:
    return tuple(weight if weight is None else weight[branches] for weight in weights)
