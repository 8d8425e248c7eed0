"""What an ensemble averages: its members' logits, or their probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hne_kernels import prefix_mean


def prefix_mixtures(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """Log-probabilities of the mixture of the first n members, the mean of their probabilities.

    Args:
        logits: ``[N, B, L]``, of the members.
        sizes: each n, from 1 to N.

    Returns:
        ``[len(sizes), B, L]``, in float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sums = logits.log_softmax(-1).logcumsumexp(0)
    return torch.stack([sums[n - 1] - math.log(n) for n in sizes])


AVERAGES: dict[str, Callable[[Tensor, Sequence[int]], Tensor]] = {
    "logits": prefix_mean,  # as in the HNE paper
    "probabilities": prefix_mixtures,  # as usual for deep ensembles and MC dropout, and in torch-uncertainty
}
"""From the members' logits ``[N, B, L]`` to those of the ensembles of the first n, for each of some sizes."""


def check_average(average: str) -> None:
    """Check that ``average`` is a name of :data:`AVERAGES`.

    Raises:
        ValueError: It is not.
    """
    if average not in AVERAGES:
        raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}")
