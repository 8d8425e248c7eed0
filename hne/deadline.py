"""Anytime inference against the clock: the best answer that is ready in time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .model import HNE


@dataclass(frozen=True)
class Answer:
    """What was ready at the deadline.

    Attributes:
        logits: mean of the models that were ready, [B, L].
        num_models: how many they were.
        ready: seconds until they were ready.
        returned: seconds until the answer was returned: later than ``ready`` if one more model
            was begun in vain.
        deadline: seconds that were given.
    """

    logits: Tensor
    num_models: int
    ready: float
    returned: float
    deadline: float

    @property
    def late(self) -> bool:
        """Whether not even the first model, without which there is no answer, was ready."""
        return self.ready > self.deadline


class DeadlinePredictor:
    """Evaluates a tree leaf by leaf and begins a leaf only if it is expected to be done in time.

    What a leaf costs is measured: the ``quantile`` of its last ``window`` times, kept up to date
    by every answer. The first leaf is always evaluated. One that was begun and not done in time
    after all is not part of the answer.

    Args:
        model: in eval mode.
        quantile: 0.5 expects the usual time, 1 the worst one.
        window: times remembered for each leaf.
        clock: seconds; another one is for tests.
    """

    def __init__(
        self,
        model: HNE,
        *,
        quantile: float = 0.9,
        window: int = 32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.quantile = quantile
        self.clock = clock
        self._times = [deque[float](maxlen=window) for _ in range(model.num_models)]

    def expected(self, leaf: int) -> float:
        """Seconds that ``leaf`` (from 0) is expected to take; 0 if it never ran."""
        times = sorted(self._times[leaf])
        return times[min(len(times) - 1, int(self.quantile * len(times)))] if times else 0.0

    @torch.inference_mode()
    def calibrate(self, x: Tensor, runs: int = 8) -> None:
        """Measure every leaf on ``x`` [B, C, H, W], a batch like those to come."""
        for _ in self.model.anytime(x):
            pass  # warm up: folded weights, memory, threads
        for _ in range(runs):
            steps = self.model.anytime(x)
            for _ in range(self.model.num_models):
                self._step(steps)

    @torch.inference_mode()
    def answer(self, x: Tensor, deadline: float) -> Answer:
        """The best answer for the batch ``x`` [B, C, H, W] that is ready in ``deadline`` seconds."""
        start = self.clock()
        steps = self.model.anytime(x)
        num_models, logits = self._step(steps)
        ready = returned = self.clock() - start
        while num_models < self.model.num_models:
            if returned + self.expected(num_models) > deadline:
                break
            more_models, better_logits = self._step(steps)
            returned = self.clock() - start
            if returned > deadline:  # took longer than expected
                break
            num_models, logits, ready = more_models, better_logits, returned
        return Answer(logits, num_models, ready, returned, deadline)

    def _step(self, steps: Iterator[tuple[int, Tensor]]) -> tuple[int, Tensor]:
        """Evaluate the next leaf and remember how long it took."""
        start = self.clock()
        num_models, logits = next(steps)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self._times[num_models - 1].append(self.clock() - start)
        return num_models, logits
