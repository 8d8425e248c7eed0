"""Anytime inference that averages probabilities instead of logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..averages import check_average


class Steps(Protocol):
    """The answers of ``model.anytime(x)``, see :class:`hne.executors.Anytime`."""

    @property
    def num_models(self) -> int: ...
    @property
    def member(self) -> Tensor | None: ...
    def __iter__(self) -> Iterator[tuple[int, Tensor]]: ...
    def __next__(self) -> tuple[int, Tensor]: ...
    def select(self, samples: Tensor) -> None: ...


class AnytimeModel(Protocol):
    """A model or :class:`hne.runtime.AnytimeSession`."""

    def anytime(self, x: Tensor, /) -> Steps: ...


def anytime_steps(model: AnytimeModel, x: Tensor, average: str) -> Steps:
    """Anytime inference: ``(n, y)`` for n = 1, 2, ..., where ``y`` are the logits of the first n members' ensemble.

    Args:
        model: As for :class:`hne.AnytimePredictor`.
        x: Images ``[B, C, H, W]``.
        average: A name of :data:`hne.averages.AVERAGES`: ``y`` ``[B, L]`` are the mean of the members' logits, or the
            logarithms of the mean of their probabilities.

    Raises:
        ValueError: ``average`` is unknown.
    """
    check_average(average)
    steps = model.anytime(x)
    return steps if average == "logits" else _Mixtures(steps)


class _Mixtures(Iterator[tuple[int, Tensor]]):
    """The same steps with the log-probabilities of the members' mixture, in float32 at least."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._sum: Tensor | None = None  # logarithm of the sum of the probabilities

    @property
    def num_models(self) -> int:
        return self._steps.num_models

    @property
    def member(self) -> Tensor | None:
        return self._steps.member

    def __next__(self) -> tuple[int, Tensor]:
        n, _ = next(self._steps)
        member = self._steps.member
        assert member is not None  # after a step
        new = member.to(torch.promote_types(member.dtype, torch.float32)).log_softmax(-1)
        self._sum = new if self._sum is None else torch.logaddexp(self._sum, new)
        return n, self._sum - math.log(n)

    def select(self, samples: Tensor) -> None:
        self._steps.select(samples)
        assert self._sum is not None  # select() has raised without an answer
        self._sum = self._sum[samples.to(self._sum.device)]
