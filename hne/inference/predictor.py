"""Anytime inference with a deadline, or until the answer is certain enough."""

from __future__ import annotations

import bisect
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import functional as F

from ..averages import check_average
from ..models import HNE, QuantizedHNE
from .anytime_average import Steps, anytime_steps


@dataclass(frozen=True)
class Answer:
    """The answer of an :class:`AnytimePredictor` for a batch. Times are seconds from the start of the call.

    Attributes:
        logits: For each sample, the logits of the ensemble of the models in its answer, ``[B, L]``: the mean of their
            logits, or the logarithms of the mean of their probabilities.
        num_models: For each sample, the number of these models, ``[B]`` int64.
        ready: Time when the logits were ready.
        returned: Time when the answer was returned; later than ``ready`` if a further model missed the deadline.
        deadline: The deadline; infinite if there is none.
        temperatures: Of the ensembles of the first 1, 2, ... models.
    """

    logits: Tensor
    num_models: Tensor
    ready: float
    returned: float
    deadline: float
    temperatures: tuple[float, ...]

    @property
    def probabilities(self) -> Tensor:
        """For each sample, the probabilities of the classes: ``softmax(logits / temperature)``, ``[B, L]``."""
        temperatures = torch.tensor(self.temperatures, dtype=self.logits.dtype, device=self.logits.device)
        return (self.logits / temperatures[self.num_models - 1, None]).softmax(-1)

    @property
    def late(self) -> bool:
        """Whether the answer missed the deadline: the first model, which is always evaluated, took too long."""
        return self.ready > self.deadline


class AnytimePredictor:
    """Evaluates a tree leaf by leaf until the deadline, or until every sample's answer is certain enough.

    A leaf is evaluated only if it is predicted to end before the deadline. The time of each leaf is measured before the
    first answer for a batch shape, and updated by every answer as long as all its samples are in the batch. The first
    leaf is always evaluated; ``Answer.late`` is true if it missed the deadline. A later leaf that misses the deadline
    is not part of the answer.

    A sample whose answer is certain enough leaves the batch. Later leaves are computed only for the other samples.

    Args:
        model: A model in eval mode.
        deadline_ms: Milliseconds for each batch; None for no deadline. A call may set another one.
        confidence: A sample is certain when the ensemble gives its predicted class at least this probability.
        temperatures: Of the ensembles of the first 1, 2, ... N members (see :mod:`hne.calibration`): the probabilities
            are ``softmax(logits / temperature)``. By default those in ``model.metadata``, which ``hne calibrate``
            leaves in a checkpoint, if they are of the same ``average``; without any, no scaling.
        average: What an ensemble averages, ``logits`` or ``probabilities``. By default what ``hne calibrate`` has
            calibrated, else logits.
        agreement: A sample is certain when this many of its models (2 or more) predict the ensemble's class.
        quantile: The predicted time of a leaf is this quantile of its measured times.
        window: Number of latest times that are kept for each leaf.
        clock: Returns the time in seconds; tests pass their own.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        model: HNE | QuantizedHNE,
        *,
        deadline_ms: float | None = None,
        confidence: float | None = None,
        agreement: int | None = None,
        temperatures: Sequence[float] | None = None,
        average: str | None = None,
        quantile: float = 0.99,
        window: int = 400,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        _check("deadline_ms", deadline_ms, lambda ms: ms > 0, "a number above 0")
        _check("confidence", confidence, lambda p: 0 < p <= 1, "a probability above 0")
        _check("agreement", agreement, lambda k: 2 <= k <= model.num_models, f"2 to {model.num_models} models")
        _check("quantile", quantile, lambda q: 0 < q <= 1, "a share above 0", required=True)
        _check("window", window, lambda w: w >= 1, "a whole number above 0", required=True)
        if agreement is not None:
            _check_whole("agreement", agreement)
        _check_whole("window", window)
        self.model = model
        self.deadline_ms = deadline_ms
        self.confidence = confidence
        self.agreement = agreement
        calibration = model.metadata.get("calibration", {})
        calibrated = calibration.get("average", "logits")
        self.average = calibrated if average is None else average
        check_average(self.average)
        if temperatures is None:
            fitted = calibration.get("temperatures") if self.average == calibrated else None
            temperatures = (1.0,) * model.num_models if fitted is None else fitted
        self.temperatures = tuple(temperatures)
        if len(self.temperatures) != model.num_models:
            raise ValueError(f"temperatures: expected {model.num_models}, got {len(self.temperatures)}")
        for temperature in self.temperatures:
            _check("temperatures", temperature, lambda t: t > 0, "numbers above 0", required=True)
        self.quantile = quantile
        self._window = int(window)
        self._clock = clock
        self._times: dict[torch.Size, list[_Times]] = {}

    def expected(self, shape: torch.Size) -> list[float]:
        """Predicted seconds of each leaf for a batch of shape ``[B, C, H, W]`` that has been measured before."""
        return [times.quantile(self.quantile) for times in self._times[shape]]

    @torch.inference_mode()
    def calibrate(self, x: Tensor, *, runs: int = 100, seconds: float = 3.0) -> None:
        """Measure every leaf on the batch ``x`` ``[B, C, H, W]``.

        The first call for a batch shape does this, too. Calibrate beforehand if that call has to be fast.

        Args:
            x: Any images; the times depend only on their shape.
            runs: Number of measurements of each leaf.
            seconds: Time limit; no measurement starts after it.

        Raises:
            ValueError: ``runs`` is below 1, or ``seconds`` is not above 0.
        """
        _check("runs", runs, lambda number: number >= 1, "a whole number above 0", required=True)
        _check("seconds", seconds, lambda limit: limit > 0, "a number above 0", required=True)
        _check_whole("runs", runs)
        for _ in self.model.anytime(x):
            pass  # warm up: folded weights, memory, threads
        self._times.setdefault(x.shape, [_Times(self._window) for _ in range(self.model.num_models)])
        start = self._clock()
        for _ in range(runs):
            self._answer(x, math.inf, early_exit=False)
            if self._clock() - start > seconds:
                break

    @torch.inference_mode()
    def __call__(self, x: Tensor, deadline_ms: float | None = None) -> Answer:
        """The answer for the batch ``x``.

        Args:
            x: Images ``[B, C, H, W]`` as in :meth:`HNE.forward`.
            deadline_ms: Milliseconds from the start of the call; the predictor's deadline by default.

        Raises:
            ValueError: ``deadline_ms`` is not a finite number above 0.
        """
        if deadline_ms is not None:
            _check("deadline_ms", deadline_ms, lambda ms: ms > 0, "a number above 0")
        if x.shape not in self._times:
            self.calibrate(x)
        limit = self.deadline_ms if deadline_ms is None else deadline_ms
        return self._answer(x, math.inf if limit is None else limit / 1e3, early_exit=True)

    def _answer(self, x: Tensor, deadline: float, *, early_exit: bool) -> Answer:
        """Evaluate leaves within ``deadline`` seconds; samples leave the batch only if ``early_exit`` is true."""
        times = self._times[x.shape]
        start = leaf_start = self._clock()
        steps = anytime_steps(self.model, x, self.average)
        remaining: Tensor | None = None  # indices of the samples in the batch, once some have left
        votes: Tensor | None = None
        logits = _step(steps)
        num_models = torch.ones(len(x), dtype=torch.long, device=x.device)
        answer = logits
        while True:
            now = self._clock()
            if remaining is None:
                times[steps.num_models - 1].add(now - leaf_start)
            returned = now - start
            if returned > deadline and steps.num_models > 1:  # the last leaf took longer than predicted
                break
            if remaining is None:
                logits = answer
                num_models.fill_(steps.num_models)
            else:
                logits[remaining] = answer
                num_models[remaining] = steps.num_models
            ready = returned
            if steps.num_models == self.model.num_models:
                break
            if early_exit and (self.confidence is not None or self.agreement is not None):
                votes = _count(votes, steps)
                uncertain = (~self._certain(answer, votes, steps.num_models)).nonzero()[:, 0]
                if len(uncertain) == 0:
                    break
                if len(uncertain) < len(answer):
                    steps.select(uncertain)
                    votes = votes[uncertain]
                    remaining = uncertain if remaining is None else remaining[uncertain]
            leaf_start = self._clock()
            if leaf_start - start + times[steps.num_models].quantile(self.quantile) > deadline:
                break
            answer = _step(steps)
        return Answer(logits, num_models, ready, self._clock() - start, deadline, self.temperatures)

    def _certain(self, answer: Tensor, votes: Tensor, num_models: int) -> Tensor:
        """Whether each answer ``[B, L]`` is certain enough, given the votes for each class ``[B, L]``."""
        probability, label = (answer / self.temperatures[num_models - 1]).softmax(-1).max(-1)
        certain = torch.zeros_like(label, dtype=torch.bool)
        if self.confidence is not None:
            certain |= probability >= self.confidence
        if self.agreement is not None:
            certain |= votes.gather(1, label[:, None])[:, 0] >= self.agreement
        return certain


def _check(
    name: str, value: float | None, valid: Callable[[float], bool], expected: str, *, required: bool = False
) -> None:
    """Check that an option is a finite number in its range; None is valid unless it is required."""
    if value is None and not required:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected {expected}, got {value} (it must be finite)")
    if not valid(value):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_whole(name: str, value: float) -> None:
    if not isinstance(value, Integral):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")


class _Times:
    """The latest measured times of a leaf, in seconds."""

    def __init__(self, window: int) -> None:
        self._recent = deque[float](maxlen=window)
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        if len(self._recent) == self._recent.maxlen:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent[0])]
        self._recent.append(seconds)
        bisect.insort(self._sorted, seconds)

    def quantile(self, share: float) -> float:
        """The smallest time that is not exceeded by at least this share of the times; 0 if there are none."""
        return self._sorted[math.ceil(share * len(self._sorted)) - 1] if self._sorted else 0.0


def _step(steps: Steps) -> Tensor:
    """The logits of the next step, when they are ready."""
    _, logits = next(steps)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    return logits


def _count(votes: Tensor | None, steps: Steps) -> Tensor:
    """Add the vote of the latest model to the votes for each class, ``[B, L]``."""
    assert steps.member is not None
    vote = F.one_hot(steps.member.argmax(-1), steps.member.shape[-1])
    return vote if votes is None else votes + vote
