"""What ensembles average, their sizes, and calls that take turns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from hne import FusedHNE
from hne.data import load_dataset
from hne.distributed import World
from hne.evaluation import alternating_seconds, evaluate, evaluate_members, evaluate_ood, latency
from hne.metrics import prefix_mixtures

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
