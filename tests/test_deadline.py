"""Answers against the clock, with a clock of our own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hne import FusedHNE
from hne.deadline import DeadlinePredictor


class Ticking:
    """A model of four leaves that moves the clock by what each leaf costs."""

    num_models = 4

    def __init__(self, *costs: float) -> None:
        self.costs = list(costs)
        self.now = 0.0
        self.begun = 0

    def anytime(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        for leaf, cost in enumerate(self.costs):
            self.now += cost
            self.begun += 1
            yield leaf + 1, torch.full((len(x), 2), float(leaf + 1))


def calibrated(model: Ticking) -> DeadlinePredictor:
    predictor = DeadlinePredictor(model, clock=lambda: model.now)  # type: ignore[arg-type]
    predictor.calibrate(torch.zeros(1, 1, 2, 2))
    model.begun = 0
    return predictor


@pytest.mark.parametrize(("deadline", "expected"), [(3.9, 1), (4.1, 2), (6.9, 2), (7.1, 3), (8.1, 4), (99, 4)])
def test_as_many_models_as_fit(deadline: float, expected: int) -> None:
    model = Ticking(3, 1, 3, 1)
    answer = calibrated(model).answer(torch.zeros(5, 1, 2, 2), deadline)
    assert answer.num_models == expected == model.begun, "no more is begun"
    assert torch.equal(answer.logits, torch.full((5, 2), float(expected)))
    assert answer.ready == answer.returned == sum(model.costs[:expected])
    assert not answer.late


def test_the_first_answer_is_given_though_late() -> None:
    answer = calibrated(Ticking(3, 1, 3, 1)).answer(torch.zeros(1, 1, 2, 2), 2)
    assert answer.num_models == 1
    assert answer.ready == 3
    assert answer.late


def test_a_model_that_takes_too_long_after_all_is_left_out() -> None:
    model = Ticking(3, 1, 3, 1)
    predictor = calibrated(model)
    model.costs[2] = 10
    answer = predictor.answer(torch.zeros(1, 1, 2, 2), 8)
    assert answer.num_models == 2
    assert (answer.ready, answer.returned) == (4, 14)
    assert not answer.late


def test_costs_are_kept_up_to_date() -> None:
    model = Ticking(1, 1, 1, 1)
    predictor = calibrated(model)
    model.costs[1] = 5
    for _ in range(32):
        predictor.answer(torch.zeros(1, 1, 2, 2), 4)
    assert predictor.expected(1) == 5
    assert predictor.answer(torch.zeros(1, 1, 2, 2), 4).num_models == 1


def test_a_real_model() -> None:
    torch.manual_seed(0)
    model = FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1).eval()
    predictor = DeadlinePredictor(model)
    x = torch.randn(2, 1, 8, 8)
    predictor.calibrate(x, runs=2)
    answer = predictor.answer(x, 60)
    assert answer.num_models == 8
    assert 0 < answer.ready < 60
    with torch.no_grad():
        torch.testing.assert_close(answer.logits, model(x).mean(0), rtol=1e-4, atol=1e-4)
    assert predictor.answer(x, 1e-9).num_models == 1
