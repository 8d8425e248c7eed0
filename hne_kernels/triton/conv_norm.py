"""Operands of the convolution kernels between two batch norms (:mod:`hne_kernels.ops.branch_norm_conv2d`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..ops.normalization import PER_CHANNEL, check_statistics
from .batch_statistics import partial_statistics
from .launch import contiguous

OutputGradient = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # grad_y, grad_mean, grad_var, y, y_mean
Partials = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ConvNorm:
    """Operands of a kernel beside those of a plain convolution, which is the default.

    Args:
        output: y, its mean, the gradients of its mean and its variance, for kernels that read the gradient of y.
        input: x, for the kernel that writes its gradient.
        norm: the normalisation of x, ``[3, G, C]``.
        activation: of the normalised x.
        partials: memory for two numbers per channel and tile (:func:`.batch_statistics.partial_statistics`).
        stored: the normalised x with its residual, if it lies in memory, for the kernel that writes the gradient of x.
        grad_residual: memory for the gradient of the residual.
        residual, residual_norm: the residual, if it is normalised, and its normalisation ``[3, G, C]``.
        residual_partial: memory for one more number per channel and tile, for the gradient of its scale.
    """

    output: Sequence[Tensor | None] = (None,) * 4
    input: Tensor | None = None
    norm: Tensor | None = None
    activation: str = "none"
    partials: Partials | tuple[None, None] = (None, None)
    stored: Tensor | None = None
    grad_residual: Tensor | None = None
    residual: Tensor | None = None
    residual_norm: Tensor | None = None
    residual_partial: Tensor | None = None


PLAIN = ConvNorm()


def forward(y: Tensor, norm: Tensor | None, activation: str) -> tuple[ConvNorm, Partials]:
    """Operands for ``y``, and the partial statistics that its kernel writes."""
    partials = partial_statistics(y)
    return ConvNorm(norm=contiguous(norm), activation=activation, partials=partials), partials


def backward_input(
    output: OutputGradient, x: Tensor, norm: Tensor | None, activation: str
) -> tuple[ConvNorm, Partials | None]:
    """Operands for the gradient of x, and the partial sums for that of the normalisation, if there is one."""
    if norm is None:
        return ConvNorm(output=_output(output)), None
    partials = partial_statistics(x)
    return ConvNorm(_output(output), x.contiguous(), norm.contiguous(), activation, partials), partials


def backward_weight(output: OutputGradient, norm: Tensor | None, activation: str) -> ConvNorm:
    """Operands for the gradient of the weight."""
    return ConvNorm(output=_output(output), norm=contiguous(norm), activation=activation)


def norm_gradient(norm: Tensor, grad_shift: Tensor, grad_scale: Tensor) -> Tensor:
    """The gradient of ``norm`` from the partial sums ``[parts, G, C]`` of the gradients of its shift and scale."""
    grad_shift, grad_scale = grad_shift.sum(0), grad_scale.sum(0)
    return torch.stack([-norm[1] * grad_shift, grad_scale, grad_shift])


def _output(output: OutputGradient) -> tuple[Tensor, ...]:
    _, grad_mean, grad_var, y, y_mean = output
    return tuple(tensor.contiguous() for tensor in (y, y_mean, grad_mean, grad_var))


def check_output(output: OutputGradient) -> None:
    """Raise unless y and the statistics fit ``grad_y`` [G', B, H', W', C]."""
    grad_y, grad_mean, grad_var, y, y_mean = output
    checks.same_kind("grad_y", grad_y, y=y)
    checks.shape("y", y, tuple(grad_y.shape), "as grad_y")
    vectors = {"grad_mean": grad_mean, "grad_var": grad_var, "y_mean": y_mean}
    for name, vector in vectors.items():
        check_statistics(name, vector, y, (y.shape[0], y.shape[4]), PER_CHANNEL)
