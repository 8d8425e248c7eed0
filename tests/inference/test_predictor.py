"""Anytime inference with a deadline (on a simulated clock), and until answers are certain."""

from __future__ import annotations

import math
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import TREES, build, each_model, images
from torch import Tensor

from hne import HNE, FusedHNE
from hne.inference.predictor import Answer, AnytimePredictor


class Ticking:
    """Replaces a model of four leaves. Each leaf advances a clock by its cost; the n-th answer is n everywhere."""

    num_models = 4
    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, *costs: float, noise: float = 0.0) -> None:
        self.costs = list(costs)
        self.noise = noise
        self.random = random.Random(0)
        self.now = 0.0
        self.evaluated = 0  # leaves

    def anytime(self, x: Tensor) -> Any:
        return _Steps(self, len(x))


class _Steps(SimpleNamespace):
    def __init__(self, model: Ticking, batch: int) -> None:
        super().__init__(model=model, batch=batch, num_models=0)

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> tuple[int, Tensor]:
        if self.num_models == 4:
            raise StopIteration
        self.model.now += self.model.costs[self.num_models] * (1 + self.model.noise * self.model.random.random())
        self.model.evaluated += 1
        self.num_models += 1
        return self.num_models, torch.full((self.batch, 2), float(self.num_models))


X = torch.zeros(5, 1, 2, 2)


def calibrated(model: Ticking, **options: Any) -> AnytimePredictor:
    predictor = AnytimePredictor(model, clock=lambda: model.now, **options)  # type: ignore[arg-type]
    predictor.calibrate(X, seconds=1e9)
    model.evaluated = 0
    return predictor


# Deadlines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deadline", "expected"), [(3900, 1), (4100, 2), (6900, 2), (7100, 3), (8100, 4), (99000, 4), (None, 4)]
)
def test_as_many_models_as_the_deadline_allows(deadline: float | None, expected: int) -> None:
    model = Ticking(3, 1, 3, 1)
    answer = calibrated(model, deadline_ms=deadline)(X)
    assert answer.num_models.tolist() == [expected] * 5
    assert model.evaluated == expected, "no further model is evaluated"
    assert torch.equal(answer.logits, torch.full((5, 2), float(expected)))
    assert answer.ready == answer.returned == sum(model.costs[:expected])
    assert not answer.late


def test_the_first_model_is_evaluated_even_if_it_is_late() -> None:
    answer = calibrated(Ticking(3, 1, 3, 1), deadline_ms=2000)(X)
    assert answer.num_models.tolist() == [1] * 5
    assert torch.equal(answer.logits, torch.ones(5, 2))
    assert answer.ready == 3
    assert answer.deadline == 2
    assert answer.late


def test_a_model_slower_than_predicted_is_left_out() -> None:
    model = Ticking(3, 1, 3, 1)
    predictor = calibrated(model, deadline_ms=8000)
    model.costs[2] = 10
    answer = predictor(X)
    assert answer.num_models.tolist() == [2] * 5
    assert torch.equal(answer.logits, torch.full((5, 2), 2.0))
    assert (answer.ready, answer.returned) == (4, 14)
    assert not answer.late


def test_predicted_times_follow_the_measured_times() -> None:
    model = Ticking(1, 1, 1, 1)
    predictor = calibrated(model, window=50)
    assert predictor.expected(X.shape) == [1, 1, 1, 1]
    model.costs[1] = 5
    predictor(X, deadline_ms=3900)
    assert predictor.expected(X.shape)[1] == 5
    assert predictor(X, deadline_ms=3900).num_models.tolist() == [1] * 5
    model.costs[1] = 1
    for _ in range(50):
        predictor(X)
    assert predictor.expected(X.shape)[1] == 1, "old times leave the window"


def test_a_new_shape_is_measured_first() -> None:
    model = Ticking(0.001, 0.001, 0.001, 0.001)
    predictor = calibrated(model)
    for expected in (100 * 4 + 4 + 4, 4):  # measurements, warm-up, answer
        model.evaluated = 0
        predictor(X[:2])
        assert model.evaluated == expected


def test_calibration_ends_within_its_time_limit() -> None:
    model = Ticking(1, 1, 1, 1)
    predictor = AnytimePredictor(model, clock=lambda: model.now)  # type: ignore[arg-type]
    predictor.calibrate(X, seconds=10)
    assert model.now == 4 * (1 + 3), "a warm-up, and three passes of four seconds"


@pytest.mark.parametrize(
    ("deadline", "least"), [(3800, 1), (4100, 1), (5300, 2), (6150, 2), (7300, 2), (8200, 2), (9800, 3), (11300, 4)]
)
def test_99_percent_of_the_answers_are_in_time(deadline: float, least: int) -> None:
    """The time of a leaf varies by up to a half. Each deadline is long enough for the first leaf."""
    model = Ticking(2.5, 1, 3, 1, noise=0.5)
    predictor = calibrated(model, deadline_ms=deadline)
    answers = [predictor(X) for _ in range(1000)]
    assert sum(answer.returned > answer.deadline for answer in answers) <= 10
    assert not any(answer.late for answer in answers)
    assert min(answer.num_models[0].item() for answer in answers) == least


def test_99_percent_of_the_answers_are_in_time_on_this_machine() -> None:
    torch.manual_seed(0)
    model = FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1, width=0.5).eval()
    x = torch.randn(1, 1, 8, 8)
    predictor = AnytimePredictor(model, deadline_ms=1000)  # some hundred times the time needed
    predictor.calibrate(x, runs=10)
    answers = [predictor(x) for _ in range(100)]
    assert sum(answer.returned > answer.deadline for answer in answers) <= 1
    assert sum(answer.num_models[0].item() == 8 for answer in answers) >= 99
    hasty = predictor(x, deadline_ms=1e-6)
    assert hasty.late
    assert hasty.num_models.tolist() == [1]


# Certain answers ----------------------------------------------------------------------------------------------------


def one_by_one(model: HNE, x: Tensor, certain: Any) -> tuple[Tensor, Tensor]:
    """For each sample by itself, its first certain answer, and the number of models in it."""
    answers, counts = [], []
    for members in model(x).transpose(0, 1):
        for n in range(1, model.num_models + 1):
            answer = members[:n].mean(0)
            if n == model.num_models or certain(answer, members[:n]):
                break
        answers.append(answer)
        counts.append(n)
    return torch.stack(answers), torch.tensor(counts)


def undecided(tree: str, rng: torch.Generator, kind: type[HNE] = FusedHNE) -> tuple[HNE, Tensor]:
    """A model, and samples for which it predicts different classes, since the logits of each leaf are centred."""
    model = build(kind, TREES[tree], rng)
    x = images(rng, 96)
    model.head.conv.bias.data -= model(x).mean(1).flatten()
    return model, x


def answered(model: HNE, x: Tensor, **limits: Any) -> Answer:
    predictor = AnytimePredictor(model, **limits)
    predictor.calibrate(x, runs=1)
    return predictor(x)


def check_each_sample(model: HNE, x: Tensor, answer: Answer, certain: Any) -> None:
    logits, num_models = one_by_one(model, x, certain)
    assert answer.num_models.tolist() == num_models.tolist()
    assert len(set(num_models.tolist())) > 1, "some leave the batch, others stay"
    torch.testing.assert_close(answer.logits, logits)


@each_model
@pytest.mark.parametrize("tree", ["doubling", "odd", "two-trunks", "multi-head"])
@torch.no_grad()
def test_samples_leave_when_their_answer_is_certain(kind: type[HNE], tree: str, rng: torch.Generator) -> None:
    model, x = undecided(tree, rng, kind)
    confidence = model(x)[0].softmax(-1).amax(-1).median().item()
    answer = answered(model, x, confidence=confidence)
    check_each_sample(model, x, answer, lambda y, members: y.softmax(-1).max() >= confidence)


@torch.no_grad()
def test_certainty_is_of_scaled_probabilities(rng: torch.Generator) -> None:
    model, x = undecided("doubling", rng)
    temperatures = [0.3 + 0.2 * n for n in range(model.num_models)]
    confidence = (model(x)[0] / temperatures[0]).softmax(-1).amax(-1).median().item()

    def certain(answer: Tensor, members: Tensor) -> Tensor:
        return (answer / temperatures[len(members) - 1]).softmax(-1).max() >= confidence

    answer = answered(model, x, confidence=confidence, temperatures=temperatures)
    check_each_sample(model, x, answer, certain)
    for logits, n, probabilities in zip(answer.logits, answer.num_models, answer.probabilities, strict=True):
        torch.testing.assert_close(probabilities, (logits / temperatures[n - 1]).softmax(-1))
    model.metadata = {"calibration": {"temperatures": temperatures}}
    check_each_sample(model, x, answered(model, x, confidence=confidence), certain)


@torch.no_grad()
def test_samples_leave_when_models_agree(rng: torch.Generator) -> None:
    model, x = undecided("independent", rng)
    answer = answered(model, x, agreement=2)
    check_each_sample(model, x, answer, lambda y, members: (members.argmax(-1) == y.argmax()).sum() >= 2)


@torch.no_grad()
def test_confidence_or_agreement_is_enough(rng: torch.Generator) -> None:
    model, x = undecided("independent", rng)
    confidence = model(x)[0].softmax(-1).amax(-1).median().item()
    answer = answered(model, x, confidence=confidence, agreement=2, deadline_ms=60_000)
    check_each_sample(
        model,
        x,
        answer,
        lambda y, members: y.softmax(-1).max() >= confidence or (members.argmax(-1) == y.argmax()).sum() >= 2,
    )


@torch.no_grad()
def test_predicted_times_of_models_not_evaluated_stay(rng: torch.Generator) -> None:
    model = build(FusedHNE, TREES["doubling"], rng)
    x = images(rng, 8)
    predictor = AnytimePredictor(model, confidence=1e-9, clock=time.perf_counter)
    predictor.calibrate(x, runs=3)
    before = predictor.expected(x.shape)
    assert predictor(x).num_models.tolist() == [1] * 8, "all are certain after the first"
    assert predictor.expected(x.shape)[1:] == before[1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline_ms": 0}, "deadline_ms: expected a number above 0, got 0"),
        ({"confidence": 1.5}, r"confidence: expected a probability above 0, got 1\.5"),
        ({"agreement": 1}, "agreement: expected 2 to 4 models, got 1"),
        ({"agreement": 5}, "agreement: expected 2 to 4 models, got 5"),
        ({"quantile": 0}, "quantile: expected a share above 0, got 0"),
        *(
            ({name: number}, f"{name}: expected .*, got '?{number}")
            for name in ("deadline_ms", "confidence", "agreement", "quantile", "window")
            for number in (math.nan, math.inf, -math.inf, -1, "much", True)
        ),
        ({"temperatures": [1, 1, 1]}, "temperatures: expected 4, got 3"),
        ({"temperatures": [1, 1, 1, 0]}, "temperatures: expected numbers above 0, got 0"),
        ({"temperatures": [1, 1, math.nan, 1]}, "temperatures: expected numbers above 0, got nan"),
        ({"agreement": 2.5}, r"agreement: expected a whole number, got 2\.5"),
        ({"window": 0}, "window: expected a whole number above 0, got 0"),
        ({"window": 1.5}, r"window: expected a whole number, got 1\.5"),
        ({"window": None}, "window: expected a whole number above 0, got None"),
    ],
)
def test_bad_limits(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnytimePredictor(Ticking(1, 1, 1, 1), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("deadline", [math.nan, math.inf, -1.0, 0, "soon"])
def test_bad_deadline_of_a_call(deadline: Any) -> None:
    predictor = calibrated(Ticking(1, 1, 1, 1))
    with pytest.raises(ValueError, match="deadline_ms: expected a number above 0, got"):
        predictor(X, deadline_ms=deadline)


@pytest.mark.parametrize("options", [{"runs": 0}, {"runs": 1.5}, {"seconds": math.nan}, {"seconds": 0.0}])
def test_bad_calibration(options: dict[str, Any]) -> None:
    predictor = AnytimePredictor(Ticking(1, 1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected a"):
        predictor.calibrate(X, **options)
