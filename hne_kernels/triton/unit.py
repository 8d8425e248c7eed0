"""The ops of a training unit around a convolution, dense or depthwise: it normalises what it reads, and leaves
statistics of what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import checks
from ..ops import stats_convolution
from . import training
from .launch import check_pixels, op
from .statistics import combine


def define(name: str, convolve: Callable[..., None], weigh: Callable[..., Tensor], *, depthwise: bool) -> Any:
    """Register the op ``name`` and its gradient, and return it.

    Args:
        convolve: ``(source, weight, out, parents, replicate, stride, padding, transposed=, training=)`` writes ``out``.
        weigh: ``(grad, x, kernel_size, stride, padding, replicate, training)`` is the gradient of the weight.
    """

    def forward(
        x: Tensor,
        weight: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        activation: str,
        stride: int,
        padding: int,
        replicate: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = stats_convolution.check(
            x, weight, mean, scale, shift, activation, stride, padding, replicate, depthwise=depthwise
        )
        check_pixels("x", shape)
        y = x.new_empty(shape)
        unit, parts = training.forwards(y, (mean, scale, shift), activation)
        convolve(x, weight, y, x.shape[0], replicate, stride, padding, transposed=False, training=unit)
        return y, *combine(*parts, y)

    def backward(
        grad: Tensor,
        grad_mean: Tensor,
        grad_var: Tensor,
        y: Tensor,
        y_mean: Tensor,
        weight: Tensor,
        x: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        activation: str,
        stride: int,
        padding: int,
        replicate: int,
        need_input: bool,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = stats_convolution.check(
            x, weight, mean, scale, shift, activation, stride, padding, replicate, depthwise=depthwise
        )
        above, normalization = (grad, grad_mean, grad_var, y, y_mean), (mean, scale, shift)
        checks.shape("grad", grad, shape, checks.CONV_INPUT)
        checks.same_kind("x", x, grad=grad)
        training.check_above(above)
        check_pixels("x", x.shape)
        grad_x, grad_weight = (like.new_empty(0) for like in (x, weight))
        grad_scale, grad_shift = training.sums(x, None)
        if need_input:
            grad_x = x.new_empty(x.shape)
            unit, parts = training.to_input(above, x, normalization, activation)
            convolve(grad, weight, grad_x, x.shape[0], replicate, stride, padding, transposed=True, training=unit)
            grad_scale, grad_shift = training.sums(x, parts)
        if need_weight:
            unit = training.to_weight(above, normalization, activation)
            grad_weight = weigh(grad, x, weight.shape[-1], stride, padding, replicate, unit)
        return grad_x, grad_scale, grad_shift, grad_weight

    ops: dict[str, Callable[..., Any]] = {"": forward, "_backward": backward}
    for suffix, function in ops.items():
        function.__name__ = name + suffix
    unit, *_ = map(op, ops.values())
    stats_convolution.differentiate(f"triton_{name}")
    return unit
