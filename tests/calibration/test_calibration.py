"""Temperatures, conformal sets and early exits against definitions, in loops or by search."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hne.calibration import (
    ExitPoint,
    choose_confidence,
    conformal_thresholds,
    exit_curve,
    exit_point,
    fit_temperatures,
    nested_logits,
    prediction_sets,
    scaled_logits,
)


@pytest.fixture
def logits(rng: torch.Generator) -> Tensor:
    """Logits of four ensembles for 400 samples of five classes, too certain by different factors."""
    return torch.randn(4, 400, 5, generator=rng) * torch.tensor([0.5, 2.0, 4.0, 8.0])[:, None, None]


@pytest.fixture
def target(logits: Tensor, rng: torch.Generator) -> Tensor:
    """Classes that the first ensemble often gets right."""
    return torch.multinomial((2 * logits[0]).softmax(-1), 1, generator=rng)[:, 0]


# Temperature --------------------------------------------------------------------------------------------------------


def test_nested_logits_are_prefix_means(logits: Tensor) -> None:
    found = nested_logits(logits)
    for n in range(1, 5):
        torch.testing.assert_close(found[n - 1], logits[:n].mean(0))
    assert nested_logits(logits.bfloat16()).dtype == torch.float32
    assert nested_logits(logits.double()).dtype == torch.float64


def test_temperature_has_the_lowest_likelihood_loss(logits: Tensor, target: Tensor) -> None:
    def loss(row: int, temperature: float) -> float:
        return F.cross_entropy(logits[row].double() / temperature, target).item()

    for row, temperature in enumerate(fit_temperatures(logits, target)):
        if 0.011 < temperature < 99:
            for other in (0.98, 0.999, 1.001, 1.02):
                assert loss(row, temperature) <= loss(row, temperature * other)
        else:
            assert loss(row, temperature) <= min(loss(row, 0.02), loss(row, 50))


def test_temperature_recovers_the_one_that_made_the_classes(rng: torch.Generator) -> None:
    logits = 3 * torch.randn(1, 8_000, 6, generator=rng)
    target = torch.multinomial((logits[0] / 2.5).softmax(-1), 1, generator=rng)[:, 0]
    (temperature,) = fit_temperatures(logits, target)
    assert temperature == pytest.approx(2.5, rel=0.12)
    (half,) = fit_temperatures(logits / 2, target)
    assert half == pytest.approx(temperature / 2, rel=1e-6)


def test_temperature_without_an_optimum() -> None:
    logits = torch.tensor([[[3.0, 0.0], [0.0, 3.0]]])
    (certain,) = fit_temperatures(logits, torch.tensor([0, 1]))
    assert F.cross_entropy(logits[0].double() / certain, torch.tensor([0, 1])) < 1e-15
    assert fit_temperatures(logits, torch.tensor([1, 0])) == pytest.approx((100.0,))


def test_scaling_keeps_the_order_of_the_classes(logits: Tensor) -> None:
    scaled = scaled_logits(logits, (0.5, 1, 2, 3))
    assert torch.equal(scaled.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(scaled[2] * 2, logits[2])


# Conformal sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_sets_cover_new_samples(coverage: float, rng: torch.Generator) -> None:
    """The coverage over many draws of both splits, within five standard errors."""
    hits, draws, samples = 0, 100, 60
    for _ in range(draws):
        logits = 2 * torch.randn(1, 2 * samples, 4, generator=rng)
        target = torch.randint(4, (2 * samples,), generator=rng)
        logits[0, torch.arange(2 * samples), target] += 1.5
        thresholds = conformal_thresholds(logits[:, :samples], target[:samples], coverage)
        sets = prediction_sets(logits[:, samples:], thresholds)
        hits += int(sets[0, torch.arange(samples), target[samples:]].sum())
    found = hits / (draws * samples)
    # The coverage of a draw is beta distributed; samples of one draw share it.
    error = math.sqrt(coverage * (1 - coverage) * (1 / (draws * samples) + 1 / (draws * samples)))
    assert coverage - 5 * error <= found <= coverage + 1 / (samples + 1) + 5 * error


def test_threshold_by_counting(logits: Tensor, target: Tensor) -> None:
    for row, threshold in enumerate(conformal_thresholds(logits, target, 0.8)):
        probability = logits[row].double().softmax(-1)
        right = sorted((probability[i, target[i]].item() for i in range(400)), reverse=True)
        assert threshold == pytest.approx(right[math.ceil(401 * 0.8) - 1])


def test_too_few_samples_give_sets_of_all_classes() -> None:
    logits, target = torch.randn(1, 8, 3), torch.randint(3, (8,))
    assert conformal_thresholds(logits, target, 0.9) == (0.0,)
    assert prediction_sets(logits, (0.0,)).all()
    (threshold,) = conformal_thresholds(torch.cat([logits, logits[:, :1]], 1), torch.cat([target, target[:1]]), 0.9)
    assert threshold > 0, "nine samples are enough for 90 %"


# Early exits --------------------------------------------------------------------------------------------------------


def test_exit_points_by_going_through_the_samples(logits: Tensor, target: Tensor) -> None:
    costs = (1.0, 1.5, 4.0, 10.0)
    curve = exit_curve(logits, target, costs, points=20)
    assert [point.confidence for point in curve] == sorted(point.confidence for point in curve)
    for point in (*curve, exit_point(0.7, logits, target, costs)):
        right = cost = 0.0
        for sample in range(400):
            for n in range(4):
                probability = logits[n, sample].double().softmax(-1)
                if probability.max() >= point.confidence or n == 3:
                    right += probability.argmax().item() == target[sample].item()
                    cost += costs[n]
                    break
        assert (point.accuracy, point.cost) == pytest.approx((right / 400, cost / 400))


def test_one_member_has_one_exit(logits: Tensor, target: Tensor) -> None:
    (point,) = exit_curve(logits[:1], target, [3])
    assert point.cost == 3


def test_choice_of_an_exit() -> None:
    curve = [ExitPoint(0.5, 0.8, 1.0), ExitPoint(0.7, 0.9, 2.0), ExitPoint(0.9, 0.92, 4.0), ExitPoint(1.0, 0.91, 8.0)]
    assert choose_confidence(curve, accuracy=0.85) == curve[1]
    assert choose_confidence(curve, cost=3.9) == curve[1]
    assert choose_confidence(curve, cost=100) == curve[2]
    with pytest.raises(ValueError, match=r"accuracy: at most 0\.9200 is reached on these samples, got 0\.95"):
        choose_confidence(curve, accuracy=0.95)
    with pytest.raises(ValueError, match=r"cost: a sample costs at least 1, got 0\.5"):
        choose_confidence(curve, cost=0.5)
    for wrong in ({}, {"accuracy": 0.5, "cost": 1.0}):
        with pytest.raises(ValueError, match="give accuracy or cost, and not both"):
            choose_confidence(curve, **wrong)


# Arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 5)}, r"logits: expected \[ensembles, samples, classes\], .* got \(4, 5\)"),
        ({"logits": torch.zeros(1, 0, 5)}, r"none of them 0, got \(1, 0, 5\)"),
        ({"logits": torch.full((1, 2, 3), math.nan)}, "expected finite numbers"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target: expected int64 \[2\], got torch.int64 \[3\]"),
        ({"target": torch.tensor([0.0, 1.0])}, r"target: expected int64 \[2\], got torch.float32 \[2\]"),
        ({"target": torch.tensor([0, 3])}, "target: expected classes from 0 to 2, got 0 to 3"),
    ],
)
def test_wrong_samples(change: dict[str, Tensor], message: str) -> None:
    samples = {"logits": torch.zeros(1, 2, 3), "target": torch.tensor([0, 1]), **change}
    with pytest.raises(ValueError, match=message):
        fit_temperatures(**samples)
    with pytest.raises(ValueError, match=message):
        conformal_thresholds(**samples, coverage=0.9)
    with pytest.raises(ValueError, match=message):
        exit_curve(**samples, costs=[1])


def test_wrong_numbers() -> None:
    logits, target = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.long)
    for coverage in (0, 1, 1.5, True):
        with pytest.raises(ValueError, match="coverage: expected a number above 0 and below 1"):
            conformal_thresholds(logits, target, coverage)
    with pytest.raises(ValueError, match="thresholds: expected 2, one for each ensemble, got 1"):
        prediction_sets(logits, [0.5])
    with pytest.raises(ValueError, match="temperatures: expected 2, one for each ensemble, got 1"):
        scaled_logits(logits, [0.5])
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperatures: expected finite numbers above 0"):
            scaled_logits(logits, [1, wrong])
    for costs in ([1], [2, 1]):
        with pytest.raises(ValueError, match="costs: expected 2 rising numbers"):
            exit_curve(logits, target, costs)
