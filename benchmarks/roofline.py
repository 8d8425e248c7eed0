"""Lower bound of a call's time: the work it must do, divided by the measured rates of the machine."""

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
from hne.layers import BasicBlockLayer, BottleneckLayer, BranchConv, ConvNorm, Layer, PreActivationLayer, Size


@dataclass(frozen=True)
class Work:
    """The least work of a call."""

    bytes: int  # each input is read once, each result written once
    flops: int  # of matrix products and convolutions; a multiply-add counts as two

    def floor_seconds(self, rates: Rates) -> float:
        return max(self.bytes / rates.bytes_per_s, self.flops / rates.flops_per_s)


@dataclass(frozen=True)
class Rates:
    """Measured rates of the machine: a large copy, and large matrix products."""

    bytes_per_s: float  # read plus written; infinite if not measured, since caches are faster than memory
    flops_per_s: float

    def __str__(self) -> str:
        copied = "" if isinf(self.bytes_per_s) else f", {self.bytes_per_s / 1e9:,.0f} GB/s copied"
        return f"{self.flops_per_s / 1e9:,.0f} GFLOP/s{copied}"


def measure(
    meter: Meter, device: torch.device, dtype: torch.dtype, *, megabytes: int | None, sizes: Sequence[int]
) -> Rates:
    """Measure the rates, as the best of several repetitions.

    Args:
        meter: times the calls.
        device: where to compute.
        dtype: of the matrices.
        megabytes: MiB to copy; None to leave the copy out.
        sizes: edge lengths of the square matrices. They are random, because zeros multiply faster.
    """

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
    """Work of an op, counted on meta tensors.

    Args:
        function: the op, called with ``inputs`` by name.
        inputs: tensors.
        gradients: names of the inputs whose gradients are computed; none for the forward pass.
    """
    empty = {name: t.detach().to("meta") for name, t in inputs.items()}
    with torch.no_grad(), K.use_backend("reference"), FlopCounterMode(display=False) as counter:
        result = function(**empty)
    results = [result] if isinstance(result, Tensor) else list(result)
    flops = counter.get_total_flops()
    moved = sum(t.nbytes for t in [*inputs.values(), *results])
    if not gradients:
        return Work(moved, flops)
    # A product has two factors; the gradient of each is a product of the same size.
    products = sum(name in gradients for name in ("x", "features", "weight"))
    return Work(moved + sum(inputs[name].nbytes for name in gradients), flops * products)


def of_inference(model: HNE, num_models: int, batch: int, size: int, itemsize: int) -> Work:
    """Work of inference with one kernel per layer, which reads its input and weights and writes its output once."""
    layers = list(_layers(model, num_models, size))
    features = sum(sum(values[:1] + values[-1:]) for _, values, _ in layers)
    weights = sum(filters for *_, filters in layers) + num_models * model.head.macs((1, 1))
    return Work((batch * features + weights) * itemsize, 2 * batch * model.macs(num_models, size))


def of_training(model: HNE, batch: int, size: int, itemsize: int) -> Work:
    """Work of a training step with one kernel per convolution, batch norm included.

    A convolution moves its feature maps once in the forward pass and twice in the backward pass (the feature maps
    again, and their gradients). Weights and their gradients are in float32.
    """
    layers = list(_layers(model, model.num_models, size))
    features = sum(_of_convolutions(layer, values) for layer, values, _ in layers)
    weights = sum(filters for *_, filters in layers) + model.num_models * model.head.macs((1, 1))
    return Work(3 * batch * features * itemsize + 2 * 4 * weights, 3 * 2 * batch * model.macs(None, size))


def of_training_layer(
    layer: Layer, parents: int, branches: int, channels: int, batch: int, size: int, itemsize: int
) -> Work:
    """See :func:`of_training`, for one layer, with weights in the dtype of the features."""
    values = _values(layer, (size, size), channels, parents, branches)
    features, flops = _of_convolutions(layer, values), 2 * batch * branches * layer.macs((size, size))
    return Work((3 * batch * features + 2 * _filters(layer)) * itemsize, 3 * flops)


def _layers(model: HNE, num_models: int, size: int) -> Iterator[tuple[Layer, list[int], int]]:
    """Yield each layer, its :func:`_values` and its number of weights, for the branches of the first members."""
    *needed, _ = model.hierarchy.needed(num_models)
    shape, channels, parents = (size, size), model.in_channels, 1
    for block, branches, all_branches in zip(model.layers_of_blocks(), needed, model.hierarchy.branches, strict=True):
        for layer in block:
            values = _values(layer, shape, channels, parents, branches)
            yield layer, values, _filters(layer) * branches // all_branches
            shape, channels, parents = layer.output_size(shape), layer.channels, branches


def _values(layer: Layer, shape: Size, channels: int, parents: int, branches: int) -> list[int]:
    """Sizes of the feature maps of one image in a layer, from the input of its first convolution to its output."""
    inside = []
    if isinstance(layer, BottleneckLayer):
        middle = branches * layer.spec.middle
        inside = [middle * prod(shape), middle * prod(layer.output_size(shape))]
    elif isinstance(layer, BasicBlockLayer | PreActivationLayer):
        inside = [branches * layer.channels * prod(layer.output_size(shape))]
    return [
        parents * channels * prod(shape),
        *inside,
        branches * layer.channels * prod(layer.output_size(shape)),
    ]


def _of_convolutions(layer: Layer, values: list[int]) -> int:
    """Number of values that the convolutions of a layer read and write."""
    shortcut = [values[0], values[-1]] if getattr(layer, "shortcut", None) is not None else []
    return sum([*values[:-1], *values[1:], *shortcut])


def _filters(layer: Layer) -> int:
    return sum(module.conv.weight.numel() for module in layer.modules() if isinstance(module, ConvNorm | BranchConv))
