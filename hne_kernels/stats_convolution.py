"""What the convolutions of a training unit share: checks, shape inference, autograd and autocast.

A unit is ``y = conv(activation((x - mean) * scale + shift))`` and the batch statistics of ``y``. With ``scale`` and
``shift`` made of the statistics of the convolution before, a chain of units is a network with batch norm in which no
normalised map is ever stored: statistics are differentiable results like ``y``, so autograd finds the gradient of batch
norm by itself, on tensors of one value per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import autocast, checks

PER_CHANNEL = "[branches, channels]"


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the statistics of ``x`` and of what is made of them: float32, for float64 float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_normalization(x: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> None:
    """Raise unless there are all three of ``mean``, ``scale``, ``shift``, as the channels of ``x`` want, or none."""
    vectors = {"mean": mean, "scale": scale, "shift": shift}
    given = [name for name, vector in vectors.items() if vector is not None]
    if len(given) not in (0, 3):
        raise ValueError(f"{given[0]}: expected with mean, scale and shift all given or none, got {', '.join(given)}")
    for name, vector in vectors.items():
        if vector is None:
            continue
        checks.shape(name, vector, (x.shape[0], x.shape[4]), PER_CHANNEL)
        if vector.device != x.device:
            raise ValueError(f"{name}: expected to be on the device of x, {x.device}, got {vector.device}")
        if vector.dtype != statistics_dtype(x):
            raise TypeError(
                f"{name}: expected {statistics_dtype(x)} (the statistics of a {x.dtype} x), got {vector.dtype}"
            )


def check(
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    stride: int,
    padding: int,
    replicate: int,
    *,
    depthwise: bool,
) -> tuple[int, int, int, int, int]:
    """Check the arguments of a unit and return the shape of ``y``."""
    shape = checks.convolution(x, weight, None, stride, padding, replicate, depthwise=depthwise)
    checks.activation("activation", activation)
    check_normalization(x, mean, scale, shift)
    if mean is None and activation != "none":
        raise ValueError(f"activation: expected none where x is not normalised (no mean given), got {activation!r}")
    return shape


def register(op: str, *, depthwise: bool) -> None:
    """Register fake, autograd and autocast of ``op``, ``op_backward_input`` and ``op_backward_weight``."""

    @torch.library.register_fake(f"hne::{op}")
    def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape = check(x, weight, *rest, depthwise=depthwise)
        statistics = [x.new_empty(shape[0], shape[4], dtype=statistics_dtype(x)) for _ in range(2)]
        return x.new_empty(shape), statistics[0], statistics[1]

    @torch.library.register_fake(f"hne::{op}_backward_input")
    def _(
        grad: Tensor,
        grad_mean: Tensor,
        grad_var: Tensor,
        y: Tensor,
        y_mean: Tensor,
        weight: Tensor,
        x: Tensor,
        mean: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        vectors = [x.new_empty(0 if mean is None else mean.shape, dtype=statistics_dtype(x)) for _ in range(2)]
        return x.new_empty(x.shape), vectors[0], vectors[1]

    @torch.library.register_fake(f"hne::{op}_backward_weight")
    def _(
        grad: Tensor,
        grad_mean: Tensor,
        grad_var: Tensor,
        y: Tensor,
        y_mean: Tensor,
        x: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        activation: str,
        kernel_size: int,
        *rest: Any,
    ) -> Tensor:
        channels = (grad.shape[4],) if depthwise else (grad.shape[4], x.shape[4])
        return grad.new_empty(grad.shape[0], *channels, kernel_size, kernel_size)

    differentiate(op)


def differentiate(op: str) -> None:
    """Register autograd and autocast of ``op``; its gradient is the ops ``op_backward_input`` and ``.._weight``."""
    backward_input = getattr(torch.ops.hne, f"{op}_backward_input")
    backward_weight = getattr(torch.ops.hne, f"{op}_backward_weight")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, mean, scale, shift, ctx.activation, *ctx.geometry = inputs
        y, y_mean, _ = output
        ctx.save_for_backward(x, weight, mean, scale, shift, y, y_mean)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, mean, scale, shift, y, y_mean = ctx.saved_tensors
        need_x, need_weight, *need_vectors = ctx.needs_input_grad[:5]
        from_above = (*grads, y, y_mean)
        normalization = (mean, scale, shift, ctx.activation)
        grad_x = grad_weight = grad_mean = grad_scale = grad_shift = None
        if need_x or any(need_vectors):
            grad_x, grad_scale, grad_shift = backward_input(*from_above, weight, x, *normalization, *ctx.geometry)
        if mean is None:
            grad_scale = grad_shift = None
        elif need_vectors[0]:
            grad_mean = -scale * grad_shift
        if need_weight:
            grad_weight = backward_weight(*from_above, x, *normalization, weight.shape[-1], *ctx.geometry)
        return grad_x, grad_weight, grad_mean, grad_scale, grad_shift, None, None, None, None

    torch.library.register_autograd(f"hne::{op}", backward, setup_context=setup)
    for name in ("backward_input", "backward_weight"):
        no_double_backward(f"{op}_{name}", op)
    autocast.register(op, tensors=2)


def no_double_backward(backward_op: str, op: str) -> None:
    """Differentiating ``backward_op`` raises, and says what to do instead."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{op}: double backward is not implemented; use the reference backend, "
            'with hne_kernels.use_backend("reference")'
        )

    torch.library.register_autograd(f"hne::{backward_op}", refuse)
