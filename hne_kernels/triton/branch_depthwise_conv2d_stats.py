"""The depthwise convolution that normalises what it reads and leaves statistics of what it writes."""

from __future__ import annotations

from torch import Tensor

from .. import checks, stats_convolution
from . import training
from .branch_depthwise_conv2d import launch, weigh
from .launch import check_pixels, op
from .statistics import combine


@op
def branch_depthwise_conv2d_stats(
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
    """See :func:`hne_kernels.branch_depthwise_conv2d_stats`."""
    shape = stats_convolution.check(
        x, weight, mean, scale, shift, activation, stride, padding, replicate, depthwise=True
    )
    check_pixels("x", shape)
    y = x.new_empty(shape)
    unit, parts = training.forwards(y, (mean, scale, shift), activation)
    launch(x, weight, y, x.shape[0], replicate, stride, padding, training=unit)
    return y, *combine(*parts, y)


@op
def branch_depthwise_conv2d_stats_backward_input(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, scale and shift of :func:`branch_depthwise_conv2d_stats`."""
    shape = stats_convolution.check(
        x, weight, mean, scale, shift, activation, stride, padding, replicate, depthwise=True
    )
    above = (grad, grad_mean, grad_var, y, y_mean)
    checks.shape("grad", grad, shape, checks.CONV_INPUT)
    checks.same_kind("x", x, grad=grad)
    training.check_above(above)
    check_pixels("x", x.shape)
    grad_x = x.new_empty(x.shape)
    unit, parts = training.to_input(above, x, (mean, scale, shift), activation)
    launch(grad, weight, grad_x, x.shape[0], replicate, stride, padding, transposed=True, training=unit)
    return grad_x, *training.sums(x, parts)


@op
def branch_depthwise_conv2d_stats_backward_weight(
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
    stride: int,
    padding: int,
    replicate: int,
) -> Tensor:
    """The gradient of the weight of :func:`branch_depthwise_conv2d_stats`."""
    above, normalization = (grad, grad_mean, grad_var, y, y_mean), (mean, scale, shift)
    training.check_weight_gradient(
        above, x, normalization, activation, x.shape[4], kernel_size, stride, padding, replicate
    )
    unit = training.to_weight(above, normalization, activation)
    return weigh(grad, x, kernel_size, stride, padding, replicate, unit)


stats_convolution.differentiate("triton_branch_depthwise_conv2d_stats")
