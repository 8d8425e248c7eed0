"""The end of a bottleneck, from the map before its last convolution, and the convolution that begins the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import autocast, checks, dispatch
from .branch_conv2d_moments import check as check_unit
from .stats_convolution import check_together, check_vector, no_double_backward, statistics_dtype


def branch_projection(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    out_mean: Tensor,
    out_scale: Tensor,
    out_shift: Tensor,
    *,
    activation: str = "none",
    out_activation: str = "none",
    residual: Tensor | None = None,
    residual_mean: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    next_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``z = out_activation((conv(s) - out_mean) * out_scale + out_shift + residual)``, and with a ``next_weight``
    ``y = next_conv(z)`` with mean and variance of ``y``; ``s = activation((x - mean) * scale + shift)``.

    ``out_mean`` is of :func:`branch_conv2d_moments`, as is what ``out_scale`` is made of. On a CPU the wide map
    ``conv(s)`` is never written, and not kept for the way back: what its gradient sums is made of ``s``. Other
    backends compute one after the other.

    Args:
        x: features ``[G, B, H, W, C_in]``.
        weight: filters ``[G, C_out, C_in, 1, 1]``, dtype of ``x``.
        mean, scale, shift: ``[G, C_in]``, float32 (float64 for a float64 ``x``).
        out_mean, out_scale, out_shift: the same for the channels of ``conv(s)``, ``[G, C_out]``.
        activation, out_activation: ``none``, ``relu`` or ``relu6``.
        residual: added before the activation, ``[G, B, H, W, C_out]``, dtype of ``x``, or None.
        residual_mean, residual_scale, residual_shift: all three, like ``out_mean``, for a residual that is normalised
            as it is read; or none.
        next_weight: filters ``[G, C_next, C_out, 1, 1]``, dtype of ``x``, or None.

    Returns:
        ``(z, y, mean, var)``: z ``[G, B, H, W, C_out]``; y ``[G, B, H, W, C_next]``, its mean and biased variance
        ``[G, C_next]`` in the dtype of the statistics, 0 for an empty batch; None without a ``next_weight``. All are
        differentiable, once.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: a dtype does not fit.
        RuntimeError: on double backward, which is not implemented.
    """
    normalization = (mean, scale, shift, activation)
    out = (out_mean, out_scale, out_shift)
    added = (residual_mean, residual_scale, residual_shift)
    arguments = (x, weight, residual, next_weight, *normalization, *out, out_activation, *added)
    check(*arguments)
    if dispatch.select(x) == "cpp":
        z, *y = torch.ops.hne.branch_projection(*arguments)
    else:
        convolve = dispatch.implementation("branch_conv2d_stats", x)
        wide = convolve(x, weight, *normalization, 1, 0, 1)[0]
        normalize = dispatch.implementation("branch_normalize", x)
        summand = residual if residual_mean is None else normalize(residual, *added, None, "none")
        z = normalize(wide, *out, summand, out_activation)
        y = [] if next_weight is None else convolve(z, next_weight, None, None, None, "none", 1, 0, 1)
    return (z, *y) if next_weight is not None else (z, None, None, None)


def projection_pays(x: Tensor, channels: int) -> bool:
    """Whether a pointwise convolution of ``x`` to ``channels`` is quicker by :func:`branch_conv2d_moments` and
    :func:`branch_projection` than written once by :func:`branch_conv2d_stats`: the covariance, too, is a product.
    """
    return 2 * x.shape[4] <= channels and dispatch.select(x) == "cpp"


def check(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    next_weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    out_mean: Tensor,
    out_scale: Tensor,
    out_shift: Tensor,
    out_activation: str,
    residual_mean: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """Check the arguments of :func:`branch_projection` and return the shape of ``z``."""
    shape = check_unit(x, weight, mean, scale, shift, activation)
    checks.activation("out_activation", out_activation)
    for name, vector in (("out_mean", out_mean), ("out_scale", out_scale), ("out_shift", out_shift)):
        check_vector(name, vector, x, shape[0], shape[4])
    normalized = check_together(
        x,
        shape[0],
        shape[4],
        residual_mean=residual_mean,
        residual_scale=residual_scale,
        residual_shift=residual_shift,
    )
    if residual is not None:
        checks.shape("residual", residual, shape, "as the convolution's output")
        checks.same_kind("x", x, residual=residual)
    elif normalized:
        raise ValueError("residual: expected one where residual_mean is given, got None")
    if next_weight is not None:
        checks.pointwise("next_weight", next_weight)
        expected = (shape[0], next_weight.shape[1], shape[4], 1, 1)
        checks.shape("next_weight", next_weight, expected, "[branches, next_channels, out_channels, 1, 1]")
        checks.same_kind("x", x, next_weight=next_weight)
    return shape


@torch.library.register_fake("hne::branch_projection")
def _(
    x: Tensor, weight: Tensor, residual: Tensor | None, next_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = check(x, weight, residual, next_weight, *rest)
    channels = 0 if next_weight is None else next_weight.shape[1]
    statistics = [x.new_empty(shape[0], channels, dtype=statistics_dtype(x)) for _ in range(2)]
    return x.new_empty(shape), x.new_empty(*shape[:4], channels), statistics[0], statistics[1]


@torch.library.register_fake("hne::branch_projection_backward")
def _(*arguments: Any) -> tuple[Tensor, ...]:
    z, (x, weight, _, next_weight, mean), out_mean = arguments[4], arguments[7:12], arguments[15]
    normalized, has_residual = arguments[-4] is not None, arguments[-1]
    vectors = [vector.new_empty(vector.shape) for vector in (mean, mean, out_mean, out_mean)]
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(z.shape if has_residual else 0),
        x.new_empty(0 if next_weight is None else next_weight.shape),
        *vectors,
        out_mean.new_empty(out_mean.shape if normalized else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, next_weight, mean, scale, shift, ctx.activation, *out, ctx.out_activation = inputs[:12]
    z, y, y_mean, _ = output
    ctx.has_residual = residual is not None
    added = inputs[12:]
    read = residual if added[0] is not None else None  # the gradient of a plain sum does not need it
    ctx.save_for_backward(z, y, y_mean, x, weight, read, next_weight, mean, scale, shift, *out, *added)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    *saved, out_mean, out_scale, out_shift, residual_mean, residual_scale, residual_shift = ctx.saved_tensors
    (
        grad_x,
        grad_weight,
        residual,
        following,
        grad_scale,
        grad_shift,
        grad_out_scale,
        grad_out_shift,
        of_residual,
    ) = torch.ops.hne.branch_projection_backward(
        *grads,
        *saved,
        ctx.activation,
        out_mean,
        out_scale,
        out_shift,
        ctx.out_activation,
        residual_mean,
        residual_scale,
        residual_shift,
        ctx.has_residual,
    )
    next_weight, _, scale, _ = saved[6:]
    vectors = (-scale * grad_shift, grad_scale, grad_shift, None)
    out_vectors = (-out_scale * grad_out_shift, grad_out_scale, grad_out_shift, None)
    added: tuple[Any, ...] = (None, None, None)
    if residual_mean is not None:  # the shift of the residual is added as that of the convolution is
        added = (-residual_scale * grad_out_shift, of_residual, grad_out_shift.clone())
    return (
        grad_x,
        grad_weight,
        residual if ctx.has_residual else None,
        None if next_weight is None else following,
        *vectors,
        *out_vectors,
        *added,
    )


torch.library.register_autograd("hne::branch_projection", _backward, setup_context=_setup)
no_double_backward("branch_projection_backward", "branch_projection")
autocast.register("branch_projection", tensors=4)
