"""Temperature scaling (Guo et al. 2017), with a temperature for each ensemble size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..averages import AVERAGES, check_average
from ._checks import check_logits, check_target

LOWEST, HIGHEST = 1e-2, 1e2
_STEPS = 60  # of a bisection: the error is below the precision of float64


def nested_logits(members: Tensor, average: str = "logits") -> Tensor:
    """Logits of the ensembles of the first 1, 2, ... N members.

    Args:
        members: Logits of the members ``[N, B, L]``.
        average: What an ensemble averages, a name of :data:`hne.averages.AVERAGES`: ``logits``, or ``probabilities``,
            whose logarithms are returned then.

    Returns:
        ``[N, B, L]``, in float32 at least.

    Raises:
        ValueError: There is no sample, a logit is not finite, or ``average`` is unknown.
    """
    check_logits("members", members)
    check_average(average)
    members = members.to(torch.promote_types(members.dtype, torch.float32))
    return AVERAGES[average](members, range(1, len(members) + 1))


def fit_temperatures(logits: Tensor, target: Tensor) -> tuple[float, ...]:
    """The temperature T of each ensemble for which ``softmax(logits / T)`` has the lowest negative log-likelihood.

    The likelihood is concave in 1 / T; its derivative is bisected between 0.01 and 100. Where all samples are right,
    it has no maximum: the result is the largest T with a likelihood of 1 up to rounding.

    Args:
        logits: ``[P, B, L]``, one ensemble per row.
        target: Classes ``[B]``, int64.

    Returns:
        P temperatures.

    Raises:
        ValueError: The shapes do not fit, there is no sample, or a logit is not finite.
    """
    check_logits("logits", logits)
    check_target(target, logits)
    logits = logits.double()
    right = logits.gather(2, target.expand(len(logits), -1)[..., None])[..., 0]
    # d/d(1/T) of the mean log-likelihood: the right logit minus its expectation under the softmax
    low, high = (torch.full((len(logits),), 1 / t, dtype=torch.float64) for t in (HIGHEST, LOWEST))
    low, high = low.to(logits.device), high.to(logits.device)
    for _ in range(_STEPS):
        middle = (low * high).sqrt()
        expected = ((logits * middle[:, None, None]).softmax(-1) * logits).sum(-1)
        rising = (right - expected).mean(1) > 0
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return tuple((1 / (low * high).sqrt()).tolist())


def scaled_logits(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """The logits ``[P, B, L]`` of each ensemble divided by its temperature.

    Raises:
        ValueError: There is another number of temperatures, or one is not above 0.
    """
    if len(temperatures) != len(logits):
        raise ValueError(f"temperatures: expected {len(logits)}, one for each ensemble, got {len(temperatures)}")
    if not all(0 < t < float("inf") for t in temperatures):
        raise ValueError(f"temperatures: expected finite numbers above 0, got {list(temperatures)}")
    return logits / torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)[:, None, None]
