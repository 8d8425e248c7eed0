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

from .. import autocast, checks

PER_CHANNEL = "[branches, channels]"


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the statistics of ``x`` and of what is made of them: float32, for float64 float64."""
    return torch.promote_types(x.dtype, torch.float32)


def check_normalization(x: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> None:
    """Raise unless there are all three of ``mean``, ``scale``, ``shift``, as the channels of ``x`` want, or none."""
    check_together(x, x.shape[0], x.shape[4], mean=mean, scale=scale, shift=shift)


def check_together(x: Tensor, branches: int, channels: int, **vectors: Tensor | None) -> bool:
    """Raise unless there are all ``vectors``, with a value for every channel, or none; whether there are."""
    given = [name for name, vector in vectors.items() if vector is not None]
    if len(given) not in (0, len(vectors)):
        raise ValueError(f"{given[0]}: expected with all of {', '.join(vectors)}, got {', '.join(given)} alone")
    for name, vector in vectors.items():
        if vector is not None:
            check_vector(name, vector, x, branches, channels)
    return bool(given)


def check_vector(name: str, vector: Tensor, x: Tensor, branches: int, channels: int) -> None:
    """Raise unless ``vector`` has a value for every channel, as the statistics of ``x`` are kept."""
    checks.shape(name, vector, (branches, channels), PER_CHANNEL)
    if vector.device != x.device:
        raise ValueError(f"{name}: expected to be on the device of x, {x.device}, got {vector.device}")
    if vector.dtype != statistics_dtype(x):
        raise TypeError(f"{name}: expected {statistics_dtype(x)} (the statistics of a {x.dtype} x), got {vector.dtype}")


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
    """Register fake, autograd and autocast of ``op`` and ``op_backward``."""

    @torch.library.register_fake(f"hne::{op}")
    def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        shape = check(x, weight, *rest, depthwise=depthwise)
        statistics = [x.new_empty(shape[0], shape[4], dtype=statistics_dtype(x)) for _ in range(2)]
        return x.new_empty(shape), statistics[0], statistics[1]

    @torch.library.register_fake(f"hne::{op}_backward")
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        need_input, need_weight = rest[-2:]
        vector = mean.shape if mean is not None and need_input else 0
        return (
            x.new_empty(x.shape if need_input else 0),
            x.new_empty(vector, dtype=statistics_dtype(x)),
            x.new_empty(vector, dtype=statistics_dtype(x)),
            weight.new_empty(weight.shape if need_weight else 0),
        )

    differentiate(op)


def differentiate(op: str) -> None:
    """Register autograd and autocast of ``op``, whose gradient is the op ``op_backward``."""
    backward_op = getattr(torch.ops.hne, f"{op}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, mean, scale, shift, ctx.activation, *ctx.geometry = inputs
        y, y_mean, _ = output
        ctx.save_for_backward(x, weight, mean, scale, shift, y, y_mean)

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, mean, scale, shift, y, y_mean = ctx.saved_tensors
        need_x, need_weight, *need_vectors = ctx.needs_input_grad[:5]
        need_input = need_x or any(need_vectors)
        normalization = (mean, scale, shift, ctx.activation)
        grad_x, grad_scale, grad_shift, grad_weight = backward_op(
            *grads, y, y_mean, weight, x, *normalization, *ctx.geometry, need_input, need_weight
        )
        vectors = (None, None, None)
        if mean is not None and need_input:
            vectors = (-scale * grad_shift if need_vectors[0] else None, grad_scale, grad_shift)
        return grad_x if need_input else None, grad_weight if need_weight else None, *vectors, None, None, None, None

    torch.library.register_autograd(f"hne::{op}", backward, setup_context=setup)
    no_double_backward(f"{op}_backward", op)
    autocast.register(op, tensors=2)


def no_double_backward(backward_op: str, op: str) -> None:
    """Differentiating ``backward_op`` raises, and says what to do instead."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{op}: double backward is not implemented; use the reference backend, "
            'with hne_kernels.use_backend("reference")'
        )

    torch.library.register_autograd(f"hne::{backward_op}", refuse)
