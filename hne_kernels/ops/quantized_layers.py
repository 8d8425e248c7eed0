"""A sequence of int8 layers in one call (inference)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, dispatch, extension
from ..checks import PANEL
from ..quantized_layer import GROUP, QuantizedLayer, padded
from ..reference.quantized_layers import quantized_layers as reference

_KINDS = ("conv", "bottleneck", "pool_linear", "quantize")  # as numbers in csrc/cpu/quantized_layers.cpp


class QuantizedLayers:
    """A sequence of int8 layers on a CPU, each of which reads the output of the one before.

    On AVX2, AVX-512 and both with VNNI the library computes all of them in one call, and the features of a bottleneck
    stay in the cache. All instruction sets give the same integers. The weights must not change.

    Args:
        layers: the layers.
        keep: indices of the layers whose outputs are results, besides the last.

    Raises:
        ValueError, TypeError: a tensor of a layer has another shape or dtype; the message names the layer.
    """

    def __init__(self, layers: Sequence[QuantizedLayer], keep: Sequence[int] = ()) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("layers: expected at least one, got none")
        for number in keep:
            if not 0 <= number < len(self.layers):
                raise ValueError(f"keep: expected numbers from 0 to {len(self.layers) - 1}, got {number}")
        self._results = frozenset((*keep, len(self.layers) - 1))
        tensors: list[Tensor | None] = []
        numbers: list[int] = []
        for index, layer in enumerate(self.layers):
            try:
                _check(layer, self.layers[index - 1] if index else None)
            except (ValueError, TypeError) as error:
                raise type(error)(f"layer {index}: {error}") from None
            tensors += [tensor for tensor in layer.tensors if tensor is not None]
            numbers += [
                _KINDS.index(layer.kind),
                layer.branches,
                layer.in_channels,
                layer.middle,
                layer.channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                layer.replicate,
                int(layer.identity),
                int(layer.projected),
                int(index in self._results),
            ]
        self._call = torch.ops.hne.quantized_layers.default  # looked up once
        self._prepared: int = torch.ops.hne.prepare_quantized_layers(tensors, numbers)
        weakref.finalize(self, extension.cpu_library().forget_quantized_layers, self._prepared)

    def __reduce__(self) -> tuple[Any, ...]:
        # The prepared layers belong to this object: a copy prepares its own.
        return QuantizedLayers, (self.layers, sorted(self._results))

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Compute the layers.

        Args:
            x: features uint8 ``[G, B, H, W, C]`` with the branches and channels of the first layer, or images float32
                ``[B, C, H, W]`` of any strides, if that is ``quantize``.

        Returns:
            The output of every layer in ``keep``, and of the last one, in order: uint8 ``[G', B, H', W', C']``; of a
            last ``pool_linear`` float32 ``[G', B, C']``.

        Raises:
            ValueError, TypeError: ``x`` does not fit the layers.
        """
        first = self.layers[0]
        images = first.kind == "quantize"
        checks.rank("x", x, 4 if images else 5, "[batch, channels, height, width]" if images else checks.CONV_INPUT)
        dtype = torch.float32 if images else torch.uint8
        if x.dtype != dtype or x.device.type != "cpu":
            raise TypeError(f"x: expected {dtype} on the CPU, got {x.dtype} on {x.device}")
        if x.shape[1 if images else 4] != first.in_channels:
            raise ValueError(f"x: expected {first.in_channels} channels, got shape {tuple(x.shape)}")
        if not images and x.shape[0] != (parents := -(-first.branches // first.replicate)):
            raise ValueError(f"x: expected {parents} branches, got shape {tuple(x.shape)}")
        if dispatch.backend_for(x.new_empty((), dtype=torch.float32)) == "reference":
            return [y for index, y in enumerate(reference(x, self.layers)) if index in self._results]
        outputs: list[Tensor] = self._call(x.detach(), self._prepared)
        return outputs


def _check(layer: QuantizedLayer, before: QuantizedLayer | None) -> None:
    """Raise unless the layer's numbers and tensors fit each other, and the layer before it."""
    if layer.kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {layer.kind}")
    for name in ("branches", "in_channels", "channels", "kernel_size", "stride", "replicate"):
        checks.at_least(name, getattr(layer, name), 1)
    checks.at_least("padding", layer.padding, 0)
    checks.at_least("middle", layer.middle, 0)
    groups = (layer.channels, layer.middle) + (() if layer.kind == "quantize" else (layer.in_channels,))
    if any(channels % GROUP for channels in groups):
        raise ValueError(f"channels: expected multiples of {GROUP}, got {groups}")
    if before is not None:
        parents = -(-layer.branches // layer.replicate)
        if (before.branches, before.channels) != (parents, layer.in_channels) or layer.kind == "quantize":
            raise ValueError(
                f"expected {before.branches} branches of {before.channels} channels as input, "
                f"found {layer.kind} for {parents} of {layer.in_channels}"
            )
    expected = _expected(layer)
    if len(layer.tensors) != len(expected):
        raise ValueError(f"tensors: expected {len(expected)}, got {len(layer.tensors)}")
    for number, (tensor, wanted) in enumerate(zip(layer.tensors, expected, strict=True)):
        if (tensor is None) != (wanted is None):
            raise ValueError(f"tensors[{number}]: expected {'None' if wanted is None else 'a tensor'}")
        if tensor is None or wanted is None:
            continue
        dtype, shape = wanted
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            raise TypeError(f"tensors[{number}]: expected {dtype} on the CPU, got {tensor.dtype} on {tensor.device}")
        checks.shape(f"tensors[{number}]", tensor, shape, "see QuantizedLayer")


def _expected(layer: QuantizedLayer) -> list[tuple[torch.dtype, tuple[int, ...]] | None]:
    """The dtypes and shapes of a layer's tensors."""
    branches, k = layer.branches, layer.kernel_size

    def matrix(in_channels: int, channels: int) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.int8, (branches, -(-channels // PANEL), in_channels // GROUP, PANEL, GROUP)

    def values(channels: int) -> list[tuple[torch.dtype, tuple[int, ...]] | None]:
        return [(torch.int32, (branches, channels)), (torch.float32, (branches, channels))]

    channels, middle = padded(layer.channels, PANEL), padded(layer.middle, PANEL)
    if layer.kind == "quantize":
        return [(torch.float32, (1,)), (torch.int32, (1,))]
    if layer.kind == "bottleneck":
        shortcut = matrix(layer.in_channels, layer.channels) if layer.projected else None
        factor = (torch.float32, (branches, channels)) if layer.projected or layer.identity else None
        return [
            matrix(layer.in_channels, layer.middle),
            *values(middle),
            (torch.int8, (branches, k, -(-k // GROUP), layer.middle, GROUP)),
            *values(layer.middle),
            matrix(layer.middle, layer.channels),
            *values(channels),
            shortcut,
            factor,
            (torch.int32, (branches, 3)),
        ]
    conv = [matrix(k * k * layer.in_channels, layer.channels), *values(channels), (torch.int32, (branches, 2))]
    if layer.kind == "conv":
        return conv
    return [(torch.float32, (branches, 1)), (torch.int32, (branches, 2)), *conv]
