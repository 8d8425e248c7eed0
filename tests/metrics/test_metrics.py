"""Every metric against an independent implementation: loops in double precision, scikit-learn."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from hne.metrics import (
    LEVELS,
    accuracy,
    brier_score,
    calibration_gaps,
    correct,
    coverage_counts,
    coverage_error,
    detection,
    disagreement,
    diversity,
    energy,
    expected_calibration_error,
    gaussian_nll,
    max_logit,
    max_probability,
    mixture,
    mutual_information,
    negative_log_likelihood,
    predictive_entropy,
    root_mean_squared_error,
)


@pytest.fixture
def logits(rng: torch.Generator) -> Tensor:
    """Logits of five members on seven samples of four classes, some of them confident."""
    return 3 * torch.randn(5, 7, 4, generator=rng)


@pytest.fixture
def target(rng: torch.Generator) -> Tensor:
    return torch.randint(4, (7,), generator=rng)


def softmax(logits: Tensor) -> np.ndarray:
    exponentials = np.exp(logits.double().numpy())
    return exponentials / exponentials.sum(-1, keepdims=True)


def entropy(probabilities: np.ndarray) -> float:
    return -sum(p * math.log(p) for p in probabilities)


# Ensembles ----------------------------------------------------------------------------------------------------------


def test_accuracy_of_each_ensemble() -> None:
    logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [5.0, 4.0]], [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    target = torch.tensor([0, 1, 0])
    assert correct(logits, target).tolist() == [3, 1]
    assert accuracy(logits, target).tolist() == pytest.approx([1, 1 / 3])


def test_negative_log_likelihood(logits: Tensor, target: Tensor) -> None:
    expected = [sklearn.metrics.log_loss(target, row, labels=range(4)) for row in softmax(logits)]
    assert negative_log_likelihood(logits, target).tolist() == pytest.approx(expected, rel=1e-5)


def test_brier_score(logits: Tensor, target: Tensor) -> None:
    expected = [
        statistics.mean(
            sum((p - (label == k)) ** 2 for k, p in enumerate(sample))
            for sample, label in zip(row, target.tolist(), strict=True)
        )
        for row in softmax(logits)
    ]
    assert brier_score(logits, target).tolist() == pytest.approx(expected, rel=1e-5)
    sure = torch.tensor([[[100.0, 0.0], [100.0, 0.0]]])
    assert brier_score(sure, torch.tensor([0, 1])).tolist() == [1], "0 where it is right, 2 where it is wrong"


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error(bins: int, rng: torch.Generator) -> None:
    logits, target = torch.randn(3, 500, 4, generator=rng).double(), torch.randint(4, (500,), generator=rng)
    ece = expected_calibration_error(calibration_gaps(logits, target, bins), 500)
    for row, found in zip(softmax(logits), ece.tolist(), strict=True):
        confidence, right = row.max(-1), row.argmax(-1) == target.numpy()
        expected = 0.0
        for b in range(bins):
            inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
            if inside.any():
                expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        assert found == pytest.approx(expected)


def test_calibration_adds_up_over_batches(logits: Tensor, target: Tensor) -> None:
    parts = calibration_gaps(logits[:, :3], target[:3]) + calibration_gaps(logits[:, 3:], target[3:])
    torch.testing.assert_close(parts, calibration_gaps(logits, target))
    certain = torch.tensor([[[200.0, 0.0]]])
    assert calibration_gaps(certain, torch.tensor([1]))[0, -1] == 1, "certainty is in the last bin"


# Members ------------------------------------------------------------------------------------------------------------


def test_diversity_is_the_deviation_over_the_models(logits: Tensor) -> None:
    each = [statistics.pstdev(logits[:, b, c].tolist()) for b in range(7) for c in range(4)]
    assert diversity(logits).item() == pytest.approx(statistics.mean(each), rel=1e-5)
    assert diversity(logits.bfloat16()).dtype == torch.float32
    assert diversity(logits[:1]).item() == 0


def test_disagreement_is_a_share_of_pairs(logits: Tensor) -> None:
    named = logits.argmax(-1)
    differing = [(a != b).double().mean().item() for a, b in itertools.combinations(named, 2)]
    assert disagreement(logits).item() == pytest.approx(statistics.mean(differing))
    assert disagreement(logits[:1]).item() == 0
    assert disagreement(torch.stack([logits[0], -logits[0]])).item() == 1


def test_entropy_and_mutual_information(logits: Tensor) -> None:
    probabilities = softmax(logits)
    total = [entropy(sample) for sample in probabilities.mean(0)]
    own = [statistics.mean(entropy(model) for model in probabilities[:, b]) for b in range(7)]
    assert predictive_entropy(logits).tolist() == pytest.approx(total, rel=1e-5)
    expected = [t - o for t, o in zip(total, own, strict=True)]
    assert mutual_information(logits).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert not mutual_information(logits[:1]).any()
    assert mutual_information(logits[:1].expand(4, -1, -1)).max() < 1e-6


def test_uncertainty_at_its_limits() -> None:
    sure = 500 * torch.eye(3)[:, None]  # three members, each certain of another class
    assert predictive_entropy(sure).item() == pytest.approx(math.log(3))
    assert mutual_information(sure).item() == pytest.approx(math.log(3))
    assert predictive_entropy(sure[:1]).item() == 0
    assert mutual_information(sure.bfloat16()).dtype == torch.float32


def test_scores_of_one_prediction(rng: torch.Generator) -> None:
    logits = 5 * torch.randn(20, 4, generator=rng).double()
    for row, probability, logit, free_energy in zip(
        logits.tolist(), max_probability(logits), max_logit(logits), energy(logits), strict=True
    ):
        powers = [math.exp(value) for value in row]
        assert probability.item() == pytest.approx(-max(powers) / sum(powers))
        assert logit.item() == -max(row)
        assert free_energy.item() == pytest.approx(-math.log(sum(powers)))


# Detection ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0, 50.0])
def test_detection(shift: float, ties: bool, rng: torch.Generator) -> None:
    inside, outside = torch.randn(300, generator=rng), shift + torch.randn(200, generator=rng)
    if ties:
        inside, outside = inside.round(), outside.round()
    scores_in, scores_out = inside.numpy(), outside.numpy()
    wins = (scores_out[:, None] > scores_in) + 0.5 * (scores_out[:, None] == scores_in)
    auroc, aupr, recall, fpr95 = wins.mean(), 0.0, 0.0, None
    for threshold in sorted({*scores_in, *scores_out}, reverse=True):
        found_in, found_out = (scores_in >= threshold).sum(), (scores_out >= threshold).sum()
        aupr += (found_out / 200 - recall) * found_out / (found_in + found_out)
        recall = found_out / 200
        if fpr95 is None and recall >= 0.95:
            fpr95 = found_in / 300
    found = detection(inside, outside)
    assert (found.auroc, found.aupr, found.fpr95) == pytest.approx((auroc, aupr, fpr95), abs=1e-6)


def test_detection_by_close_scores() -> None:
    """Scores that differ in the last bit of float32 stay different."""
    inside = torch.full((50,), 3.0)
    found = detection(inside, torch.nextafter(inside, torch.tensor(4.0)))
    assert (found.auroc, found.aupr, found.fpr95) == (1, 1, 0)


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (torch.ones(0), torch.ones(2), r"inside must be scores \[samples\] of at least one sample, got shape \(0,\)"),
        (torch.ones(2), torch.ones(2, 2), r"outside must be scores .* got shape \(2, 2\)"),
        (torch.ones(2), torch.tensor([1, math.nan]), "outside must be finite scores"),
    ],
)
def test_detection_refuses(inside: Tensor, outside: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detection(inside, outside)


# Regression ---------------------------------------------------------------------------------------------------------


def test_mixture_of_gaussians(rng: torch.Generator) -> None:
    mean, variance = torch.randn(6, 3, generator=rng).double(), torch.rand(6, 3, generator=rng).double() + 0.1
    found_mean, found_variance = mixture(mean, variance)
    torch.testing.assert_close(found_mean, mean.mean(0))
    # E[x^2] - E[x]^2 of the mixture
    torch.testing.assert_close(found_variance, (variance + mean**2).mean(0) - mean.mean(0) ** 2)
    torch.testing.assert_close(mixture(mean[:1], variance[:1]), (mean[0], variance[0]))


def test_regression_figures(rng: torch.Generator) -> None:
    mean, target = torch.randn(2, 9, generator=rng).double(), torch.randn(9, generator=rng).double()
    variance = torch.rand(2, 9, generator=rng).double() + 0.1
    for row in range(2):
        rmse = sklearn.metrics.root_mean_squared_error(target, mean[row])
        assert root_mean_squared_error(mean, target)[row].item() == pytest.approx(rmse)
        density = torch.distributions.Normal(mean[row], variance[row].sqrt()).log_prob(target)
        assert gaussian_nll(mean, variance, target)[row].item() == pytest.approx(-density.mean().item())


def test_coverage_of_calibrated_intervals(rng: torch.Generator) -> None:
    """Targets drawn from the predicted Gaussians lie in an interval as often as it says; narrow ones are too few."""
    mean, variance = torch.randn(20000, generator=rng), torch.rand(20000, generator=rng) + 0.1
    target = mean + variance.sqrt() * torch.randn(20000, generator=rng)
    errors = []
    for factor in (1.0, 1 / 9):
        counts = coverage_counts(mean.expand(2, -1), factor * variance, target)
        assert counts.shape == (2, len(LEVELS))
        errors.append(coverage_error(counts, 20000)[1].item())
    assert errors[0] < 0.01
    share = torch.special.ndtr(torch.special.ndtri((1 + torch.tensor(LEVELS)) / 2) / 3) * 2 - 1
    assert errors[1] == pytest.approx((torch.tensor(LEVELS) - share).mean().item(), abs=0.01)
