"""Activations that are computed again or stored elsewhere: each gradient reads its saved tensors once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import small_size
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hne import HNE, PRESETS, FusedHNE

SMALL = {name: {"width": 0.25, "num_models": 2} for name in PRESETS}


def _model(preset: str) -> FusedHNE:
    torch.manual_seed(0)
    return FusedHNE.from_preset(preset, num_classes=3, **SMALL[preset]).double().train()


def _images(model: HNE, preset: str, rng: torch.Generator) -> Tensor:
    # So large that batch norm sees more than a few values: with four its gradient lost nine digits of sixteen.
    size = small_size(preset)
    return torch.randn(8, model.in_channels, size, size, generator=rng, dtype=torch.float64)


def _selective(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = str(op).startswith("hne.branch_norm_conv2d") or "convolution" in str(op)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _within(context: Callable[[], Any], model: HNE, x: Tensor) -> Tensor:
    with context():
        return model(x)


def _once() -> Any:
    """Hooks that fail when a tensor is unpacked a second time."""

    def unpack(box: list[Tensor]) -> Tensor:
        return box.pop()

    return saved_tensors_hooks(lambda tensor: [tensor], unpack)


RUNS: dict[str, Callable[[HNE, Tensor], Tensor]] = {
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "selective": lambda model, x: checkpoint(
        model, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _selective)
    ),
    "save_on_cpu": lambda model, x: _within(save_on_cpu, model, x),
    "hooks": lambda model, x: _within(_once, model, x),
}
TWICE = {"not reentrant", "reentrant", "selective"}  # the forward pass runs twice, and updates running statistics twice


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("preset", PRESETS)
def test_same_gradients(preset: str, run: str, rng: torch.Generator) -> None:
    model = _model(preset)
    plain, naive = copy.deepcopy(model), model.to_naive()
    x = _images(model, preset, rng)
    grads = []
    for one, forward in ((plain, lambda m, x: m(x)), (model, RUNS[run]), (naive, RUNS[run])):
        images = x.clone().requires_grad_()
        forward(one, images).square().sum().backward()
        grads.append([images.grad, *(parameter.grad for parameter in one.parameters())])
    for others in grads[1:]:
        for expected, got in zip(grads[0], others, strict=True):
            torch.testing.assert_close(got, expected)
    if run in TWICE:
        plain(x)
    for expected, got, of_naive in zip(plain.buffers(), model.buffers(), naive.buffers(), strict=True):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(of_naive, expected)


def test_backward_twice(rng: torch.Generator) -> None:
    model = _model("hne_tiny")
    loss = model(_images(model, "hne_tiny", rng)).square().sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for parameter, grad in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * grad)


def test_images_without_a_gradient(rng: torch.Generator) -> None:
    """In eval mode, where gradients come from the unfused ops."""
    model = _model("hne_tiny").eval()
    x = _images(model, "hne_tiny", rng)
    model(x).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    checkpoint(lambda: model(x), use_reentrant=False).square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
