"""Forward-mode derivatives and the transforms of torch.func: right by the reference, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import STATE, TRAINING_OPS, Case, representative
from torch import Tensor
from torch.autograd import forward_ad

import hne_kernels as K

pytestmark = pytest.mark.usefixtures("one_thread")

DIFFERENTIABLE = representative(differentiable=True)
each_case = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.label)


def _function(case: Case, rng: torch.Generator) -> tuple[Any, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The sum of squares of an op's results as a function of its differentiable inputs, these, and tangents."""
    inputs = case.inputs(rng, torch.float64)
    inputs |= {name: None for name in STATE if name in inputs}  # vmap does not write to tensors that it does not batch
    names = case.differentiable

    def function(*values: Tensor) -> Tensor:
        return sum(result.square().sum() for result in case({**inputs, **dict(zip(names, values, strict=True))}))

    values = tuple(inputs[name] for name in names)
    tangents = tuple(torch.randn(value.shape, generator=rng, dtype=torch.float64) for value in values)
    return function, values, tangents


def _slope(function: Any, values: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """The derivative along the tangents, by the gradient of the kernels in reverse mode."""
    leaves = [value.clone().requires_grad_() for value in values]
    grads = torch.autograd.grad(function(*leaves), leaves)
    return sum(((grad * tangent).sum() for grad, tangent in zip(grads, tangents, strict=True)), torch.zeros(()))


@each_case
def test_jvp(case: Case, rng: torch.Generator) -> None:
    function, values, tangents = _function(case, rng)
    slope = _slope(function, values, tangents)
    assert slope != 0
    torch.testing.assert_close(torch.func.jvp(function, values, tangents)[1], slope)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(function, values, tangents)[1], slope)


@each_case
def test_dual_numbers(case: Case, rng: torch.Generator) -> None:
    """Any one of the inputs has a tangent, for example a weight."""
    function, values, tangents = _function(case, rng)
    for index, (value, tangent) in enumerate(zip(values, tangents, strict=True)):
        others = tuple(torch.zeros_like(t) if i != index else t for i, t in enumerate(tangents))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(value, tangent)
            result = function(*(dual if i == index else v for i, v in enumerate(values)))
            got = forward_ad.unpack_dual(result).tangent
        torch.testing.assert_close(got, _slope(function, values, others))


@each_case
def test_grad_and_vmap(case: Case, rng: torch.Generator) -> None:
    function, values, tangents = _function(case, rng)
    where = tuple(range(len(values)))
    leaves = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(function(*leaves), leaves)
    for one, other in zip(torch.func.grad(function, where)(*values), expected, strict=True):
        torch.testing.assert_close(one, other)
    pairs = tuple(torch.stack([value, value + tangent]) for value, tangent in zip(values, tangents, strict=True))
    batched = torch.func.vmap(torch.func.grad(function, where))(*pairs)
    for one, other in zip(batched, expected, strict=True):
        torch.testing.assert_close(one[0], other)
    values = torch.func.vmap(function)(*pairs)
    torch.testing.assert_close(values, torch.stack([function(*(pair[i] for pair in pairs)) for i in range(2)]))


@pytest.mark.parametrize("case", [c for c in DIFFERENTIABLE if c.op in TRAINING_OPS], ids=lambda case: case.label)
def test_second_derivatives_of_training_ops(case: Case, rng: torch.Generator) -> None:
    """By the transforms they exist, since the reference computes them."""
    function, values, tangents = _function(case, rng)
    where = tuple(range(len(values)))
    with K.use_backend("reference"):
        leaves = [value.clone().requires_grad_() for value in values]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        along = sum((grad * tangent).sum() for grad, tangent in zip(first, tangents, strict=True))
        expected = torch.autograd.grad(along, leaves)
    got = torch.func.jvp(torch.func.grad(function, where), values, tangents)[1]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


INFERENCE = [case for case in representative() if case.op in ("fused_conv2d", "fused_bottleneck", "FusedLayers")]


@pytest.mark.parametrize("case", INFERENCE, ids=lambda case: case.label)
def test_inference_ops_keep_tangents(case: Case, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64)
    x = inputs["x"]
    tangent = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        got = torch.func.jvp(lambda x: case({**inputs, "x": x})[-1], (x,), (tangent,))[1]
        plus, minus = (case({**inputs, "x": x + step * tangent})[-1] for step in (1e-7, -1e-7))
    smooth = (plus != 0) & (plus - minus != 0)  # away from where an activation is flat
    assert smooth.any()
    close = torch.isclose(got, (plus - minus) / 2e-7, rtol=1e-4, atol=1e-6)
    assert close[smooth].double().mean() > 0.97  # but for values whose activation bends within the step


@pytest.mark.parametrize("case", INFERENCE, ids=lambda case: case.label)
def test_inference_ops_under_vmap(case: Case, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64)
    pair = torch.stack([inputs["x"], 2 * inputs["x"]])
    with torch.no_grad():
        got = torch.func.vmap(lambda x: case({**inputs, "x": x})[-1])(pair)
        expected = torch.stack([case({**inputs, "x": x})[-1] for x in pair])
    torch.testing.assert_close(got, expected)


def test_a_chosen_backend_says_what_it_cannot_do(rng: torch.Generator) -> None:
    x, weight = torch.randn(1, 2, 3, 3, 2, generator=rng), torch.randn(1, 4, 2, 1, 1, generator=rng)
    message = r"backend 'cpp' cannot serve this call: torch.func .* hne_kernels.use_backend\(\"reference\"\)"
    with K.use_backend("cpp"):
        with pytest.raises(RuntimeError, match=message):
            torch.func.jvp(lambda x: K.branch_conv2d(x, weight), (x,), (x,))
        with pytest.raises(RuntimeError, match=message):
            torch.func.vmap(lambda x: K.prefix_mean(x[0, 0]))(x[None])


@pytest.fixture
def raw(rng: torch.Generator) -> dict[str, Any]:
    """Calls of torch.ops.hne without the public functions, by name, as functions of their first tensor."""
    ops = torch.ops.hne
    weight, bias = torch.randn(1, 5, 3, 1, 1, generator=rng), torch.zeros(1, 5)
    packed = K.pack_weight(weight)
    layers = K.FusedLayers([K.FusedLayer((packed, bias))])
    norm = torch.ones(3, 1, 3)
    return {
        "branch_conv2d": lambda x: ops.branch_conv2d(x, weight, None, 1, 0, 1),
        "branch_conv2d_backward_weight": lambda x: ops.branch_conv2d_backward_weight(x, x, 1, 1, 0, 1),
        "branch_norm_conv2d": lambda x: ops.branch_norm_conv2d(x, weight, None, None, None, "none", 1, 0, 1, False)[0],
        "branch_normalize": lambda x: ops.branch_normalize(x, norm, None, None, "none"),
        "branch_pointwise_stats": lambda x: ops.branch_pointwise_stats(x, weight, norm, "none")[0],
        "prefix_mean": lambda x: ops.prefix_mean(x[0, 0], [1]),
        "fused_conv2d": lambda x: ops.fused_conv2d(x, packed, bias, 1, 0, 1, "none"),
        "fused_layers": lambda x: (layers, ops.fused_layers(x, layers._prepared)[0])[1],
    }


def test_raw_ops_refuse_what_they_cannot_differentiate(raw: dict[str, Any], rng: torch.Generator) -> None:
    x = torch.randn(1, 2, 3, 3, 3, generator=rng)
    for op, call in raw.items():
        advice = r"are not implemented; use the reference backend, with hne_kernels.use_backend\(\"reference\"\)"
        with pytest.raises(RuntimeError, match=f"^{op}: forward-mode derivatives {advice}"):
            torch.func.jvp(call, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"^{op}: forward-mode derivatives {advice}"):
            call(forward_ad.make_dual(x, x))
        with pytest.raises(RuntimeError, match=f"^{op}: derivatives by torch.func {advice}"):
            torch.func.grad(lambda x, call=call: call(x).sum())(x)
        with forward_ad.dual_level():  # without a tangent nothing is lost
            torch.testing.assert_close(call(x), call(x))


def test_raw_inference_ops_refuse_a_gradient(raw: dict[str, Any], rng: torch.Generator) -> None:
    x = torch.randn(1, 2, 3, 3, 3, generator=rng, requires_grad=True)
    for op in ("fused_conv2d", "fused_layers"):
        y = raw[op](x)
        torch.testing.assert_close(y.detach(), raw[op](x.detach()))
        with pytest.raises(RuntimeError, match=f"^{op} is for inference and has no gradient"):
            y.sum().backward()


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobian(strategy: str, rng: torch.Generator) -> None:
    x, weight = torch.randn(1, 2, 3, 3, 2, generator=rng), torch.randn(1, 4, 2, 1, 1, generator=rng)

    def function(x: Tensor) -> Tensor:
        return K.branch_conv2d(x, weight).square().sum((0, 1))

    expected = torch.autograd.functional.jacobian(function, x)
    got = torch.autograd.functional.jacobian(function, x, vectorize=True, strategy=strategy)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap"])
def test_transforms_inside_of_compiled_programs(transform: str, rng: torch.Generator) -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(1, 2, 3, 3, 2, generator=rng), torch.randn(1, 4, 2, 1, 1, generator=rng)

    def square(x: Tensor) -> Tensor:
        return K.branch_conv2d(x, weight).square().sum()

    def function(x: Tensor) -> Tensor:
        if transform == "jvp":
            return torch.func.jvp(square, (x,), (x,))[1]
        return torch.func.grad(square)(x) if transform == "grad" else torch.func.vmap(square)(x[None])

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, function(x))
