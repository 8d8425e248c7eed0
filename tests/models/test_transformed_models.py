"""Forward-mode derivatives and transforms of torch.func of whole models, as those of the naive model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from networks import build, images
from torch import Tensor
from torch.autograd import forward_ad

import hne_kernels as K
from hne import HNE, FusedHNE

Function = Callable[[HNE, Tensor], Any]


@pytest.fixture
def model(rng: torch.Generator) -> FusedHNE:
    return build(FusedHNE, networks.TREES["odd"], rng)


def _sum(model: HNE, x: Tensor) -> Tensor:
    return model(x).square().sum()


FUNCTIONS: dict[str, Function] = {
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x.cos(),))[1],
    "jvp of prefix_logits": lambda model, x: torch.func.jvp(model.prefix_logits, (x,), (x.cos(),))[1],
    "jvp of anytime": lambda model, x: torch.func.jvp(lambda x: list(model.anytime(x))[2][1], (x,), (x.cos(),))[1],
    "linearize": lambda model, x: torch.func.linearize(model, x)[1](x.cos()),
    "grad": lambda model, x: torch.func.grad(lambda x: _sum(model, x))(x),
    "jacrev": lambda model, x: torch.func.jacrev(lambda x: model(x).sum((1, 2)))(x),
    "jacfwd": lambda model, x: torch.func.jacfwd(lambda x: model(x).sum((1, 2)))(x[..., :3, :3]),
    "hessian": lambda model, x: torch.func.hessian(lambda x: _sum(model, x))(x[..., :3, :3]),
    "vmap": lambda model, x: torch.func.vmap(model)(torch.stack([x, x.cos()])),
    "vmap of samples": lambda model, x: torch.func.vmap(lambda x: model(x[None]))(x),
    "gradients of samples": lambda model, x: torch.func.vmap(torch.func.grad(lambda x: _sum(model, x[None])))(x),
    "jvp of grad": lambda model, x: torch.func.jvp(torch.func.grad(lambda x: _sum(model, x)), (x,), (x.cos(),))[1],
    "functionalize": lambda model, x: torch.func.functionalize(model)(x),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_as_the_naive_model(function: Function, model: FusedHNE, grad: bool, rng: torch.Generator) -> None:
    x = images(rng)
    model(x)  # weights are folded and cached
    expected = function(model.to_naive(), x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(function(model, x), expected)
    with K.use_backend("reference"):
        torch.testing.assert_close(function(model, x), expected)


def test_a_tangent_of_a_weight(model: FusedHNE, grad: bool, rng: torch.Generator) -> None:
    x = images(rng)

    def slope(model: HNE, name: str) -> Tensor:
        weights = dict(model.named_parameters())
        with forward_ad.dual_level():
            weights[name] = forward_ad.make_dual(weights[name].detach(), torch.ones_like(weights[name]))
            return forward_ad.unpack_dual(torch.func.functional_call(model, weights, (x,))).tangent

    for name in ("blocks.0.0.unit.conv.weight", "blocks.1.0.depthwise.bn.weight", "head.conv.bias"):
        expected = slope(model.to_naive(), name)
        assert expected.abs().max() > 0
        torch.testing.assert_close(slope(model, name), expected)


def test_a_tangent_in_training(model: FusedHNE, rng: torch.Generator) -> None:
    """The statistics of the batch depend on the images, too; the running ones keep no tangent."""
    x = images(rng)
    twin = model.train().to_naive()

    def slope(model: HNE) -> Tensor:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent
            for buffer in model.buffers():
                assert forward_ad.unpack_dual(buffer).tangent is None
        return tangent

    expected = slope(twin)
    assert expected.abs().max() > 0
    torch.testing.assert_close(slope(model), expected)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_transforms_in_training(model: FusedHNE, rng: torch.Generator) -> None:
    """Running statistics change in place: a transform takes them as arguments, or refuses."""
    x = images(rng)
    model.train()
    with pytest.raises(RuntimeError, match="in-place operation"):
        torch.func.grad(lambda x: _sum(model, x))(x)

    def gradient(model: HNE) -> Tensor:
        def function(x: Tensor) -> Tensor:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return torch.func.functional_call(model, buffers, (x,)).square().sum()

        return torch.func.grad(function)(x)

    torch.testing.assert_close(gradient(model), gradient(model.to_naive()))


def test_a_chosen_backend_refuses(model: FusedHNE, grad: bool, rng: torch.Generator) -> None:
    x = images(rng)
    for function in (FUNCTIONS["jvp"], FUNCTIONS["vmap"]):
        with K.use_backend("cpp"), pytest.raises(RuntimeError, match=r"use_backend\(\"reference\"\)"):
            function(model, x)


def test_the_weights_stay_cached(model: FusedHNE, rng: torch.Generator) -> None:
    x = images(rng)
    with torch.no_grad():
        before, session = model(x), model.folded
        torch.func.jvp(model, (x,), (x,))
        assert model.folded is session
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
