"""The convolution kernels, dense and depthwise, that normalise their input and write statistics of their output."""

from __future__ import annotations

from torch import Tensor

from .. import checks
from ..ops.branch_norm_conv2d import check, differentiate
from .batch_statistics import combine
from .branch_conv2d import launch as launch_dense
from .branch_conv2d import strides
from .branch_conv2d import weigh as weigh_dense
from .branch_depthwise_conv2d import launch as launch_depthwise
from .branch_depthwise_conv2d import weigh as weigh_depthwise
from .conv_norm import ConvNorm, backward_input, backward_weight, check_output, forward, norm_gradient
from .launch import check_pixels, op


def _convolve(
    source: Tensor, weight: Tensor, out: Tensor, parents: int, replicate: int, stride: int, padding: int, *,
    transposed: bool, conv_norm: ConvNorm,
) -> None:  # fmt: skip
    """Write the convolution of ``source``, transposed or not, to ``out``."""
    if weight.dim() == 4:
        launch_depthwise(
            source, weight, out, parents, replicate, stride, padding, transposed=transposed, conv_norm=conv_norm
        )
        return
    launch_dense(
        source, weight, strides(weight, transposed=transposed), out, parents, weight.shape[0], replicate,
        weight.shape[4], stride, padding, transposed=transposed, conv_norm=conv_norm,
    )  # fmt: skip


def _check_plain(z: Tensor | None, residual: bool, materialize: bool) -> None:
    if z is not None or residual or materialize:
        raise ValueError("materialize: expected False, as this op has no kernel for it")


@op
def branch_norm_conv2d(
    x: Tensor, weight: Tensor, norm: Tensor | None, residual: Tensor | None, activation: str,
    stride: int, padding: int, replicate: int, materialize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hne_kernels.branch_norm_conv2d`; without ``materialize``, so that z is empty."""
    shape = check(x, weight, norm, residual, activation, stride, padding, replicate, materialize)
    _check_plain(None, residual is not None, materialize)
    check_pixels("x", shape)
    y = x.new_empty(shape)
    conv_norm, partials = forward(y, norm, activation)
    _convolve(x, weight, y, x.shape[0], replicate, stride, padding, transposed=False, conv_norm=conv_norm)
    return y, *combine(*partials, y), x.new_empty(0)


@op
def branch_norm_conv2d_backward(
    grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor, grad_z: Tensor | None, y: Tensor, y_mean: Tensor,
    z: Tensor | None, x: Tensor, weight: Tensor, norm: Tensor | None, activation: str,
    stride: int, padding: int, replicate: int, has_residual: bool, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight, norm and residual of :func:`branch_norm_conv2d`, empty where not needed."""
    _check_plain(z, has_residual, grad_z is not None)
    shape = check(x, weight, norm, None, activation, stride, padding, replicate, False)
    output = (grad_y, grad_mean, grad_var, y, y_mean)
    checks.shape("grad_y", grad_y, shape, checks.CONV_INPUT)
    checks.same_kind("x", x, grad_y=grad_y)
    check_output(output)
    check_pixels("x", x.shape)
    grad_x, grad_weight, grad_norm = x.new_empty(0), weight.new_empty(0), y_mean.new_empty(0)
    if need_input:
        grad_x = x.new_empty(x.shape)
        conv_norm, partials = backward_input(output, x, norm, activation)
        _convolve(grad_y, weight, grad_x, x.shape[0], replicate, stride, padding, transposed=True, conv_norm=conv_norm)
        if norm is not None and partials is not None:
            grad_norm = norm_gradient(norm, *partials)
    if need_weight:
        weigh = weigh_depthwise if weight.dim() == 4 else weigh_dense
        conv_norm = backward_weight(output, norm, activation)
        grad_weight = weigh(grad_y, x, weight.shape[-1], stride, padding, replicate, conv_norm)
    return grad_x, grad_weight, grad_norm, x.new_empty(0)


differentiate("triton_branch_norm_conv2d")
