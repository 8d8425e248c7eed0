"""Execution for inference: batch norms folded into packed weights, and a whole layer per kernel.

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
from .layers import BottleneckLayer, ConvLayer, Layer, PoolLinearLayer, Unit, units
from .snapshot import Snapshot

PIXELS = 8 * 32 * 32  # of a part of the batch: eight images of CIFAR

Weights = tuple[Any, ...]  # tensors (or None) of a layer, in the order in which its kernel takes them


class Inference(Fused):
    """Features as in :class:`Fused`; no gradients, and batch norm by the running statistics."""

    def parts(self, images: Tensor) -> Sequence[Tensor]:
        # On a CPU, a few images at a time: the features of one layer are in the cache when the next one reads them, and
        # their memory is used again. A traced program does not depend on the size of its batch.
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return (images,)
        return images.split(max(1, PIXELS // images.shape[2:].numel()))

    def layer(self, layer: Layer, x: Tensor, branches: slice, replicate: int) -> Tensor:
        weights = folded(layer, branches)
        if isinstance(layer, BottleneckLayer):
            b = layer.description
            return K.fused_bottleneck(
                x,
                *weights,
                stride=b.stride,
                replicate=replicate,
                activation=b.activation,
                identity=layer.identity,
                final_activation=b.final_activation,
            )
        if isinstance(layer, ConvLayer):
            c = layer.description
            return K.fused_conv2d(
                x,
                *weights,
                stride=c.stride,
                padding=layer.unit.padding,
                replicate=replicate,
                activation=c.activation,
            )
        assert isinstance(layer, PoolLinearLayer)
        activation = layer.description.activation
        return K.fused_conv2d(self.pool(x), *weights, replicate=replicate, activation=activation)


# Folding --------------------------------------------------------------------------------------------------------------


def fold(layer: Layer) -> Weights:
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
    assert isinstance(layer, PoolLinearLayer)
    weight, bias = linear_parameters(layer.linear, slice(0, layer.linear.branches))
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


def folded(layer: Layer, branches: slice) -> Weights:
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

    def __init__(self, layer: Layer) -> None:
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
