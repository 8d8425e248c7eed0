"""Checks of logits and classes."""

from __future__ import annotations

import torch
from torch import Tensor


def check_logits(name: str, logits: Tensor) -> None:
    """Check that logits are finite numbers ``[P, B, L]`` of at least one sample.

    Raises:
        ValueError: They are not.
    """
    if logits.dim() != 3 or 0 in logits.shape:
        raise ValueError(f"{name}: expected [ensembles, samples, classes], none of them 0, got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"{name}: expected floating-point numbers, got {logits.dtype}")
    if not logits.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def check_target(target: Tensor, logits: Tensor) -> None:
    """Check that there is a class for each sample.

    Raises:
        ValueError: There is not.
    """
    _, samples, classes = logits.shape
    if target.shape != (samples,) or target.dtype != torch.int64:
        raise ValueError(f"target: expected int64 [{samples}], got {target.dtype} {list(target.shape)}")
    if not ((target >= 0) & (target < classes)).all():
        raise ValueError(f"target: expected classes from 0 to {classes - 1}, got {target.min()} to {target.max()}")


def check_share(name: str, value: float) -> None:
    """Check that a number lies between 0 and 1.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"{name}: expected a number above 0 and below 1, got {value!r}")
