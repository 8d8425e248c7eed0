"""Execution for inference: batch norms folded into packed weights, and a whole run of layers per kernel.

The folded tensors are derived once and kept with the layer until its parameters change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hne_kernels as K

from . import batch_norm
from .fused import Fused, linear_parameters
from .layers import BottleneckLayer, ConvLayer, Foldable, Layer, Linear, Unit, units
from .snapshot import Snapshot

# Of a part of the batch: 16 images of CIFAR, and of larger ones no fewer than eight (weights are read once for a part).
IMAGES, PIXELS = 8, 16 * 32 * 32

Weights = tuple[Any, ...]  # tensors (or None) of a layer, in the order in which its kernel takes them


class Inference(Fused):
    """Features as in :class:`Fused`; no gradients, and batch norm by the running statistics."""

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        # On a CPU, a few images at a time: the features of one layer are in the cache when the next one reads them, and
        # their memory is used again. A traced program does not depend on the size of its batch.
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return (images,)
        return images.split(max(IMAGES, PIXELS // images.shape[2:].numel()))

    def block(self, layers: Sequence[Layer], x: Tensor, branches: slice, replicate: int) -> Tensor:
        first = 0
        while first < len(layers):
            last, activations = first + 1, _activations(layers[first])
            if activations is None:
                x = self.layer(layers[first], x, branches, replicate)
            else:
                while last < len(layers) and _activations(layers[last]) == activations:
                    last += 1
                x = self._bottlenecks(layers[first:last], x, branches, replicate, *activations)
            first, replicate = last, 1
        return x

    def _bottlenecks(
        self,
        layers: Sequence[Any],
        x: Tensor,
        branches: slice,
        replicate: int,
        activation: str,
        final_activation: str,
    ) -> Tensor:
        return K.fused_bottlenecks(
            x,
            [folded(layer, branches) for layer in layers],
            strides=[layer.description.stride for layer in layers],
            identities=[layer.identity for layer in layers],
            replicate=replicate,
            activation=activation,
            final_activation=final_activation,
        )

    def layer(self, layer: Layer, x: Tensor, branches: slice, replicate: int) -> Tensor:
        if isinstance(layer, ConvLayer):
            c = layer.description
            return K.fused_conv2d(
                x,
                *folded(layer, branches),
                stride=c.stride,
                padding=layer.unit.padding,
                replicate=replicate,
                activation=c.activation,
            )
        y: Tensor = layer(self, x, branches, replicate)
        return y

    def linear(
        self, linear: Linear, x: Tensor, branches: slice, replicate: int = 1, activation: str = "none"
    ) -> Tensor:
        return K.fused_conv2d(x, *folded(linear, branches), replicate=replicate, activation=activation)

    def prefix_logits(self, head: Linear, x: Tensor, leaves: slice, replicate: int, sizes: Sequence[int]) -> Tensor:
        return K.prefix_mean(self.logits(head, x, leaves, replicate), sizes)


def _activations(layer: Layer) -> tuple[str, str] | None:
    """What bottlenecks in one run have in common; None for any other layer."""
    if not isinstance(layer, BottleneckLayer):
        return None
    return layer.description.activation, layer.description.final_activation


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
    kept: Folded | None = layer.folded
    capturing = is_capturing()
    if kept is None or not kept.is_current():
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
