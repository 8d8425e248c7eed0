"""Properties of the ops for any shape, drawn by hypothesis: parity with the reference, and relations of results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import (
    Bottleneck,
    Geometry,
    bottleneck,
    cast,
    check,
    convolution,
    cotangents,
    evaluate,
    fused_convolution,
    loss,
    prefix_logits,
    prefix_mean,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from placements import Placement
from properties import property_test
from torch import Tensor

import hne_kernels as K


@pytest.fixture
def backend(backend: Placement) -> Placement:
    """Every backend that is fast enough for hundreds of shapes."""
    if backend.interpreted:
        pytest.skip("the interpreter takes minutes")
    return backend


ACTIVATIONS = st.sampled_from(["none", "relu", "relu6"])
CHANNELS = st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 65, 100]))
SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 12)


@st.composite
def geometries(draw: Any, *, depthwise: bool = False) -> Geometry:
    r = draw(st.integers(1, 4))
    k = draw(st.integers(1, 5))
    padding = draw(st.integers(0, 2))
    smallest = max(1, k - 2 * padding)
    channels = draw(CHANNELS)
    return Geometry(
        G=draw(st.integers(1, 4)),
        r=r,
        B=draw(st.integers(0, 3)),
        H=draw(st.integers(smallest, smallest + 10)),
        W=draw(st.integers(smallest, smallest + 10)),
        ci=channels,
        co=channels if depthwise else draw(CHANNELS),
        k=k,
        stride=draw(st.integers(1, 3)),
        padding=padding,
        missing=draw(st.integers(0, r - 1)),
    )


@st.composite
def bottlenecks(draw: Any) -> Bottleneck:
    join = draw(st.sampled_from(["nothing", "identity", "shortcut"]))
    r = draw(st.integers(1, 3))
    channels = draw(CHANNELS)
    return Bottleneck(
        G=draw(st.integers(1, 3)),
        r=r,
        B=draw(st.integers(0, 3)),
        H=draw(st.integers(1, 20)),
        W=draw(st.integers(1, 20)),
        ci=channels,
        middle=draw(CHANNELS),
        co=channels if join == "identity" else draw(CHANNELS),
        k=draw(st.sampled_from([1, 3, 5])),
        stride=1 if join == "identity" else draw(st.integers(1, 3)),
        join=join,
        activation=draw(ACTIVATIONS),
        final=draw(ACTIVATIONS),
        missing=draw(st.integers(0, r - 1)),
    )


def _agrees(case: Any, place: Placement, number: int) -> None:
    rng = torch.Generator().manual_seed(number)
    inputs = case.inputs(rng, place.dtype, place.device)
    grads = []
    if case.differentiable:
        grads = [grad.to(place.device, place.dtype) for grad in cotangents(case, cast(inputs, torch.float64), rng)]
    check(case, place.backend, inputs, evaluate(case, inputs, grads), grads)


# --- parity ------------------------------------------------------------------------------------------------


@property_test(40)
@given(geometry=geometries(), bias=st.booleans(), number=SEEDS)
def test_branch_conv2d(backend: Placement, geometry: Geometry, bias: bool, number: int) -> None:
    _agrees(convolution("branch_conv2d", geometry, bias), backend, number)


@property_test(40)
@given(geometry=geometries(depthwise=True), bias=st.booleans(), number=SEEDS)
def test_branch_depthwise_conv2d(backend: Placement, geometry: Geometry, bias: bool, number: int) -> None:
    _agrees(convolution("branch_depthwise_conv2d", geometry, bias), backend, number)


@property_test(30)
@given(geometry=geometries(), activation=ACTIVATIONS, residual_replicate=st.integers(0, 4), number=SEEDS)
def test_fused_conv2d(
    backend: Placement, geometry: Geometry, activation: str, residual_replicate: int, number: int
) -> None:
    _agrees(fused_convolution(geometry, activation, residual_replicate), backend, number)


@property_test(50)
@given(shape=bottlenecks(), number=SEEDS)
def test_fused_bottleneck(backend: Placement, shape: Bottleneck, number: int) -> None:
    _agrees(bottleneck(shape), backend, number)


@st.composite
def ensembles(draw: Any) -> tuple[int, tuple[int, ...] | None]:
    models = draw(st.integers(1, 20))
    chosen = draw(st.sets(st.integers(1, models), max_size=6))
    return models, tuple(sorted(chosen)) or None


@property_test(40)
@given(ensemble=ensembles(), batch=st.integers(0, 5), classes=CHANNELS, number=SEEDS)
def test_prefix_mean(backend: Placement, ensemble: tuple[int, Any], batch: int, classes: int, number: int) -> None:
    models, sizes = ensemble
    _agrees(prefix_mean(models, batch, classes, sizes), backend, number)


@property_test(40)
@given(
    ensemble=ensembles(), batch=st.integers(0, 5), channels=CHANNELS, classes=CHANNELS,
    bias=st.booleans(), number=SEEDS,
)  # fmt: skip
def test_prefix_logits(
    backend: Placement, ensemble: tuple[int, Any], batch: int, channels: int, classes: int,
    bias: bool, number: int,
) -> None:  # fmt: skip
    models, sizes = ensemble
    _agrees(prefix_logits(models, batch, channels, classes, sizes, bias), backend, number)


@property_test(60)
@given(
    models=st.integers(1, 20), batch=st.integers(1, 8), classes=CHANNELS,
    alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0]), temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]), number=SEEDS,
)  # fmt: skip
def test_loss(
    backend: Placement, models: int, batch: int, classes: int, alpha: float, temperature: float,
    scale: float, number: int,
) -> None:  # fmt: skip
    _agrees(loss(models, batch, classes, alpha, temperature, scale), backend, number)


# --- relations of results ----------------------------------------------------------------------------------

_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


def _convolution_inputs(g: Geometry, place: Placement, number: int) -> tuple[Tensor, Tensor, dict]:
    rng = torch.Generator().manual_seed(number)
    inputs = convolution("branch_conv2d", g, False).inputs(rng, place.dtype, place.device)
    options = {name: inputs[name] for name in ("stride", "padding", "replicate")}
    return inputs["x"], inputs["weight"], options


@pytest.mark.any_level
@property_test(25)
@given(geometry=geometries(), number=SEEDS, leaves=st.integers(1, 16))
def test_smaller_ensemble_is_a_leading_slice(backend: Placement, geometry: Geometry, number: int, leaves: int) -> None:
    """The first n branches of features and weights give the first n results."""
    x, weight, options = _convolution_inputs(geometry, backend, number)
    leaves = min(leaves, len(weight))
    parents = -(-leaves // geometry.r)
    whole = K.branch_conv2d(x, weight, **options)
    _close(K.branch_conv2d(x[:parents], weight[:leaves], **options), whole[:leaves])


@pytest.mark.any_level
@property_test(25)
@given(geometry=geometries(), number=SEEDS)
def test_replication_is_a_copy_that_is_not_made(backend: Placement, geometry: Geometry, number: int) -> None:
    x, weight, options = _convolution_inputs(geometry, backend, number)
    copied = x.repeat_interleave(geometry.r, 0)[: len(weight)]
    want = K.branch_conv2d(copied, weight, **{**options, "replicate": 1})
    _close(K.branch_conv2d(x, weight, **options), want)


@pytest.mark.any_level
@property_test(25)
@given(geometry=geometries(), number=SEEDS)
def test_images_do_not_see_each_other(backend: Placement, geometry: Geometry, number: int) -> None:
    assume(geometry.B > 1)
    x, weight, options = _convolution_inputs(geometry, backend, number)
    together = K.branch_conv2d(x, weight, **options)
    for i in range(geometry.B):
        _close(K.branch_conv2d(x[:, i : i + 1], weight, **options), together[:, i : i + 1])


@pytest.mark.any_level
@property_test(20)
@given(models=st.integers(1, 20), number=SEEDS)
def test_ensembles_in_between(backend: Placement, models: int, number: int) -> None:
    """All sizes together give the same as each size alone, and the mean of n follows from the mean of n - 1."""
    rng = torch.Generator().manual_seed(number)
    logits = torch.randn(models, 3, 7, generator=rng).to(backend.device)
    means = K.prefix_mean(logits, range(1, models + 1))
    for n in range(1, models + 1):
        _close(K.prefix_mean(logits, [n])[0], means[n - 1])
        if n > 1:
            _close(means[n - 1], (means[n - 2] * (n - 1) + logits[n - 1]) / n)


@pytest.mark.any_level
@property_test(30)
@given(models=st.integers(1, 17), classes=st.integers(1, 20), number=SEEDS)
def test_loss_looks_at_differences_of_logits(backend: Placement, models: int, classes: int, number: int) -> None:
    """Adding a number to all logits of a sample changes nothing, so that each row of the gradient sums to zero.

    The order of the classes does not matter.
    """
    rng = torch.Generator().manual_seed(number)
    logits = torch.randn(models, 4, classes, generator=rng).to(backend.device).requires_grad_()
    target = torch.randint(classes, (4,), generator=rng).to(backend.device)
    value = K.hierarchical_distillation_loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    _close(gradient.sum(-1), torch.zeros_like(gradient[..., 0]))
    shift = torch.randn(models, 4, 1, generator=rng).to(backend.device) * 10
    _close(K.hierarchical_distillation_loss(logits + shift, target), value)
    order = torch.randperm(classes, generator=rng).to(backend.device)
    shuffled = K.hierarchical_distillation_loss(logits[..., order], order.argsort()[target])
    _close(shuffled, value)


@pytest.mark.any_level
@property_test(30)
@given(alpha=st.floats(0, 1), models=st.integers(1, 9), number=SEEDS)
def test_loss_is_a_blend(backend: Placement, alpha: float, models: int, number: int) -> None:
    """(1 - alpha) L_I + alpha L_HD."""
    rng = torch.Generator().manual_seed(number)
    logits = torch.randn(models, 3, 5, generator=rng).to(backend.device)
    target = torch.randint(5, (3,), generator=rng).to(backend.device)
    ends = [K.hierarchical_distillation_loss(logits, target, alpha=end) for end in (0.0, 1.0)]
    blend = K.hierarchical_distillation_loss(logits, target, alpha=alpha)
    _close(blend, (1 - alpha) * ends[0] + alpha * ends[1])


@pytest.mark.any_level
@property_test(25)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), SIZES, SIZES, CHANNELS),
    shift=st.floats(-3, 3), factor=st.floats(0.5, 4), number=SEEDS,
)  # fmt: skip
def test_statistics_follow_scale_and_offset(
    backend: Placement, shape: tuple[int, ...], shift: float, factor: float, number: int
) -> None:
    """Statistics of a copying convolution; features normalised by them have the requested mean and deviation."""
    assume(shape[1] * shape[2] * shape[3] >= 4)
    rng = torch.Generator().manual_seed(number)
    x = torch.randn(shape, generator=rng).to(backend.device)
    weight, bias = (torch.randn(shape[0], shape[4], generator=rng).to(x) for _ in range(2))
    copying = torch.ones(shape[0], shape[4], 1, 1).to(x)
    y, mean, var = K.branch_norm_conv2d(x, copying)
    normal = K.branch_normalize(y, torch.stack([mean, weight * (var + 1e-12).rsqrt(), bias]))
    rows = normal.flatten(1, 3)
    _close(rows.mean(1), bias, rtol=1e-3, atol=1e-3)
    _close(rows.std(1, correction=0), weight.abs(), rtol=1e-3, atol=1e-3)
    _, mean2, var2 = K.branch_norm_conv2d(x * factor + shift, copying)
    _close(mean2, mean * factor + shift, rtol=1e-3, atol=1e-3)
    _close(var2, var * factor**2, rtol=1e-3, atol=1e-3)


@pytest.mark.any_level
@property_test(20)
@given(geometry=geometries(), number=SEEDS)
def test_the_three_convolutions_are_one_form(backend: Placement, geometry: Geometry, number: int) -> None:
    """sum(grad * conv(x, w)) equals the sums of x and w with their gradients."""
    x, weight, options = _convolution_inputs(geometry, backend, number)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = K.branch_conv2d(x, weight, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(number + 1)).to(y)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    form = (grad.double() * y.double()).sum()
    size = (grad.double() * y.double()).abs().sum() + 1
    for part in ((grad_x, x), (grad_weight, weight)):
        same = (part[0].double() * part[1].double()).sum()
        assert abs(same - form) <= 1e-4 * size
