"""Objectives of a regression: Gaussians of the members, their likelihood and their divergence."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from hne.data import TargetFormat
from hne.losses import gaussian_divergence, gaussians, likelihood_objective

pytestmark = pytest.mark.usefixtures("one_thread")


def test_variances_are_positive() -> None:
    outputs = torch.tensor([[3.0, -1e4], [-2.0, 0.0], [0.0, 1e4]])
    mean, variance = gaussians(outputs)
    assert mean.tolist() == [3, -2, 0]
    assert variance.min() >= 1e-4
    assert variance.isfinite().all()
    assert gaussians(outputs.bfloat16())[1].dtype == torch.float32


def test_likelihood(rng: torch.Generator) -> None:
    outputs = torch.randn(3, 6, 2, generator=rng, dtype=torch.float64).requires_grad_()
    target = 50 + 9 * torch.randn(6, generator=rng, dtype=torch.float64)
    mean, variance = gaussians(outputs)
    density = Normal(mean, variance.sqrt()).log_prob((target - 50) / 9)
    loss = likelihood_objective(TargetFormat(50, 9).normalise)(outputs, target)
    torch.testing.assert_close(loss, -density.mean(1).sum(), msg="sum over the leaves, mean over the batch")
    assert torch.autograd.gradcheck(lambda y: likelihood_objective(TargetFormat(50, 9).normalise)(y, target), outputs)


def test_divergence(rng: torch.Generator) -> None:
    student, teacher = (torch.randn(3, 6, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    a, b = ((mean, variance.sqrt()) for mean, variance in (gaussians(teacher), gaussians(student)))
    expected = kl_divergence(Normal(*a), Normal(*b)).mean()
    torch.testing.assert_close(gaussian_divergence(gaussians(student), gaussians(teacher)), expected)
    assert gaussian_divergence(gaussians(student), gaussians(student)).abs() < 1e-12
