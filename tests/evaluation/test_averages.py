"""What ensembles average, their sizes, and calls that take turns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from hne import AnytimePredictor, FusedHNE
from hne.averages import AVERAGES, prefix_mixtures
from hne.calibration import nested_logits
from hne.data import load_dataset
from hne.distributed import World
from hne.evaluation import (
    Evaluation,
    alternating_seconds,
    evaluate,
    evaluate_members,
    evaluate_ood,
    latency,
    measure_anytime,
)
from hne.inference import anytime_steps
from hne.metrics import detection, max_probability

CPU = World(torch.device("cpu"))


def test_mixtures_are_means_of_probabilities() -> None:
    logits = 30 * torch.randn(5, 7, 4)
    mixtures = prefix_mixtures(logits, (1, 3, 5))
    for row, n in zip(mixtures, (1, 3, 5), strict=True):
        expected = logits[:n].double().softmax(-1).mean(0).log()
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5)
    assert prefix_mixtures(logits.half(), (2,)).dtype == torch.float32


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_evaluation_agrees_with_its_definition(average: str) -> None:
    logits, target = 2 * torch.randn(4, 50, 6), torch.randint(6, (50,))
    batches = [(logits[:, :30], target[:30]), (logits[:, 30:], target[30:])]
    found = evaluate_members(batches, 4, lambda n: 10 * n, CPU, sizes=(1, 3, 4), average=average)
    assert [(e.num_models, e.macs) for e in found.ensembles] == [(1, 10), (3, 30), (4, 40)]
    for ensemble in found.ensembles:
        members = logits[: ensemble.num_models].double()
        mean = members.mean(0).softmax(-1) if average == "logits" else members.softmax(-1).mean(0)
        assert ensemble.accuracy == pytest.approx(float((mean.argmax(-1) == target).double().mean()))
        assert ensemble.nll == pytest.approx(float(-mean[torch.arange(50), target].log().mean()), rel=1e-4)
    assert found.average == average
    assert Evaluation.from_dict(found.to_dict()) == found
    earlier = {name: value for name, value in found.to_dict().items() if name != "average"}
    assert Evaluation.from_dict(earlier).average == "logits"
    with pytest.raises(ValueError, match="average must be one of logits, probabilities, got 'median'"):
        evaluate_members(batches, 4, lambda n: n, CPU, average="median")


def test_all_sizes_of_a_model() -> None:
    digits = load_dataset("digits", limit_train=20, limit_test=30)
    model = FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1, width=0.25)
    sizes = range(1, 9)
    every, usual = evaluate(model, digits, sizes=sizes), evaluate(model, digits)
    assert [e.num_models for e in every.ensembles] == list(sizes)
    assert [every.ensembles[n - 1] for n in (1, 2, 4, 8)] == list(usual.ensembles)
    ood = evaluate_ood(model, digits, digits.train, sizes=sizes)
    assert [ood[n - 1] for n in (1, 2, 4, 8)] == list(evaluate_ood(model, digits, digits.train))


def as_defined(logits: torch.Tensor, average: str) -> torch.Tensor:
    """Probabilities of the ensembles of the first 1, 2, ... N members, in float64."""
    if average == "logits":
        return torch.stack([logits[:n].double().mean(0).softmax(-1) for n in range(1, len(logits) + 1)])
    return torch.stack([logits[:n].double().softmax(-1).mean(0) for n in range(1, len(logits) + 1)])


@pytest.fixture(scope="module")
def model() -> FusedHNE:
    """A network whose members differ much."""
    model = FusedHNE.from_preset("hne_tiny", num_classes=10, in_channels=1, width=0.25).eval()
    torch.nn.init.normal_(model.head.conv.weight, std=2)
    return model


@pytest.mark.parametrize("average", AVERAGES)
def test_calibration_averages(average: str) -> None:
    logits = 4 * torch.randn(5, 30, 6)
    found = nested_logits(logits, average).double().softmax(-1)
    torch.testing.assert_close(found, as_defined(logits, average), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="average must be one of logits, probabilities, got 'mode'"):
        nested_logits(logits, "mode")


@pytest.mark.parametrize("average", AVERAGES)
def test_anytime_averages(average: str, model: FusedHNE) -> None:
    x = torch.randn(6, 1, 8, 8)
    chosen = torch.tensor([4, 1, 2])
    with torch.inference_mode():
        expected = as_defined(model(x), average)
        steps = anytime_steps(model, x, average)
        for n, logits in steps:
            rows = expected[n - 1] if n <= 3 else expected[n - 1][chosen]
            torch.testing.assert_close(logits.double().softmax(-1), rows, rtol=1e-4, atol=1e-5)
            assert steps.num_models == n
            assert steps.member is not None
            if n == 3:
                steps.select(chosen)
        answer = AnytimePredictor(model, average=average, confidence=0.6)(x)
    rows = expected[answer.num_models - 1, torch.arange(6)]
    torch.testing.assert_close(answer.probabilities.double(), rows, rtol=1e-4, atol=1e-5)
    for sample, n in enumerate(answer.num_models.tolist()):
        assert n == 8 or rows[sample].max() > 0.6 - 1e-4
        assert (expected[: n - 1, sample].amax(-1) < 0.6 + 1e-4).all()


def test_predictor_averages_what_was_calibrated(model: FusedHNE) -> None:
    metadata, temperatures = model.metadata, tuple(float(n) for n in range(1, 9))
    try:
        model.metadata = {"calibration": {"temperatures": temperatures, "average": "probabilities"}}
        default, other = AnytimePredictor(model), AnytimePredictor(model, average="logits")
        assert (default.average, default.temperatures) == ("probabilities", temperatures)
        assert (other.average, other.temperatures) == ("logits", (1.0,) * 8)
        model.metadata = {"calibration": {"temperatures": temperatures}}  # of an earlier version
        assert AnytimePredictor(model).average == "logits"
        assert AnytimePredictor(model).temperatures == temperatures
    finally:
        model.metadata = metadata
    with pytest.raises(ValueError, match="average must be one of logits, probabilities, got 'mean'"):
        AnytimePredictor(model, average="mean")


def test_all_evaluations_average_alike(model: FusedHNE) -> None:
    digits = load_dataset("digits", limit_train=20, limit_test=200)
    accuracies = {}
    for average in AVERAGES:
        ensembles = evaluate(model, digits, sizes=range(1, 9), average=average).ensembles
        curve = measure_anytime(model, digits, average=average, batch_size=64)
        accuracies[average] = [ensemble.accuracy for ensemble in ensembles]
        assert [step.accuracy for step in curve] == pytest.approx(accuracies[average], abs=0.01)  # ties of rounding
    assert accuracies["logits"] != accuracies["probabilities"], "the members of this network differ enough"


@pytest.mark.parametrize("average", AVERAGES)
def test_largest_probability_of_out_of_distribution_images(average: str, model: FusedHNE) -> None:
    digits = load_dataset("digits", limit_train=50, limit_test=60)
    with torch.inference_mode():
        inside, outside = (
            max_probability(
                as_defined(model(digits.input.normalise(split.pixels(torch.arange(len(split))))), average)[3].log()
            )
            for split in (digits.test, digits.train)
        )
    found = evaluate_ood(model, digits, digits.train, sizes=(4,), average=average)[0]
    assert found.by_max_probability.auroc == pytest.approx(detection(inside, outside).auroc, abs=2e-3)
    other = evaluate_ood(model, digits, digits.train, sizes=(4,))[0]
    assert found.by_energy == other.by_energy


class FakeTimer:
    """Stands in for PyTorch's: each call has a known duration; the middle one of three turns is slow for all."""

    turn = 0

    def __init__(self, _: str, *, globals: dict[str, Callable[[], float]], num_threads: int) -> None:
        assert num_threads == torch.get_num_threads()
        self.call = globals["call"]

    def timeit(self, number: int) -> SimpleNamespace:
        seconds = [self.call() for _ in range(number)]
        FakeTimer.turn += 1
        return SimpleNamespace(mean=seconds[0] * (9 if 6 < FakeTimer.turn <= 9 else 1))


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "Timer", FakeTimer)
    log: list[float] = []

    def call(seconds: float) -> float:
        log.append(seconds)
        return seconds

    durations = [0.001, 0.002, 0.03]
    times = alternating_seconds([lambda s=s: call(s) for s in durations], 3, 0.004)  # type: ignore[misc]
    assert times == durations, "the median leaves out the slow turn"
    turn = [0.001] * 4 + [0.002] * 2 + [0.03]
    assert log == durations + 3 * turn, "repeated up to the least time, in turns"
    with pytest.raises(ValueError, match="rounds: expected a number of at least 1, got 0"):
        alternating_seconds([], 0, 0.1)
