"""The objectives as modules: values, gradients, settings, and a training loop of plain PyTorch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import property_test
from test_losses import formula
from torch import nn

from hne.losses import (
    HierarchicalDistillationLoss,
    HierarchicalLoss,
    HydraLoss,
    IndependentLoss,
    average_teacher,
    hydra_loss,
)


@property_test(60)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(2, 7),
    st.floats(0, 1),
    st.floats(0.5, 5),
    st.integers(0, 2**32),
)
def test_values_and_gradients(
    models: int, batch: int, classes: int, alpha: float, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(models, batch, classes, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(classes, (batch,), generator=generator)
    for name, module in (
        ("I", IndependentLoss()),
        ("H", HierarchicalLoss()),
        ("I+HD", HierarchicalDistillationLoss(alpha, temperature)),
    ):
        loss, expected = module(logits, target), formula(name, logits, target, alpha, temperature)
        torch.testing.assert_close(loss, expected)
        gradients = (torch.autograd.grad(x, logits, materialize_grads=True)[0] for x in (loss, expected))
        torch.testing.assert_close(*gradients)


def test_hydra(rng: torch.Generator) -> None:
    heads, members = (torch.randn(3, 5, 7, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss = HydraLoss(temperature=2.5)
    torch.testing.assert_close(loss(heads, members), hydra_loss(heads, members, 2.5))
    torch.testing.assert_close(loss(heads[:1], members), hydra_loss(heads[:1], average_teacher(members, 2.5), 2.5))
    loss(heads, members).backward()
    assert heads.grad is not None
    assert members.grad is None, "the teacher is not trained"
    with pytest.raises(ValueError, match=r"teacher must have the shape of logits, \(3, 5, 7\), got \(2, 5, 7\)"):
        loss(heads, members[:2])
    with pytest.raises(ValueError, match=r"teacher must have the shape of logits, \(1, 5, 7\), got \(5, 7\)"):
        loss(heads[:1], members[0])


@pytest.mark.parametrize("kind", [IndependentLoss, HierarchicalLoss, HierarchicalDistillationLoss, HydraLoss])
def test_modules_are_ordinary_ones(kind: type[nn.Module], rng: torch.Generator) -> None:
    module = kind()
    logits = torch.randn(4, 3, 5, generator=rng).bfloat16()
    target: Any = torch.randint(5, (3,), generator=rng)
    if kind is HydraLoss:
        target = torch.randn(4, 3, 5, generator=rng).bfloat16()
    loss = module(logits, target)
    assert loss.dtype == torch.float32
    assert module.state_dict() == {}
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(logits, target), loss)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), loss)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(logits, target), loss)


def test_settings() -> None:
    loss = HierarchicalDistillationLoss()
    assert (loss.alpha, loss.temperature) == (0.5, 2)
    assert repr(loss) == "HierarchicalDistillationLoss(alpha=0.5, temperature=2)"
    assert repr(HydraLoss(3)) == "HydraLoss(temperature=3)"
    with pytest.raises(ValueError, match=r"alpha must lie between 0 and 1, got 1\.5"):
        HierarchicalDistillationLoss(alpha=1.5)
    for kind in (HierarchicalDistillationLoss, HydraLoss):
        with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
            kind(temperature=0)


def test_bad_calls() -> None:
    loss = HierarchicalDistillationLoss()
    with pytest.raises(ValueError, match=r"logits must be \[models, batch, classes\], got shape \(4, 3\)"):
        loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="class indices from 0 to 2, got 3"):
        loss(torch.zeros(2, 1, 3), torch.tensor([3]))
    with pytest.raises(TypeError, match=r"target: expected class indices of dtype torch\.int64"):
        loss(torch.zeros(2, 1, 3), torch.zeros(1))


def test_any_networks_train(rng: torch.Generator) -> None:
    """The loss takes stacked logits of any modules, not only of an HNE."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    centres = 3 * torch.randn(3, 6, generator=rng)
    target = torch.arange(30) % 3
    x = centres[target] + torch.randn(30, 6, generator=rng)
    members = nn.ModuleList(nn.Linear(6, 3) for _ in range(4))
    optimizer = torch.optim.SGD(members.parameters(), lr=0.05)
    criterion = HierarchicalDistillationLoss(alpha=0.5)
    losses = []
    for _ in range(50):
        loss = criterion(torch.stack([member(x) for member in members]), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
