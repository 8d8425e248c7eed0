"""The confidence at which a sample is done: accuracy and cost for every choice, on validation data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_logits, check_target


class ExitPoint(NamedTuple):
    """What a confidence gives on the validation split.

    Attributes:
        confidence: A sample is done when an ensemble gives its class at least this probability.
        accuracy: Share of right answers, 0 to 1.
        cost: Mean cost of a sample, in the unit of the costs.
    """

    confidence: float
    accuracy: float
    cost: float


def exit_curve(logits: Tensor, target: Tensor, costs: Sequence[float], *, points: int = 200) -> list[ExitPoint]:
    """Accuracy and mean cost for rising confidences.

    Args:
        logits: Of the ensembles of the first 1, 2, ... N members ``[N, B, L]``, scaled by their temperatures.
        target: Classes ``[B]``, int64.
        costs: Of each ensemble, multiply-adds for instance; rising.
        points: Number of confidences, quantiles of all those that occur before the last member.

    Raises:
        ValueError: The shapes do not fit, or the costs do not rise.
    """
    _check(logits, target, costs)
    earlier = logits[:-1].double().softmax(-1).amax(-1).flatten().sort().values
    places = torch.linspace(0, max(0, len(earlier) - 1), points).round().long().unique()
    choices = [*earlier[places.to(earlier.device)].tolist(), 1.0] if len(earlier) else [1.0]
    return _exit_points(dict.fromkeys(choices), logits, target, costs)


def exit_point(confidence: float, logits: Tensor, target: Tensor, costs: Sequence[float]) -> ExitPoint:
    """Accuracy and mean cost for one confidence; arguments as for :func:`exit_curve`."""
    _check(logits, target, costs)
    (point,) = _exit_points([confidence], logits, target, costs)
    return point


def _exit_points(choices: Iterable[float], logits: Tensor, target: Tensor, costs: Sequence[float]) -> list[ExitPoint]:
    probability, label = logits.double().softmax(-1).max(-1)
    right = (label == target).double()
    price = torch.tensor(costs, dtype=torch.float64, device=logits.device)
    points = []
    for confidence in choices:
        done = probability >= confidence
        done[-1] = True  # there is no further member
        last = done.int().argmax(0, keepdim=True)  # the first ensemble that a sample is done with
        points.append(ExitPoint(confidence, right.gather(0, last).mean().item(), price[last].mean().item()))
    return points


def _check(logits: Tensor, target: Tensor, costs: Sequence[float]) -> None:
    check_logits("logits", logits)
    check_target(target, logits)
    if len(costs) != len(logits) or any(later < earlier for earlier, later in itertools.pairwise(costs)):
        raise ValueError(f"costs: expected {len(logits)} rising numbers, got {list(costs)}")


def choose_confidence(
    curve: Sequence[ExitPoint], *, accuracy: float | None = None, cost: float | None = None
) -> ExitPoint:
    """The point with the lowest cost that reaches an accuracy, or the most accurate one that keeps to a cost.

    Args:
        curve: From :func:`exit_curve`.
        accuracy: The least accuracy, 0 to 1.
        cost: The highest mean cost of a sample.

    Raises:
        ValueError: Not exactly one of them is given, or no point reaches it; the message says what is possible.
    """
    if (accuracy is None) == (cost is None):
        raise ValueError("give accuracy or cost, and not both")
    if accuracy is not None:
        reached = [point for point in curve if point.accuracy >= accuracy]
        if not reached:
            best = max(point.accuracy for point in curve)
            raise ValueError(f"accuracy: at most {best:.4f} is reached on these samples, got {accuracy}")
        return min(reached, key=lambda point: (point.cost, -point.accuracy))
    kept = [point for point in curve if point.cost <= cost]  # type: ignore[operator]
    if not kept:
        raise ValueError(f"cost: a sample costs at least {min(point.cost for point in curve):g}, got {cost}")
    return max(kept, key=lambda point: (point.accuracy, -point.cost))
