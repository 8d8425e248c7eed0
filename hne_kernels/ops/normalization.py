"""Checks of normalisations and batch statistics, shared by the training ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import autograd, checks

LAYOUT = "[3 (mean, scale, shift), branches, channels]"
PER_CHANNEL = "[branches, channels]"


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of normalisations and batch statistics of ``x``: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_norm(name: str, norm: Tensor, x: Tensor, channels: int) -> None:
    """Raise unless ``norm`` is a normalisation ``[3, G, channels]`` for feature maps with the branches of ``x``."""
    check_statistics(name, norm, x, (3, x.shape[0], channels), LAYOUT)


def check_statistics(name: str, tensor: Tensor, x: Tensor, shape: Sequence[int], layout: str) -> None:
    """Raise unless ``tensor`` has this shape, the device of ``x`` and the dtype of its statistics."""
    checks.shape(name, tensor, shape, layout)
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected to be on the device of x, {x.device}, got {tensor.device}")
    if tensor.dtype != statistics_dtype(x):
        raise TypeError(f"{name}: expected {statistics_dtype(x)} (the statistics of a {x.dtype} x), got {tensor.dtype}")


def no_double_backward(backward_op: str, op: str) -> None:
    """Let the derivative of ``backward_op`` raise an error that names an alternative."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{op}: double backward is not implemented; use the reference backend, "
            'with hne_kernels.use_backend("reference")'
        )

    autograd.register(backward_op, refuse)
