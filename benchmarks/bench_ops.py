"""Every op at the layers of HNE-ResNet (Table 2): forwards, and backwards through the gradients of all inputs.

Naive is the reference: features copied for every child, one grouped convolution over the channels of all branches. Its
inputs already lie in memory as it wants them ([batch, branch * channel, height, width]), so that no change of layout is
counted against it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hne_kernels as K
from hne.fused import Fused
from hne.layers import Bottleneck
from hne.naive import Naive

BATCH = 32
MODELS, CHANNELS, CLASSES = 16, 256, 100

# layer: branches in, children each, size of the map, channels in and out, kernel, stride
CONVOLUTIONS = {
    "stem": (1, 1, 32, 3, 16, 3, 1),
    "block 1, expand": (1, 2, 32, 64, 16, 1, 1),
    "block 2, expand": (2, 2, 32, 64, 32, 1, 1),
    "block 2, project": (4, 1, 16, 32, 128, 1, 1),
    "block 3, shortcut": (4, 2, 16, 128, 256, 1, 2),
    "block 3, expand": (8, 1, 8, 256, 64, 1, 1),
    "block 4, expand": (8, 2, 8, 256, 64, 1, 1),
    "block 4, project": (16, 1, 8, 64, 256, 1, 1),
}
# layer: branches, size of the map, channels, stride
DEPTHWISE = {
    "block 1": (2, 32, 16, 1),
    "block 2, first": (4, 32, 32, 2),
    "block 2": (4, 16, 32, 1),
    "block 3, first": (8, 16, 64, 2),
    "block 4": (16, 8, 64, 1),
}
# layer: branches in, children each, size of the map, channels in, middle and out, stride
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


def _normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng)


def _side_by_side(x: Tensor) -> Tensor:
    """The same values of [G, B, H, W, C], in memory as [B, G * C, H, W]."""
    return x.permute(1, 0, 4, 2, 3).contiguous().permute(1, 0, 3, 4, 2)


def _as_naive_wants(inputs: Inputs) -> Inputs:
    return {name: _side_by_side(value) if name in ("x", "residual") else value for name, value in inputs.items()}


def _forward(versus: Any, function: Callable[..., Any], inputs: Inputs, **options: Any) -> None:
    native = _as_naive_wants(inputs)
    with torch.inference_mode():
        versus(lambda: function(**inputs), lambda: function(**native), **options)


def _backward(versus: Any, function: Callable[..., Any], inputs: Inputs, rng: torch.Generator, **options: Any) -> None:
    def side(tensors: Inputs, layout: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        # An image needs no gradient: that is how the stem is trained.
        inputs = {name: t.detach().requires_grad_(name != "x" or t.shape[-1] > 3) for name, t in tensors.items()}
        leaves = [value for value in inputs.values() if value.requires_grad]
        result = function(**inputs)
        result = result if isinstance(result, Tensor) else result[0]
        grad = cotangent if result.dim() < 5 else layout(cotangent)
        return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)

    with torch.no_grad():
        result = function(**inputs)
        cotangent = _normal(rng, *(result if isinstance(result, Tensor) else result[0]).shape)
    fused = side(inputs, lambda grad: grad)
    with K.use_backend("reference"):
        naive = side(_as_naive_wants(inputs), _side_by_side)
    versus(fused, naive, **options)


def _both_ways(
    versus: Any, way: str, op: str, function: Callable[..., Any], inputs: Inputs, rng: torch.Generator, **options: Any
) -> None:
    options = {"name": f"{op} {way}", "images": BATCH, **options}
    if way == "forward":
        _forward(versus, function, inputs, **options)
    else:
        _backward(versus, function, inputs, rng, **options)


ways = pytest.mark.parametrize("way", ["forward", "backward"])


@pytest.mark.parametrize("layer", CONVOLUTIONS)
@ways
def bench_branch_conv2d(layer: str, way: str, versus: Any, rng: torch.Generator) -> None:
    branches, r, size, inputs, outputs, k, stride = CONVOLUTIONS[layer]
    tensors = {
        "x": _normal(rng, branches, BATCH, size, size, inputs),
        "weight": _normal(rng, branches * r, outputs, inputs, k, k),
    }
    shape = f"{layer}: {branches}>{branches * r} x {BATCH} x {size}x{size} x {inputs}>{outputs}, {k}x{k}/{stride}"

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return K.branch_conv2d(x, weight, stride=stride, padding=k // 2, replicate=r)

    _both_ways(versus, way, "branch_conv2d", function, tensors, rng, shape=shape)


@pytest.mark.parametrize("layer", DEPTHWISE)
@ways
def bench_branch_depthwise_conv2d(layer: str, way: str, versus: Any, rng: torch.Generator) -> None:
    branches, size, channels, stride = DEPTHWISE[layer]
    tensors = {
        "x": _normal(rng, branches, BATCH, size, size, channels),
        "weight": _normal(rng, branches, channels, 3, 3),
    }
    shape = f"{layer}: {branches} x {BATCH} x {size}x{size} x {channels}, 3x3/{stride}"

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return K.branch_depthwise_conv2d(x, weight, stride=stride, padding=1)

    _both_ways(versus, way, "branch_depthwise_conv2d", function, tensors, rng, shape=shape)


@pytest.mark.parametrize("layer", BOTTLENECKS)
def bench_training_unit(layer: str, versus: Any, rng: torch.Generator) -> None:
    """A bottleneck forwards and backwards: convolutions that normalise what they read, against batch norm."""
    parents, r, size, channels, middle, outputs, stride = BOTTLENECKS[layer]
    branches = slice(0, parents * r)
    description = Bottleneck(outputs, middle, stride=stride)
    x = _normal(rng, parents, BATCH, size, size, channels)
    cotangent = _normal(rng, parents * r, BATCH, size // stride, size // stride, outputs)
    state = None

    def side(execution: Any, x: Tensor, cotangent: Tensor) -> Callable[[], Any]:
        nonlocal state
        module = description.build(channels, parents * r, r).train()
        state = state or copy.deepcopy(module.state_dict())
        module.load_state_dict(state)
        leaves = [x.detach().requires_grad_(), *module.parameters()]

        def step() -> Any:
            grad_x, *rest = torch.autograd.grad(execution.layer(module, leaves[0], branches, r), leaves, cotangent)
            return grad_x if grad_x.dim() == 5 else grad_x.unflatten(1, (parents, -1)).permute(1, 0, 3, 4, 2), *rest

        return step

    def interleaved(x: Tensor) -> Tensor:
        return x.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous()

    versus(
        side(Fused(), x, cotangent),
        side(Naive(), interleaved(x), interleaved(cotangent)),
        name="training unit",
        images=BATCH,
        shape=f"{layer}: {parents}>{parents * r} x {BATCH} x {size}x{size} x {channels}>{middle}>{outputs}, /{stride}",
    )


@pytest.mark.parametrize("layer", ["stem", "block 0, 1x1"])
def bench_fused_conv2d(layer: str, versus: Any, rng: torch.Generator) -> None:
    inputs, outputs, k = (3, 16, 3) if layer == "stem" else (16, 64, 1)
    weight = K.pack_weight(_normal(rng, 1, outputs, inputs, k, k))
    tensors = {"x": _normal(rng, 1, BATCH, 32, 32, inputs), "bias": _normal(rng, 1, outputs)}
    shape = f"{layer}: 1 x {BATCH} x 32x32 x {inputs}>{outputs}, {k}x{k}/1, relu"

    def function(x: Tensor, bias: Tensor) -> Tensor:
        return K.fused_conv2d(x, weight, bias, padding=k // 2, activation="relu")

    _forward(versus, function, tensors, name="fused_conv2d", images=BATCH, shape=shape)


@pytest.mark.parametrize("layer", BOTTLENECKS)
def bench_fused_bottleneck(layer: str, versus: Any, rng: torch.Generator) -> None:
    branches, r, size, inputs, middle, outputs, stride = BOTTLENECKS[layer]
    children = branches * r
    first = layer.endswith("first")

    def pointwise(channels: int, out_channels: int) -> Tensor:
        return K.pack_weight(_normal(rng, children, out_channels, channels, 1, 1) / channels**0.5)

    tensors = {
        "x": _normal(rng, branches, BATCH, size, size, inputs),
        "expand": pointwise(inputs, middle),
        "expand_bias": _normal(rng, children, middle),
        "depthwise": _normal(rng, children, 3, 3, middle) / 3,
        "depthwise_bias": _normal(rng, children, middle),
        "project": pointwise(middle, outputs),
        "project_bias": _normal(rng, children, outputs),
    }
    if first:
        tensors |= {"shortcut": pointwise(inputs, outputs), "shortcut_bias": _normal(rng, children, outputs)}
    shape = f"{layer}: {branches}>{children} x {BATCH} x {size}x{size} x {inputs}>{middle}>{outputs}, 3x3/{stride}"

    def function(**given: Tensor) -> Tensor:
        return K.fused_bottleneck(
            **given, stride=stride, replicate=r, activation="relu", identity=not first, final_activation="relu"
        )

    _forward(versus, function, tensors, name="fused_bottleneck", images=BATCH, shape=shape)


@ways
def bench_prefix_mean(way: str, versus: Any, rng: torch.Generator) -> None:
    tensors = {"logits": _normal(rng, MODELS, BATCH, CLASSES)}
    shape = f"{MODELS} x {BATCH} x {CLASSES}"
    _both_ways(versus, way, "prefix_mean", K.prefix_mean, tensors, rng, shape=shape)


@ways
def bench_prefix_logits(way: str, versus: Any, rng: torch.Generator) -> None:
    tensors = {
        "features": _normal(rng, MODELS, BATCH, CHANNELS),
        "weight": _normal(rng, MODELS, CLASSES, CHANNELS),
        "bias": _normal(rng, MODELS, CLASSES),
    }

    def function(**given: Tensor) -> Tensor:
        return K.prefix_logits(**given)[1]

    shape = f"{MODELS} x {BATCH} x {CHANNELS}>{CLASSES}"
    _both_ways(versus, way, "prefix_logits", function, tensors, rng, shape=shape)


def bench_hierarchical_distillation_loss(versus: Any, rng: torch.Generator) -> None:
    """Both ways at once: the fused op has the gradient ready after its forward pass."""
    logits = _normal(rng, MODELS, BATCH, CLASSES).requires_grad_()
    target = torch.randint(CLASSES, (BATCH,), generator=rng)

    def both() -> tuple[Tensor, Tensor]:
        loss = K.hierarchical_distillation_loss(logits, target)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    versus(
        both,
        both,
        name="hierarchical_distillation_loss both ways",
        shape=f"{MODELS} x {BATCH} x {CLASSES}",
        images=BATCH,
    )
