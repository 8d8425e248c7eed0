"""What an ensemble averages: its members' logits, their probabilities, or in a regression their Gaussians."""

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


def mixture(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of an equal mixture of Gaussians (Lakshminarayanan et al. 2017).

    The variance is the mean of the members' variances plus the population variance of their means.

    Args:
        mean, variance: ``[N, ...]``, of the members.

    Returns:
        ``[...]`` and ``[...]``, in float32 at least.
    """
    mean, variance = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (mean, variance))
    return mean.mean(0), variance.mean(0) + mean.var(0, correction=0)


def prefix_gaussians(mean: Tensor, variance: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance of the mixture of the first n Gaussians, for each n of ``sizes``.

    Args:
        mean, variance: ``[N, B]``, of the members.
        sizes: each n, from 1 to N.

    Returns:
        ``[len(sizes), B]`` and ``[len(sizes), B]``, in float32 at least.
    """
    means, variances = zip(*(mixture(mean[:n], variance[:n]) for n in sizes), strict=True)
    return torch.stack(means), torch.stack(variances)


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
