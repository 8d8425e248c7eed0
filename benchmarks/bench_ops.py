"""Every op in the layers of HNE-ResNet (Table 2), forward and backward through the gradients of all inputs; dense 3x3
convolutions with the sizes of a ResNet-18. The ops of the heads also run with the sizes of HNE-MobileNetV2 (Table 3).

The naive side is the reference: it copies features for every child and runs one grouped convolution over the channels
of all branches. Its inputs already have its memory layout ([batch, branch * channel, height, width]), so that its time
includes no change of layout. channels_last.py has a third side, without the copies and channels-last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import channels_last
import pytest
import roofline
import torch
from comparison import check_agreement
from meters import Side
from torch import Tensor
from workload import Workload

import hne_kernels as K
from hne.executors import KernelExecutor, NaiveExecutor, SubtreeExecutor
from hne.layers import Bottleneck, build_layer

# layer: input branches, replicate, height, input and output channels, kernel size, stride
CONVOLUTIONS = {
    "stem": (1, 1, 32, 3, 16, 3, 1),
    "block 1, expand": (1, 2, 32, 64, 16, 1, 1),
    "block 2, expand": (2, 2, 32, 64, 32, 1, 1),
    "block 2, project": (4, 1, 16, 32, 128, 1, 1),
    "block 3, shortcut": (4, 2, 16, 128, 256, 1, 2),
    "block 3, expand": (8, 1, 8, 256, 64, 1, 1),
    "block 4, expand": (8, 2, 8, 256, 64, 1, 1),
    "block 4, project": (16, 1, 8, 64, 256, 1, 1),
    "ResNet-18, block 1": (1, 1, 56, 64, 64, 3, 1),
    "ResNet-18, block 2, first": (1, 2, 56, 64, 128, 3, 2),
    "ResNet-18, block 3": (4, 1, 14, 256, 256, 3, 1),
    "ResNet-18, block 4": (8, 1, 7, 512, 512, 3, 1),
}
# layer: branches, height, channels, stride
DEPTHWISE = {
    "block 1": (2, 32, 16, 1),
    "block 2, first": (4, 32, 32, 2),
    "block 2": (4, 16, 32, 1),
    "block 3, first": (8, 16, 64, 2),
    "block 4": (16, 8, 64, 1),
}
# layer: input branches, replicate, height, input, middle and output channels, stride
BOTTLENECKS = {
    "block 1, first": (1, 2, 32, 64, 16, 64, 1),
    "block 1": (2, 1, 32, 64, 16, 64, 1),
    "block 2, first": (2, 2, 32, 64, 32, 128, 2),
    "block 2": (4, 1, 16, 128, 32, 128, 1),
    "block 3, first": (4, 2, 16, 128, 64, 256, 2),
    "block 3": (8, 1, 8, 256, 64, 256, 1),
    "block 4, first": (8, 2, 8, 256, 64, 256, 1),
    "block 4": (16, 1, 8, 256, 64, 256, 1),
}

Inputs = dict[str, Tensor]
Head = tuple[int, int, int, int]
Function = Callable[..., Any]


class Bench:
    """Device, dtype and inputs of the comparisons of ops."""

    def __init__(self, versus: Any, workload: Workload, rng: torch.Generator) -> None:
        self.batch, self.dtype = workload.ops
        self._versus, self._device, self._rng = versus, workload.device, rng

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random values, by default in the dtype of the features."""
        return torch.randn(shape, generator=self._rng).to(self._device, dtype or self.dtype)

    def target(self, batch: int, classes: int) -> Tensor:
        return torch.randint(classes, (batch,), generator=self._rng).to(self._device)

    def __call__(
        self,
        way: str,
        op: str,
        function: Function,
        inputs: Inputs,
        last: Function | None = None,
        *,
        last_inputs: Inputs | None = None,
        both_ways: bool = True,
        **options: Any,
    ) -> None:
        """Compare ``function`` with the reference backend and with ``last``, the channels-last side.

        Args:
            way: ``forward`` or ``backward``.
            op: name of the op, for the table.
            last: takes ``last_inputs``, by default ``inputs``.
            both_ways: ``way`` is part of the name.
        """
        sides = [(function, inputs), (function, _laid_out(inputs, _side_by_side))]
        layouts = [_as_it_is, _side_by_side]
        if last is not None:
            sides.append((last, _laid_out(last_inputs or inputs, channels_last.in_memory)))
            layouts.append(channels_last.in_memory)
        gradients = []
        if way == "forward":
            makers = [_forward(*side) for side in sides]
        else:
            # Images, with three channels, need no gradient.
            gradients = [name for name, t in inputs.items() if name != "x" or t.shape[-1] > 3]
            with torch.no_grad():
                cotangent = self.normal(*_first(function(**inputs)).shape)
            makers = [
                _backward(*side, gradients, layout(cotangent) if cotangent.dim() == 5 else cotangent)
                for side, layout in zip(sides, layouts, strict=True)
            ]
        self.versus(
            *makers,
            name=f"{op} {way}" if both_ways else op,
            work=lambda: roofline.of_op(function, inputs, gradients),
            **options,
        )

    def versus(self, *makers: Callable[[Any], Side], **options: Any) -> None:
        self._versus(*makers, **{"images": self.batch, "dtype": self.dtype, **options})


@pytest.fixture
def bench(versus: Any, workload: Workload, rng: torch.Generator) -> Bench:
    return Bench(versus, workload, rng)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _side_by_side(x: Tensor) -> Tensor:
    """Features [G, B, H, W, C] with the same values and the memory layout [B, G * C, H, W]."""
    return x.permute(1, 0, 4, 2, 3).contiguous().permute(1, 0, 3, 4, 2)


def _laid_out(inputs: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    return {name: layout(value) if name in ("x", "residual") else value for name, value in inputs.items()}


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _forward(function: Function, inputs: Inputs) -> Callable[[Any], Side]:
    def make(wrap: Any) -> Side:
        call = wrap(function)
        return lambda: _without_gradients(call, inputs)

    return make


@torch.no_grad()
def _without_gradients(call: Function, inputs: Inputs) -> Any:
    return call(**inputs)


def _without_gradient_results(make: Callable[[Any], Side]) -> Callable[[Any], Side]:
    """The same side without gradients among its results."""

    def alone(wrap: Any) -> Side:
        side = make(wrap)
        return lambda: side()[0]

    return alone


def _backward(function: Function, inputs: Inputs, gradients: Sequence[str], cotangent: Tensor) -> Callable[[Any], Side]:
    def make(wrap: Any) -> Side:
        ours = {name: t.detach().requires_grad_(name in gradients) for name, t in inputs.items()}
        result = _first(wrap(function)(**ours))
        leaves = [ours[name] for name in gradients]
        return lambda: torch.autograd.grad(result, leaves, cotangent, retain_graph=True)

    return make


ways = pytest.mark.parametrize("way", ["forward", "backward"])


@pytest.mark.parametrize("layer", CONVOLUTIONS)
@ways
def bench_branch_conv2d(layer: str, way: str, bench: Bench) -> None:
    branches, r, size, inputs, outputs, k, stride = CONVOLUTIONS[layer]
    tensors = {
        "x": bench.normal(branches, bench.batch, size, size, inputs),
        "weight": bench.normal(branches * r, outputs, inputs, k, k),
    }
    shape = f"{layer}: {branches}>{branches * r} x {bench.batch} x {size}x{size} x {inputs}>{outputs}, {k}x{k}/{stride}"

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return K.branch_conv2d(x, weight, stride=stride, padding=k // 2, replicate=r)

    def last(x: Tensor, weight: Tensor) -> Tensor:
        return channels_last.branch_conv2d(x, weight, stride=stride, padding=k // 2, replicate=r)

    bench(way, "branch_conv2d", function, tensors, last, shape=shape)


@pytest.mark.parametrize("layer", DEPTHWISE)
@ways
def bench_branch_depthwise_conv2d(layer: str, way: str, bench: Bench) -> None:
    branches, size, channels, stride = DEPTHWISE[layer]
    tensors = {
        "x": bench.normal(branches, bench.batch, size, size, channels),
        "weight": bench.normal(branches, channels, 3, 3),
    }
    shape = f"{layer}: {branches} x {bench.batch} x {size}x{size} x {channels}, 3x3/{stride}"

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return K.branch_depthwise_conv2d(x, weight, stride=stride, padding=1)

    def last(x: Tensor, weight: Tensor) -> Tensor:
        return channels_last.branch_depthwise_conv2d(x, weight, stride=stride, padding=1)

    bench(way, "branch_depthwise_conv2d", function, tensors, last, shape=shape)


@pytest.mark.parametrize("layer", BOTTLENECKS)
def bench_training_bottleneck(layer: str, bench: Bench) -> None:
    """A bottleneck forward and backward, with normalisation fused into the convolutions, against batch norm."""
    parents, r, size, channels, middle, outputs, stride = BOTTLENECKS[layer]
    children = parents * r
    x = bench.normal(parents, bench.batch, size, size, channels)
    cotangent = bench.normal(children, bench.batch, size // stride, size // stride, outputs)
    module = (
        build_layer(Bottleneck(outputs, middle, stride=stride), channels, children, r).to(x.device, x.dtype).train()
    )

    def side(
        executor: SubtreeExecutor, lay_out: Function, memory: torch.memory_format, dtype: torch.dtype = x.dtype
    ) -> Callable[[Any], Side]:
        """A side that computes the output and the gradients of input and parameters."""
        ours = copy.deepcopy(module).to(dtype, memory_format=memory)
        leaves = [lay_out(x.to(dtype)).detach().requires_grad_(), *ours.parameters()]
        grad = lay_out(cotangent.to(dtype))

        def branch_major(y: Tensor, branches: int) -> Tensor:
            return y if y.dim() == 5 else y.unflatten(1, (branches, -1)).permute(1, 0, 3, 4, 2)

        def make(wrap: Any) -> Side:
            call = wrap(lambda x: executor.materialize(ours(executor, x, slice(0, children), r)))

            def step() -> Any:
                y = call(leaves[0])
                grad_x, *rest = torch.autograd.grad(y, leaves, grad)
                return branch_major(y.detach(), children), branch_major(grad_x, parents), *rest

            return step

        return make

    def interleaved(x: Tensor) -> Tensor:
        return x.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous()

    def interleaved_last(x: Tensor) -> Tensor:
        return interleaved(x).contiguous(memory_format=torch.channels_last)

    executors: list[tuple[SubtreeExecutor, Function, torch.memory_format]] = [
        (KernelExecutor(), _as_it_is, torch.contiguous_format),
        (NaiveExecutor(), interleaved, torch.contiguous_format),
        (channels_last.ChannelsLastExecutor(), interleaved_last, torch.channels_last),
    ]
    # Rounding switches ReLUs and their gradients on and off, so gradients are compared in float64.
    if x.device.type == "cpu":
        fused, *others = (side(*how, torch.float64)(_as_it_is)() for how in executors)
        for other in others:
            check_agreement(fused, other)
    bench.versus(
        *(_without_gradient_results(side(*how)) for how in executors),
        name="bottleneck in training",
        shape=f"{layer}: {parents}>{children} x {bench.batch} x {size}x{size} x "
        f"{channels}>{middle}>{outputs}, /{stride}",
        work=lambda: roofline.of_training_layer(module, parents, children, channels, bench.batch, size, x.itemsize),
        training=True,
    )


@pytest.mark.parametrize("layer", ["stem", "block 0, 1x1"])
def bench_fused_conv2d(layer: str, bench: Bench) -> None:
    inputs, outputs, k = (3, 16, 3) if layer == "stem" else (16, 64, 1)
    weight = bench.normal(1, outputs, inputs, k, k)
    tensors = {"x": bench.normal(1, bench.batch, 32, 32, inputs), "weight": weight, "bias": bench.normal(1, outputs)}
    packed = tensors | {"weight": K.pack_weight(weight)}
    shape = f"{layer}: 1 x {bench.batch} x 32x32 x {inputs}>{outputs}, {k}x{k}/1, relu"

    def function(**given: Tensor) -> Tensor:
        return K.fused_conv2d(**given, padding=k // 2, activation="relu")

    def last(**given: Tensor) -> Tensor:
        return channels_last.fused_conv2d(**given, padding=k // 2, activation="relu")

    bench("forward", "fused_conv2d", function, packed, last, last_inputs=tensors, both_ways=False, shape=shape)


@pytest.mark.parametrize("layer", BOTTLENECKS)
def bench_fused_bottleneck(layer: str, bench: Bench) -> None:
    branches, r, size, inputs, middle, outputs, stride = BOTTLENECKS[layer]
    children = branches * r
    first = layer.endswith("first")

    def pointwise(channels: int, out_channels: int) -> Tensor:
        return bench.normal(children, out_channels, channels, 1, 1) / channels**0.5

    tensors = {
        "x": bench.normal(branches, bench.batch, size, size, inputs),
        "expand": pointwise(inputs, middle),
        "expand_bias": bench.normal(children, middle),
        "depthwise": bench.normal(children, 3, 3, middle) / 3,
        "depthwise_bias": bench.normal(children, middle),
        "project": pointwise(middle, outputs),
        "project_bias": bench.normal(children, outputs),
    }
    if first:
        tensors |= {"shortcut": pointwise(inputs, outputs), "shortcut_bias": bench.normal(children, outputs)}
    shape = (
        f"{layer}: {branches}>{children} x {bench.batch} x {size}x{size} x {inputs}>{middle}>{outputs}, 3x3/{stride}"
    )

    packed = {name: K.pack_weight(t) if name in ("expand", "project", "shortcut") else t for name, t in tensors.items()}
    options = {
        "stride": stride,
        "replicate": r,
        "activation": "relu",
        "identity": not first,
        "final_activation": "relu",
    }

    def function(**given: Tensor) -> Tensor:
        return K.fused_bottleneck(**given, **options)

    def last(**given: Tensor) -> Tensor:
        return channels_last.fused_bottleneck(**given, **options)

    bench("forward", "fused_bottleneck", function, packed, last, last_inputs=tensors, both_ways=False, shape=shape)


@ways
def bench_prefix_mean(way: str, head: Head, bench: Bench) -> None:
    models, batch, _, classes = head
    tensors = {"logits": bench.normal(models, batch, classes)}
    bench(way, "prefix_mean", K.prefix_mean, tensors, shape=f"{models} x {batch} x {classes}", images=batch)


@ways
def bench_prefix_logits(way: str, head: Head, bench: Bench) -> None:
    models, batch, channels, classes = head
    tensors = {
        "features": bench.normal(models, batch, channels),
        "weight": bench.normal(models, classes, channels),
        "bias": bench.normal(models, classes),
    }

    def function(**given: Tensor) -> Tensor:
        return K.prefix_logits(**given)[1]

    shape = f"{models} x {batch} x {channels}>{classes}"
    bench(way, "prefix_logits", function, tensors, shape=shape, images=batch)


def bench_hierarchical_distillation_loss(head: Head, bench: Bench) -> None:
    """Forward and backward together: the fused op computes the gradient in its forward pass."""
    models, batch, _, classes = head
    logits = bench.normal(models, batch, classes, dtype=torch.float32)
    target = bench.target(batch, classes)

    def both(wrap: Any) -> Side:
        call, ours = wrap(K.hierarchical_distillation_loss), logits.detach().requires_grad_()

        def side() -> tuple[Tensor, Tensor]:
            loss = call(ours, target)
            return loss.detach(), torch.autograd.grad(loss, ours)[0]

        return side

    bench.versus(
        both,
        both,
        name="hierarchical_distillation_loss both ways",
        shape=f"{models} x {batch} x {classes}",
        images=batch,
        dtype=torch.float32,
        work=lambda: roofline.Work(2 * logits.nbytes, 0),
    )
