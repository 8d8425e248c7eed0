"""The convolution kernels, dense and depthwise, that normalise their input and write statistics of their output."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .. import checks
from ..ops.branch_norm_conv2d import check, differentiate
from .batch_statistics import combine, partial_statistics
from .branch_conv2d import launch as launch_dense
from .branch_conv2d import strides
from .branch_conv2d import weigh as weigh_dense
from .branch_depthwise_conv2d import launch as launch_depthwise
from .branch_depthwise_conv2d import weigh as weigh_depthwise
from .branch_normalize import compute
from .conv_norm import ConvNorm, backward_input, backward_weight, check_output, forward, norm_gradient
from .launch import check_pixels, contiguous, op


def _convolve(
    source: Tensor, weight: Tensor, out: Tensor, parents: int, replicate: int, stride: int, padding: int, *,
    transposed: bool, conv_norm: ConvNorm, added: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the convolution of ``source``, transposed or not, to ``out``; a dense one with ``added``."""
    if weight.dim() == 4:
        launch_depthwise(
            source, weight, out, parents, replicate, stride, padding, transposed=transposed, conv_norm=conv_norm
        )
        return
    launch_dense(
        source, weight, strides(weight, transposed=transposed), out, parents, weight.shape[0], replicate,
        weight.shape[4], stride, padding, transposed=transposed, residual=added, conv_norm=conv_norm,
    )  # fmt: skip


@op
def branch_norm_conv2d(
    x: Tensor, weight: Tensor, norm: Tensor | None, residual: Tensor | None, residual_norm: Tensor | None,
    activation: str, stride: int, padding: int, replicate: int, materialize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`hne_kernels.branch_norm_conv2d`; the last result is empty unless ``materialize``."""
    shape = check(x, weight, norm, residual, residual_norm, activation, stride, padding, replicate, materialize)
    check_pixels("x", shape)
    z = x.new_empty(0)
    source = x
    if materialize and norm is not None:
        source = z = compute(x, norm, residual, residual_norm, activation)
        norm, activation = None, "none"
    y = x.new_empty(shape)
    conv_norm, partials = forward(y, norm, activation)
    _convolve(source, weight, y, x.shape[0], replicate, stride, padding, transposed=False, conv_norm=conv_norm)
    return y, *combine(*partials, y), z


@op
def branch_norm_conv2d_backward(
    grad_y: Tensor, grad_mean: Tensor, grad_var: Tensor, grad_z: Tensor | None, y: Tensor, y_mean: Tensor,
    z: Tensor | None, x: Tensor, weight: Tensor, norm: Tensor | None, residual: Tensor | None,
    residual_norm: Tensor | None, activation: str, stride: int, padding: int, replicate: int,
    has_residual: bool, need_input: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight, norm, residual and residual_norm of :func:`branch_norm_conv2d`, empty where not
    needed.

    The residual is only read together with its normalisation.
    """
    shape = check(
        x, weight, norm, residual, residual_norm, activation, stride, padding, replicate, z is not None
    )  # fmt: skip
    if residual_norm is not None and not has_residual:
        raise ValueError("has_residual: expected True with residual_norm, got False")
    output = (grad_y, grad_mean, grad_var, y, y_mean)
    checks.shape("grad_y", grad_y, shape, checks.CONV_INPUT)
    checks.same_kind("x", x, grad_y=grad_y, grad_z=grad_z, z=z)
    if (grad_z is None) != (z is None):
        raise ValueError("grad_z: expected with z")
    for name, tensor in (("grad_z", grad_z), ("z", z)):
        if tensor is not None:
            checks.shape(name, tensor, tuple(x.shape), "as x")
    check_output(output)
    check_pixels("x", x.shape)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    grad_norm, grad_residual, grad_residual_norm = y_mean.new_empty(0), x.new_empty(0), y_mean.new_empty(0)
    if need_input:
        grad_x = x.new_empty(x.shape)
        conv_norm, partials = backward_input(output, x, norm, activation)
        if z is not None:
            grad_residual = x.new_empty(x.shape if has_residual else 0)
            conv_norm = replace(
                conv_norm,
                stored=z.contiguous(),
                grad_residual=grad_residual if has_residual else None,
                residual=contiguous(residual),
                residual_norm=contiguous(residual_norm),
                residual_partial=None if residual_norm is None else partial_statistics(x)[0],
            )
        _convolve(
            grad_y, weight, grad_x, x.shape[0], replicate, stride, padding,
            transposed=True, conv_norm=conv_norm, added=grad_z,
        )  # fmt: skip
        if norm is not None and partials is not None:
            grad_norm = norm_gradient(norm, *partials)
            if residual_norm is not None and conv_norm.residual_partial is not None:
                grad_residual_norm = norm_gradient(residual_norm, partials[0], conv_norm.residual_partial)
    if need_weight:
        weigh = weigh_depthwise if weight.dim() == 4 else weigh_dense
        source = x
        if z is not None:
            source, norm, activation = z, None, "none"
        conv_norm = backward_weight(output, norm, activation)
        grad_weight = weigh(grad_y, source, weight.shape[-1], stride, padding, replicate, conv_norm)
    return grad_x, grad_weight, grad_norm, grad_residual, grad_residual_norm


differentiate("triton_branch_norm_conv2d")
