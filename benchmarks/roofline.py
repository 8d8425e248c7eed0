"""The time below which a call cannot take: what it must move and compute, over what the machine was seen to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, isinf, prod
from typing import Any

import torch
from meters import Meter, Side
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hne_kernels as K
from hne import HNE
from hne.layers.modules import BottleneckLayer, Layer, Size, units


@dataclass(frozen=True)
class Work:
    """The least that a call must do."""

    bytes: int  # each input read once, each result written once
    flops: int  # of matrix products and convolutions, a multiply-add being two

    def floor_seconds(self, rates: Rates) -> float:
        return max(self.bytes / rates.bytes_per_s, self.flops / rates.flops_per_s)


@dataclass(frozen=True)
class Rates:
    """What was measured: a large copy, bytes read plus bytes written, and large matrix products."""

    bytes_per_s: float  # infinite where it was not measured: what is in the caches is not bound by it
    flops_per_s: float

    def __str__(self) -> str:
        copied = "" if isinf(self.bytes_per_s) else f", {self.bytes_per_s / 1e9:,.0f} GB/s copied"
        return f"{self.flops_per_s / 1e9:,.0f} GFLOP/s{copied}"


def measure(
    meter: Meter, device: torch.device, dtype: torch.dtype, *, megabytes: int | None, sizes: Sequence[int]
) -> Rates:
    """The best of several: copies of so many MiB, and products of random matrices of ``size`` x ``size`` (zeros would
    be faster)."""

    def best(side: Side) -> float:
        ready = meter.prepare(side)
        return min(meter.seconds(ready, 3) for _ in range(10))

    def copied(megabytes: int) -> float:
        source = torch.empty(megabytes << 20, dtype=torch.int8, device=device).random_()
        target = torch.empty_like(source)
        return 2 * source.nbytes / best(lambda: target.copy_(source))

    def multiplied(size: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / best(lambda: a @ b)

    with meter.running():
        return Rates(inf if megabytes is None else copied(megabytes), max(map(multiplied, sizes)))


def of_op(function: Callable[..., Any], inputs: dict[str, Tensor], gradients: Sequence[str] = ()) -> Work:
    """The work of an op, counted without computing anything.

    Args:
        function: The op, called with ``inputs`` by name.
        gradients: Names of the inputs whose gradients are the work; none for the forward pass.
    """
    empty = {name: t.detach().to("meta") for name, t in inputs.items()}
    with torch.no_grad(), K.use_backend("reference"), FlopCounterMode(display=False) as counter:
        result = function(**empty)
    results = [result] if isinstance(result, Tensor) else list(result)
    flops = counter.get_total_flops()
    moved = sum(t.nbytes for t in [*inputs.values(), *results])
    if not gradients:
        return Work(moved, flops)
    # A product has two factors; each gradient asked for is a product of the same size.
    products = sum(name in gradients for name in ("x", "features", "weight"))
    return Work(moved + sum(inputs[name].nbytes for name in gradients), flops * products)


def of_inference(model: HNE, num_models: int, batch: int, size: int, itemsize: int) -> Work:
    """The work of a model whose every layer is one kernel: a layer reads and writes its features and weights once."""
    layers = list(_layers(model, num_models, size))
    maps = sum(sum(values[:1] + values[-1:]) for _, values, _ in layers)
    weights = sum(filters for *_, filters in layers) + num_models * model.head.macs()
    return Work((batch * maps + weights) * itemsize, 2 * batch * model.macs(num_models, size))


def of_training(model: HNE, batch: int, size: int, itemsize: int) -> Work:
    """The work of a training step in which every convolution is one kernel, its batch norm included.

    A convolution reads and writes its features once in the forward pass and twice in the backward pass (the features
    again, and their gradients). Weights and their gradients are in float32.
    """
    layers = list(_layers(model, model.num_models, size))
    maps = sum(_of_convolutions(layer, values) for layer, values, _ in layers)
    weights = sum(filters for *_, filters in layers) + model.num_models * model.head.macs()
    return Work(3 * batch * maps * itemsize + 2 * 4 * weights, 3 * 2 * batch * model.macs(None, size))


def of_training_layer(
    layer: Layer, parents: int, branches: int, channels: int, batch: int, size: int, itemsize: int
) -> Work:
    """The same of one layer, with weights in the dtype of the features."""
    values = _values(layer, (size, size), channels, parents, branches)
    maps, flops = _of_convolutions(layer, values), 2 * batch * branches * layer.macs((size, size))
    return Work((3 * batch * maps + 2 * _filters(layer)) * itemsize, 3 * flops)


def _layers(model: HNE, num_models: int, size: int) -> Iterator[tuple[Layer, list[int], int]]:
    """Every layer, the values of :func:`_values`, and those in its filters, of what the first leaves run through."""
    *needed, _ = model.hierarchy.needed(num_models)
    shape, channels, parents = (size, size), model.in_channels, 1
    for block, branches, all_branches in zip(model._blocks(), needed, model.hierarchy.branches, strict=True):
        for layer in block:
            values = _values(layer, shape, channels, parents, branches)
            yield layer, values, _filters(layer) * branches // all_branches
            shape, channels, parents = layer.output_size(shape), layer.description.channels, branches


def _values(layer: Layer, shape: Size, channels: int, parents: int, branches: int) -> list[int]:
    """Values of one image in the maps of a layer, from what its first convolution reads to what its last one writes."""
    inside = []
    if isinstance(layer, BottleneckLayer):
        middle = branches * layer.description.middle
        inside = [middle * prod(shape), middle * prod(layer.output_size(shape))]
    return [
        parents * channels * prod(shape),
        *inside,
        branches * layer.description.channels * prod(layer.output_size(shape)),
    ]


def _of_convolutions(layer: Layer, values: list[int]) -> int:
    """What all convolutions of a layer read and write."""
    shortcut = [values[0], values[-1]] if isinstance(layer, BottleneckLayer) and layer.shortcut is not None else []
    return sum([*values[:-1], *values[1:], *shortcut])


def _filters(layer: Layer) -> int:
    return sum(unit.conv.weight.numel() for unit in units(layer))
