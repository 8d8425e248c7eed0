"""Latency of a call, and of every step of anytime inference."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from ..data import Dataset, evaluation_batches
from ..errors import ResultError
from ..inference import anytime_steps
from ..metrics import correct
from ..models import HNE, QuantizedHNE


@dataclass(frozen=True)
class AnytimeStep:
    """Cost, time and accuracy of anytime inference when the first ``num_models`` members have been computed.

    Attributes:
        num_models: n, the ensemble size.
        macs: multiply-adds for one image.
        milliseconds: from the start until the ensemble's logits are ready for a batch, median over the batches.
        slowest: the same for the slowest batch.
        accuracy: fraction of correctly classified images, 0 to 1.
    """

    num_models: int
    macs: int
    milliseconds: float
    slowest: float
    accuracy: float


def seconds_per_call(function: Callable[[], object], min_seconds: float) -> float:
    """Median time of a call, warmed up and synchronised with the device.

    Args:
        function: the call.
        min_seconds: least total time to spend on measuring; finite and above 0.
    """
    if not 0 < min_seconds < math.inf:
        raise ValueError(f"min_seconds: expected a finite number above 0, got {min_seconds}")
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=min_seconds).median


def alternating_seconds(
    calls: Sequence[Callable[[], object]],
    rounds: int,
    min_seconds: float,
    *,
    rest: float = 0.0,
    progress: Callable[[int], object] | None = None,
) -> list[float]:
    """Median time of each of several calls that are to be compared.

    In each round every call is timed once, one after the other, so that a change of the machine's speed changes all of
    them.

    Args:
        calls: the calls.
        rounds: number of rounds, at least 1.
        min_seconds: least time to spend on a call in a round, by repeating it; the calls' own time if it is longer.
        rest: seconds to rest before each turn, in which threads that wait for work of the call before fall asleep. An
            untimed call follows.
        progress: called with 1 after each turn.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected a number of at least 1, got {rounds}")
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in calls]
    repeats = [max(1, math.ceil(min_seconds / timer.timeit(1).mean)) for timer in timers]
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(rounds):
        for timer, n, found in zip(timers, repeats, times, strict=True):
            time.sleep(rest)
            if rest and n > 1:  # a long call wakes its threads itself
                timer.timeit(max(1, math.ceil(n / 4)))
            found.append(timer.timeit(n).mean)
            if progress is not None:
                progress(1)
    return [statistics.median(found) for found in times]


@torch.inference_mode()
def measure_anytime(
    model: HNE | QuantizedHNE,
    dataset: Dataset,
    *,
    average: str = "logits",
    batch_size: int = 1,
    progress: Callable[[int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[AnytimeStep, ...]:
    """Time every step of anytime inference on the test images.

    Args:
        model: is put into eval mode.
        dataset: provides the test images and their format.
        average: what an ensemble averages, a name of :data:`hne.averages.AVERAGES`.
        batch_size: images per batch; a smaller last batch is not timed unless it is the only one.
        progress: called with the size of every batch that was evaluated.
        clock: returns seconds; tests replace it.

    Returns:
        One step for each ensemble size from 1 to N.

    Raises:
        ResultError: a logit is NaN or infinite.
    """
    model.eval()
    device = next(model.parameters()).device
    times: list[list[float]] = []  # per batch, seconds until each step is done
    num_correct = torch.zeros(model.num_models, dtype=torch.long)
    batches = evaluation_batches(dataset.test, dataset.input, batch_size, device=device)
    for index, (images, target) in enumerate(batches):
        if index == 0:
            for _ in anytime_steps(model, images, average):
                pass  # warm up: folded weights, memory, threads
        answers, ready = [], []
        start = clock()
        for _, logits in anytime_steps(model, images, average):
            if logits.is_cuda:
                torch.cuda.synchronize(device)
            ready.append(clock() - start)
            answers.append(logits)
        stacked = torch.stack(answers)
        if not stacked.isfinite().all():
            raise ResultError("the logits are not finite: the model has diverged, or its inputs are wrong")
        num_correct += correct(stacked, target).cpu()
        if index == 0 or len(target) == batch_size:
            times.append(ready)
        if progress is not None:
            progress(len(target))
    return tuple(
        AnytimeStep(
            n,
            model.macs(n, dataset.input.size),
            1e3 * statistics.median(seconds),
            1e3 * max(seconds),
            count / len(dataset.test),
        )
        for n, seconds, count in zip(
            range(1, model.num_models + 1), zip(*times, strict=True), num_correct.tolist(), strict=True
        )
    )
