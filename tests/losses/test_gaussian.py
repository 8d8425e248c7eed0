"""Objectives of a regression: Gaussians of the members, their likelihood and their divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from hne.data import TargetFormat
from hne.losses import OBJECTIVES, gaussian_divergence, gaussian_objective, gaussians
from hne.metrics import mixture, prefix_gaussians

pytestmark = pytest.mark.usefixtures("one_thread")
FORMAT = TargetFormat(50, 9)


def test_variances_are_positive() -> None:
    outputs = torch.tensor([[3.0, -1e4], [-2.0, 0.0], [0.0, 1e4]])
    mean, variance = gaussians(outputs)
    assert mean.tolist() == [3, -2, 0]
    assert variance.min() >= 1e-4
    assert variance.isfinite().all()
    assert gaussians(outputs.bfloat16())[1].dtype == torch.float32


def outputs_and_targets(rng: torch.Generator, members: int) -> tuple[Tensor, Tensor]:
    outputs = torch.randn(members, 6, 2, generator=rng, dtype=torch.float64)
    return outputs, 50 + 9 * torch.randn(6, generator=rng, dtype=torch.float64)


def test_likelihood(rng: torch.Generator) -> None:
    outputs, target = outputs_and_targets(rng, 3)
    mean, variance = gaussians(outputs)
    density = Normal(mean, variance.sqrt()).log_prob((target - 50) / 9)
    loss = gaussian_objective(FORMAT.normalise)(outputs, target)
    torch.testing.assert_close(loss, -density.mean(1).sum(), msg="sum over the leaves, mean over the batch")


@pytest.mark.parametrize("members", [1, 3, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name: str, members: int, rng: torch.Generator) -> None:
    """Each term is as eq. 9 to 12 say, with densities of ``torch.distributions``."""
    outputs, target = outputs_and_targets(rng, members)
    normal = (target - 50) / 9
    mean, variance = gaussians(outputs)

    def of_first(n: int) -> Normal:
        centre = mean[:n].mean(0)
        return Normal(centre, ((variance[:n] + mean[:n] ** 2).mean(0) - centre**2).sqrt())

    networks = [Normal(mean[i], variance[i].sqrt()) for i in range(members)]
    ensembles = [of_first(n) for n in {1: (1,), 3: (1, 2, 3), 8: (1, 2, 4, 8)}[members]]
    whole = ensembles[-1]

    def cross_entropy(p: Normal) -> Tensor:
        return kl_divergence(whole, p) + whole.entropy()

    terms = {
        "I": [-p.log_prob(normal) for p in networks],
        "H": [-p.log_prob(normal) for p in ensembles],
        "D": [cross_entropy(p) for p in networks],
        "HD": [cross_entropy(p) for p in ensembles[:-1]],
    }
    first, _, second = name.partition("+")
    expected = sum(term.mean() for term in terms[first])
    if second:
        expected = 0.3 * expected + 0.7 * sum(term.mean() for term in terms[second])
    loss = gaussian_objective(FORMAT.normalise, name, 0.7)(outputs, target)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["I", "H", "I+H"])
def test_gradient(name: str, rng: torch.Generator) -> None:
    outputs, target = outputs_and_targets(rng, 3)
    outputs.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: gaussian_objective(FORMAT.normalise, name)(y, target), outputs)


@pytest.mark.parametrize("name", ["I+D", "I+HD"])
def test_the_whole_ensemble_learns_nothing_from_itself(name: str, rng: torch.Generator) -> None:
    """Soft labels get no gradient: the gradient is that of the loss with the labels held constant."""
    outputs, target = outputs_and_targets(rng, 4)
    centre, spread = mixture(*gaussians(outputs))

    def with_constant_labels(y: Tensor) -> Tensor:
        models = gaussians(y) if name == "I+D" else prefix_gaussians(*gaussians(y), (1, 2))
        terms = [
            kl_divergence(Normal(centre, spread.sqrt()), Normal(m, v.sqrt())).mean()
            for m, v in zip(*models, strict=True)
        ]
        return torch.stack(terms).sum()

    loss = gaussian_objective(FORMAT.normalise, name, 1.0)
    expected = torch.func.grad(with_constant_labels)(outputs)
    torch.testing.assert_close(torch.func.grad(lambda y: loss(y, target))(outputs), expected)


def test_it_refuses(rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="objective must be one of I, H"):
        gaussian_objective(FORMAT.normalise, "HD")
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        gaussian_objective(FORMAT.normalise, "I+HD", 1.5)
    with pytest.raises(ValueError, match=r"outputs must be \[members, batch, 2\], got shape \(3, 6\)"):
        gaussian_objective(FORMAT.normalise)(torch.zeros(3, 6), torch.zeros(6))


def test_divergence(rng: torch.Generator) -> None:
    student, teacher = (torch.randn(3, 6, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    a, b = ((mean, variance.sqrt()) for mean, variance in (gaussians(teacher), gaussians(student)))
    expected = kl_divergence(Normal(*a), Normal(*b)).mean()
    torch.testing.assert_close(gaussian_divergence(gaussians(student), gaussians(teacher)), expected)
    assert gaussian_divergence(gaussians(student), gaussians(student)).abs() < 1e-12
