"""Winograd's convolution on the CPU: dense 3x3 kernels with stride 1, many channels and enough pixels."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Geometry, cast, check, convolution, cotangents, evaluate, norm_conv
from random_layers import random_convolution
from torch import Tensor

import hne_kernels as K

# At least 32 channels and 64 tiles of 2x2 pixels. Together: odd sizes, all paddings, channels that no vector width and
# no panel divides, several blocks of input channels and groups of output channels, families that lack a child.
GEOMETRIES = [
    Geometry(1, 1, 3, 13, 11, 40, 72, 3, 1, 1),
    Geometry(2, 2, 3, 12, 12, 33, 150, 3, 1, 0, missing=1),
    Geometry(1, 3, 3, 8, 9, 130, 36, 3, 1, 2, missing=1),
    Geometry(3, 1, 17, 3, 4, 48, 40, 3, 1, 1),
    Geometry(1, 2, 1, 21, 23, 32, 161, 3, 1, 1),
    Geometry(5, 1, 16, 4, 4, 64, 64, 3, 1, 1),
]
CASES = [
    *(convolution("branch_conv2d", g, bool(i % 2)) for i, g in enumerate(GEOMETRIES)),
    *(norm_conv(g, ("relu", "relu6", "none", None)[i % 4]) for i, g in enumerate(GEOMETRIES)),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=lambda dtype: f"cpp-{str(dtype).removeprefix('torch.')}")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if "cpp" not in K.available_backends():
        pytest.skip("the library is not built")
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case: Case, dtype: torch.dtype, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, dtype)
    grads = [grad.to(dtype) for grad in cotangents(case, cast(inputs, torch.float64), rng)]
    with K.use_backend("cpp"):
        actual = evaluate(case, inputs, grads)
    check(case, "cpp", inputs, actual, grads)


def _block(rng: torch.Generator, g: Geometry) -> list[K.FusedLayer]:
    """A convolution, and one that adds its output: a thread takes small feature maps through both."""
    first = random_convolution(rng, g.branches, g.ci, g.co, 3)._replace(padding=g.padding, replicate=g.r)
    second = random_convolution(rng, g.branches, g.co, g.co, 3)._replace(padding=1)
    third = random_convolution(rng, g.branches, g.co, g.co, 3)._replace(padding=1)
    first, second = first._replace(activation="relu"), second._replace(activation="relu")
    return [first, second, third._replace(residual=-2, activation="relu6")]


def _to(layer: K.FusedLayer, dtype: torch.dtype) -> K.FusedLayer:
    return layer._replace(weights=tuple(None if weight is None else weight.to(dtype) for weight in layer.weights))


def _largest_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("g", GEOMETRIES, ids=str)
def test_fused_layers(g: Geometry, dtype: torch.dtype, threads: int, rng: torch.Generator) -> None:
    layers = [_to(layer, dtype) for layer in _block(rng, g)]
    x = torch.randn(g.G, g.B, g.H, g.W, g.ci, generator=rng, dtype=torch.float64).to(dtype)
    with K.use_backend("reference"):
        want = x.double()
        outputs = [want]
        for layer in layers:
            want = _to(layer, torch.float64)(want, None if layer.residual is None else outputs[layer.residual])
            outputs.append(want)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (together,) = K.FusedLayers(layers)(x)  # computes the second and the third at once
        *_, apart = K.FusedLayers(layers, keep=[0, 1])(x)
    finally:
        torch.set_num_threads(before)
    # A result in bfloat16 is rounded once; the library computes in float32.
    allowed = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 2**-8}[dtype]
    assert _largest_error(together, want) < allowed
    assert _largest_error(apart, want) < allowed


def test_smaller_ensembles_share_filters(rng: torch.Generator) -> None:
    """Sequences with some of the branches, and later ones with changed weights, compute with their own filters."""
    g = GEOMETRIES[5]
    (layer, *_) = (_to(layer, torch.float32) for layer in _block(rng, g))
    x = torch.randn(g.G, g.B, g.H, g.W, g.ci, generator=rng)
    whole = K.FusedLayers([layer])
    (want,) = whole(x)
    for n in (1, 3):
        (got,) = K.FusedLayers([layer.select_branches(slice(0, n), 1)])(x[:n])
        assert torch.equal(got, want[:n])
    weight, bias = layer.weights
    assert weight is not None
    assert bias is not None
    weight[2] *= 2
    (changed,) = K.FusedLayers([layer])(x)
    with K.use_backend("reference"):
        right = layer(x)
    torch.testing.assert_close(changed, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed[3:], want[3:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float, dtype: torch.dtype, rng: torch.Generator) -> None:
    """A value that is not finite shows in every output that reads it; it may show in the rest of their 2x2 tiles."""
    g = GEOMETRIES[0]
    layers = [_to(layer, dtype) for layer in _block(rng, g)[:1]]
    x = torch.randn(g.G, g.B, g.H, g.W, g.ci, generator=rng).to(dtype)
    x[0, 1, 6, 5, 7] = value
    layers[0] = layers[0]._replace(activation="none")
    (y,) = K.FusedLayers(layers)(x)
    reached = torch.zeros(g.B, g.H, g.W, dtype=torch.bool)
    reached[1, 5:8, 4:7] = True
    wrong = ~y[0].isfinite().all(-1)
    assert wrong[reached].all()
    tiles = torch.zeros_like(reached)
    tiles[1, 4:8, 4:8] = True
    assert not wrong[~tiles].any()
