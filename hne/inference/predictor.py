"""Anytime inference within limits: as many models as the deadline allows, and no more than the answer needs."""

from __future__ import annotations

import bisect
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..executors.anytime import Anytime
from ..models.hne import HNE


@dataclass(frozen=True)
class Answer:
    """What was ready in time.

    Attributes:
        logits: mean of the models that each sample was given, [B, L].
        num_models: how many they were, [B] int64.
        ready: seconds until all of them were ready.
        returned: seconds until the answer was returned: later than ``ready`` if one more model
            was begun in vain.
        deadline: seconds that were given; infinite without a deadline.
    """

    logits: Tensor
    num_models: Tensor
    ready: float
    returned: float
    deadline: float

    @property
    def late(self) -> bool:
        """Whether not even the first model, without which there is no answer, was ready."""
        return self.ready > self.deadline


class AnytimePredictor:
    """Evaluates a tree leaf by leaf until the time is up, or the answers are sure enough.

    A leaf is begun only if it is expected to be done before the deadline. What it costs is measured once for every
    shape of batch, before its first answer, and kept up to date by every answer. The first leaf is always evaluated:
    where even that takes too long, ``Answer.late`` says so. One that was begun and not done in time after all is not
    part of the answer.

    A sample whose answer is sure enough leaves the batch: the later leaves are computed for the others alone.

    Args:
        model: in eval mode.
        deadline_ms: milliseconds for each batch; None for no deadline. A call may name another one.
        confidence: a sample is done when the ensemble's probability of its class is at least this, 0 to 1.
        agreement: a sample is done when so many of its models (2 or more) name the ensemble's class.
        quantile: a leaf is expected to take no longer than it did so often; the rest of the answers may be late by the
            time that the deadline leaves them nothing to spare.
        window: times remembered for each leaf.
        clock: seconds; another one is for tests.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        model: HNE,
        *,
        deadline_ms: float | None = None,
        confidence: float | None = None,
        agreement: int | None = None,
        quantile: float = 0.99,
        window: int = 400,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value, valid, expected in (
            ("deadline_ms", deadline_ms, lambda ms: ms > 0, "a number above 0"),
            ("confidence", confidence, lambda p: 0 < p <= 1, "a probability above 0"),
            ("agreement", agreement, lambda k: 2 <= k <= model.num_models, f"2 to {model.num_models} models"),
            ("quantile", quantile, lambda q: 0 < q <= 1, "a share above 0"),
        ):
            if value is not None and not valid(value):
                raise ValueError(f"{name}: expected {expected}, got {value}")
        self.model = model
        self.deadline_ms = deadline_ms
        self.confidence = confidence
        self.agreement = agreement
        self.quantile = quantile
        self._window = window
        self._clock = clock
        self._times: dict[torch.Size, list[_Times]] = {}

    def expected(self, shape: torch.Size) -> list[float]:
        """Seconds that each leaf is expected to take for a batch of this shape [B, C, H, W] that was measured."""
        return [times.quantile(self.quantile) for times in self._times[shape]]

    @torch.inference_mode()
    def calibrate(self, x: Tensor, *, runs: int = 100, seconds: float = 3.0) -> None:
        """Measure every leaf on ``x`` [B, C, H, W], a batch like those to come.

        A call does so itself for a shape that it meets for the first time: calibrate where already the first answer
        has to be in time.

        Args:
            x: any images; the time does not depend on what they show.
            runs: measurements of each leaf.
            seconds: no further one is begun after so long.
        """
        for _ in self.model.anytime(x):
            pass  # warm up: folded weights, memory, threads
        self._times.setdefault(x.shape, [_Times(self._window) for _ in range(self.model.num_models)])
        start = self._clock()
        for _ in range(runs):
            self._answer(x, math.inf, choosy=False)
            if self._clock() - start > seconds:
                break

    @torch.inference_mode()
    def __call__(self, x: Tensor, deadline_ms: float | None = None) -> Answer:
        """The best answer for the batch ``x`` [B, C, H, W] within the limits.

        Args:
            x: images, as of :meth:`HNE.forward`.
            deadline_ms: for this batch, from the call on; that of the predictor by default.
        """
        if x.shape not in self._times:
            self.calibrate(x)
        limit = self.deadline_ms if deadline_ms is None else deadline_ms
        return self._answer(x, math.inf if limit is None else limit / 1e3, choosy=True)

    def _answer(self, x: Tensor, deadline: float, *, choosy: bool) -> Answer:
        """Without being ``choosy``, no answer is sure enough."""
        times = self._times[x.shape]
        start = begun = self._clock()
        steps = self.model.anytime(x)
        batch: Tensor | None = None  # the samples that are still in it, where some have left
        votes: Tensor | None = None
        logits = _step(steps)
        num_models = torch.ones(len(x), dtype=torch.long, device=x.device)
        answer = logits
        while True:
            now = self._clock()
            if batch is None:
                times[steps.num_models - 1].add(now - begun)
            returned = now - start
            if returned > deadline and steps.num_models > 1:  # took longer than expected
                break
            if batch is None:
                logits = answer
                num_models.fill_(steps.num_models)
            else:
                logits[batch] = answer
                num_models[batch] = steps.num_models
            ready = returned
            if steps.num_models == self.model.num_models:
                break
            if choosy and (self.confidence is not None or self.agreement is not None):
                votes = _count(votes, steps)
                unsure = (~self._sure(answer, votes)).nonzero()[:, 0]
                if len(unsure) == 0:
                    break
                if len(unsure) < len(answer):
                    steps.keep(unsure)
                    votes = votes[unsure]
                    batch = unsure if batch is None else batch[unsure]
            begun = self._clock()
            if begun - start + times[steps.num_models].quantile(self.quantile) > deadline:
                break
            answer = _step(steps)
        return Answer(logits, num_models, ready, self._clock() - start, deadline)

    def _sure(self, answer: Tensor, votes: Tensor) -> Tensor:
        """Which answers [B, L] are sure enough, given the models that name each class [B, L]."""
        probability, label = answer.softmax(-1).max(-1)
        sure = torch.zeros_like(label, dtype=torch.bool)
        if self.confidence is not None:
            sure |= probability >= self.confidence
        if self.agreement is not None:
            sure |= votes.gather(1, label[:, None])[:, 0] >= self.agreement
        return sure


class _Times:
    """The last times of a step, as they came and by size."""

    def __init__(self, window: int) -> None:
        self._recent = deque[float](maxlen=window)
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent[0])]
        self._recent.append(seconds)
        bisect.insort(self._sorted, seconds)

    def quantile(self, share: float) -> float:
        """The smallest time that at least this share of them does not exceed; 0 where nothing is known."""
        return self._sorted[math.ceil(share * len(self._sorted)) - 1] if self._sorted else 0.0


def _step(steps: Anytime) -> Tensor:
    """The next answer, when it is ready."""
    _, logits = next(steps)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return logits


def _count(votes: Tensor | None, steps: Anytime) -> Tensor:
    """How many models name each class [B, L], the last one included."""
    assert steps.member is not None
    vote = F.one_hot(steps.member.argmax(-1), steps.member.shape[-1])
    return vote if votes is None else votes + vote
