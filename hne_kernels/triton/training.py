"""What a convolution in training reads and writes beside its operands (:mod:`hne_kernels.stats_convolution`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..ops.stats_convolution import PER_CHANNEL
from .launch import contiguous
from .statistics import entries

Above = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # grad, grad_mean, grad_var, y, y_mean
Normalization = tuple[Tensor | None, Tensor | None, Tensor | None]  # mean, scale, shift


@dataclass(frozen=True)
class Training:
    """Arguments of the kernels; the default is a plain convolution.

    Args:
        above: y, its mean, the gradients of its mean and its variance: where the gradient of y is read.
        input: x, where its gradient is written.
        normalization: of x.
        activation: of the normalised x.
        parts: room for two numbers per channel and tile (:func:`.statistics.entries`).
    """

    above: Sequence[Tensor | None] = (None,) * 4
    input: Tensor | None = None
    normalization: Sequence[Tensor | None] = (None,) * 3
    activation: str = "none"
    parts: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)


PLAIN = Training()


def forwards(out: Tensor, normalization: Normalization, activation: str) -> tuple[Training, tuple[Tensor, Tensor]]:
    """Normalise what is read; the second result is where the statistics of ``out`` are left."""
    parts = entries(out)
    return Training(normalization=_contiguous(normalization), activation=activation, parts=parts), parts


def to_input(
    above: Above, x: Tensor, normalization: Normalization, activation: str
) -> tuple[Training, tuple[Tensor, Tensor] | None]:
    """Gradient of x; the second result is where those of shift and scale are left."""
    if normalization[0] is None:
        return Training(above=_above(above)), None
    parts = entries(x)
    return Training(_above(above), x.contiguous(), _contiguous(normalization), activation, parts), parts


def to_weight(above: Above, normalization: Normalization, activation: str) -> Training:
    """Gradient of the weight."""
    return Training(above=_above(above), normalization=_contiguous(normalization), activation=activation)


def sums(x: Tensor, parts: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The gradients of scale and shift; empty where there is no normalisation."""
    if parts is None:
        return x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)
    by_shift, by_scale = parts
    return by_scale.sum(0), by_shift.sum(0)


def _above(above: Above) -> tuple[Tensor, ...]:
    _, grad_mean, grad_var, y, y_mean = above
    return tuple(tensor.contiguous() for tensor in (y, y_mean, grad_mean, grad_var))


def _contiguous(normalization: Normalization) -> tuple[Tensor | None, ...]:
    return tuple(contiguous(vector) for vector in normalization)


def check_above(above: Above) -> None:
    """Raise unless y and the statistics fit ``grad`` [G', B, H', W', C]."""
    grad, grad_mean, grad_var, y, y_mean = above
    checks.same_kind("grad", grad, y=y)
    checks.shape("y", y, tuple(grad.shape), "as grad")
    vectors = {"grad_mean": grad_mean, "grad_var": grad_var, "y_mean": y_mean}
    for name, vector in vectors.items():
        checks.shape(name, vector, (grad.shape[0], grad.shape[4]), PER_CHANNEL)
        if vector.device != grad.device:
            raise ValueError(f"{name}: expected to be on the device of grad, {grad.device}, got {vector.device}")
        if vector.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {vector.dtype}")
