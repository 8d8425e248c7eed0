"""The paper's objectives against their equations, written out member by member in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hne import OBJECTIVES, objective


def cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """Mean over the batch of ``- sum_c soft_c log softmax(logits)_c``."""
    log_probability = logits - logits.exp().sum(-1, keepdim=True).log()
    return -(soft * log_probability).sum(-1).mean()


def formula(name: str, logits: Tensor, target: Tensor, alpha: float, temperature: float) -> Tensor:
    """Equations 9 to 12 and their sums."""
    models, _, classes = logits.shape
    hard = torch.eye(classes, dtype=logits.dtype)[target]
    sizes = [2**b for b in range(models.bit_length()) if 2**b < models] + [models]
    ensembles = [sum(logits[:n]) / n for n in sizes]
    soft = (ensembles[-1].detach() / temperature).exp()
    soft = soft / soft.sum(-1, keepdim=True)
    l_i = sum(cross_entropy(leaf, hard) for leaf in logits)
    l_h = sum(cross_entropy(y, hard) for y in ensembles)
    l_d = temperature**2 * sum(cross_entropy(leaf / temperature, soft) for leaf in logits)
    l_hd = temperature**2 * sum(cross_entropy(y / temperature, soft) for y in ensembles[:-1])
    second = {"I+H": l_h, "I+D": l_d, "I+HD": l_hd}
    return {"I": l_i, "H": l_h}.get(name, (1 - alpha) * l_i + alpha * second.get(name, 0))


@pytest.mark.parametrize("models", [1, 2, 6, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient(name: str, models: int, rng: torch.Generator) -> None:
    logits = torch.randn(models, 5, 7, generator=rng, dtype=torch.float64).mul(3).requires_grad_()
    target = torch.randint(7, (5,), generator=rng)
    for alpha, temperature in ((0.3, 2.5), (0.0, 2.0), (1.0, 2.0)):
        loss = objective(name, alpha, temperature)(logits, target)
        expected = formula(name, logits, target, alpha, temperature)
        torch.testing.assert_close(loss, expected)
        gradient = torch.autograd.grad(loss, logits, materialize_grads=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits, materialize_grads=True))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_low_precision_is_computed_in_float32(name: str, rng: torch.Generator) -> None:
    logits = torch.randn(4, 3, 5, generator=rng).bfloat16()
    target = torch.randint(5, (3,), generator=rng)
    loss = objective(name)(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective(name)(logits.double(), target).float())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_large_logits_stay_finite(name: str) -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], requires_grad=True)
    loss = objective(name)(logits, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert math.isfinite(loss.item())
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("HD",), "objective must be one of I, H, I\\+H, I\\+D, I\\+HD, got 'HD'"),
        (("I", 1.5), "alpha must lie between 0 and 1, got 1.5"),
        (("I+HD", math.nan), "alpha must lie between 0 and 1, got nan"),
        (("I+HD", 0.5, 0.0), "temperature must be a positive number, got 0.0"),
        (("I+HD", 0.5, math.inf), "temperature must be a positive number, got inf"),
    ],
)
def test_bad_settings(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(*arguments)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bad_logits(name: str) -> None:
    with pytest.raises(ValueError, match=r"logits must be \[models, batch, classes\], got shape \(4, 3\)"):
        objective(name)(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
