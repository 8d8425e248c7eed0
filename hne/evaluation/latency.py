"""Time: of a call, and of the answers of anytime inference."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from ..data import Dataset, evaluation_batches
from ..metrics import correct
from ..models.hne import HNE


@dataclass(frozen=True)
class Point:
    """The answer of the first ``num_models`` leaves, evaluated one after the other.

    Attributes:
        num_models: n.
        macs: multiply-adds for one image.
        milliseconds: until the answer for a batch was ready, median over the batches.
        slowest: the same, for the slowest batch.
        accuracy: share of the images whose class it names, 0 to 1.
    """

    num_models: int
    macs: int
    milliseconds: float
    slowest: float
    accuracy: float


def seconds_per_call(function: Callable[[], object], at_least: float) -> float:
    """Median time of a call, warmed up and synchronised with the device; ``at_least`` so many seconds are spent."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=at_least).median


@torch.inference_mode()
def accuracy_against_time(
    model: HNE,
    dataset: Dataset,
    *,
    batch_size: int = 1,
    progress: Callable[[int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Point, ...]:
    """Time every answer of anytime inference on the test images, one point for each number of models.

    Args:
        model: is put into eval mode.
        dataset: its test images and their format.
        batch_size: images answered together; a last, smaller batch is not timed where there are others.
        progress: called with the number of images of every batch done.
        clock: seconds; another one is for tests.
    """
    model.eval()
    device = next(model.parameters()).device
    times: list[list[float]] = []  # for each batch, seconds until each answer
    right = torch.zeros(model.num_models, dtype=torch.long)
    batches = evaluation_batches(dataset.test, dataset.input, batch_size, device=device)
    for index, (images, target) in enumerate(batches):
        if index == 0:
            for _ in model.anytime(images):
                pass  # warm up: folded weights, memory, threads
        answers, ready = [], []
        start = clock()
        for _, logits in model.anytime(images):
            if logits.is_cuda:
                torch.cuda.synchronize(device)
            ready.append(clock() - start)
            answers.append(logits)
        right += correct(torch.stack(answers), target).cpu()
        if index == 0 or len(target) == batch_size:
            times.append(ready)
        if progress is not None:
            progress(len(target))
    return tuple(
        Point(
            n,
            model.macs(n, dataset.input.size),
            1e3 * statistics.median(seconds),
            1e3 * max(seconds),
            count / len(dataset.test),
        )
        for n, seconds, count in zip(
            range(1, model.num_models + 1), zip(*times, strict=True), right.tolist(), strict=True
        )
    )
