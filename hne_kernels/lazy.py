"""Features that are normalised where they are read: a training step needs no normalised feature map in memory.

A convolution gives its output and the statistics of the output (:func:`conv_stats`); batch norm makes a normalisation
of the statistics; :meth:`ConvStats.normalize` attaches it to the output, and the next convolution applies it where it
reads. Every function here calls ops, and is differentiable as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from . import dispatch
from .ops.branch_norm_conv2d import branch_norm_conv2d
from .ops.branch_normalize import branch_normalize
from .ops.branch_pointwise_norm_conv2d import branch_pointwise_norm_conv2d
from .ops.branch_pointwise_stats import branch_pointwise_stats


class LazyNorm(NamedTuple):
    """``activation((x - mean) * scale + shift + residual)``, not computed yet.

    Args:
        x: features ``[G, B, H, W, C]``.
        norm: ``[3, G, C]``, the rows mean, scale and shift, float32 (float64 for a float64 ``x``).
        activation: ``none``, ``relu`` or ``relu6``.
        residual: like ``x``, or None.
        residual_norm: like ``norm``, for a residual that is normalised where it is added; or None.
    """

    x: Tensor
    norm: Tensor
    activation: str = "none"
    residual: Tensor | None = None
    residual_norm: Tensor | None = None


class LazyPointwise(NamedTuple):
    """A 1x1 convolution deferred to its reader, so that its wide output need not be stored.

    ``activation((conv(x) - mean) * scale + shift + residual)``.

    Args:
        x: the input of the convolution, without a residual.
        weight: filters ``[G, C_out, C_in, 1, 1]``.
        norm: normalisation of the convolution's output, ``[3, G, C_out]``.
        activation: ``none``, ``relu`` or ``relu6``.
        residual: features ``[G, B, H, W, C_out]`` or their normalisation (without activation and residual), or None.
    """

    x: LazyNorm
    weight: Tensor
    norm: Tensor
    activation: str = "none"
    residual: Tensor | LazyNorm | None = None


Features = Tensor | LazyNorm | LazyPointwise


class ConvStats(NamedTuple):
    """A convolution and the batch statistics of its output.

    Args:
        x: the output ``[G, B, H, W, C]``; or, where the convolution is deferred, its input.
        weight: the filters of a deferred convolution, else None.
        mean, var: mean and biased variance of the output over batch, height and width, ``[G, C]``.
    """

    x: Tensor | LazyNorm
    weight: Tensor | None
    mean: Tensor
    var: Tensor

    @property
    def count(self) -> int:  # type: ignore[override]
        """The number of values that each mean is taken over."""
        x = self.x.x if isinstance(self.x, LazyNorm) else self.x
        return x.shape[1] * x.shape[2] * x.shape[3]  # numel() would be a constant when traced

    def normalize(
        self, norm: Tensor, activation: str = "none", residual: Features | None = None
    ) -> LazyNorm | LazyPointwise:
        """``activation((output - mean) * scale + shift + residual)``, computed where it is read.

        Args:
            norm: ``[3, G, C]``, the rows mean, scale and shift.
            activation: ``none``, ``relu`` or ``relu6``.
            residual: features like the output.
        """
        added: Tensor | LazyNorm | None
        if isinstance(residual, LazyPointwise):
            added = branch_pointwise_norm_conv2d(**_arguments(residual))[0]
        # The op that adds a residual normalises it, too, but has no activation for it.
        elif isinstance(residual, LazyNorm) and not _is_affine(residual):
            added = branch_normalize(**residual._asdict())
        else:
            added = residual
        if isinstance(self.x, LazyNorm):
            assert self.weight is not None
            return LazyPointwise(self.x, self.weight, norm, activation, added)
        if isinstance(added, LazyNorm):
            return LazyNorm(self.x, norm, activation, added.x, added.norm)
        return LazyNorm(self.x, norm, activation, added)


def conv_stats(x: Features, weight: Tensor, *, stride: int = 1, padding: int = 0, replicate: int = 1) -> ConvStats:
    """A branch convolution of ``x`` and the batch statistics of its output.

    Args:
        x: features ``[G, B, H, W, C_in]``; normalised where they are read, if they are lazy.
        weight: filters ``[G', C_out, C_in, k, k]``, or ``[G', C, k, k]`` for a depthwise convolution.
        stride, padding, replicate: as in :func:`branch_conv2d`.

    Raises:
        ValueError, TypeError: as :func:`branch_norm_conv2d`.
    """
    read: Tensor | LazyNorm  # written out instead of calling materialize(): every Python frame of a call costs time
    if isinstance(x, LazyPointwise):
        read = branch_pointwise_norm_conv2d(**_arguments(x))[0]
    elif isinstance(x, LazyNorm) and x.residual is not None:
        read = branch_normalize(**x._asdict())
    else:
        read = x
    if isinstance(read, Tensor):
        y, mean, var = branch_norm_conv2d(read, weight, stride=stride, padding=padding, replicate=replicate)
    elif _is_pointwise(weight, stride, padding, replicate) and _is_deferred(read.x, weight):
        return ConvStats(read, weight, *branch_pointwise_stats(read.x, weight, read.norm, activation=read.activation))
    else:
        y, mean, var = branch_norm_conv2d(
            *(read.x, weight, read.norm),
            activation=read.activation,
            stride=stride,
            padding=padding,
            replicate=replicate,
        )
    return ConvStats(y, None, mean, var)


def entry_conv_stats(
    x: Features, weight: Tensor, *, stride: int = 1, padding: int = 0, replicate: int = 1
) -> tuple[Tensor, ConvStats]:
    """:func:`conv_stats` of features that have other readers, too: the first result is ``x`` as a tensor.

    The gradients of the readers are added where the convolution's is computed. That takes features that are not
    computed yet, as those of a block are, and a dense convolution.
    """
    if isinstance(x, Tensor):
        z = x
    elif isinstance(x, LazyPointwise):
        if _is_pointwise(weight, stride, padding, replicate):
            z, y, mean, var = branch_pointwise_norm_conv2d(**_arguments(x), next_weight=weight)
            return z, ConvStats(y, None, mean, var)
        z = branch_pointwise_norm_conv2d(**_arguments(x))[0]
    elif weight.dim() == 5:
        z, y, mean, var = branch_norm_conv2d(
            weight=weight,
            **x._asdict(),
            stride=stride,
            padding=padding,
            replicate=replicate,
            materialize=True,
        )
        return z, ConvStats(y, None, mean, var)
    else:
        z = branch_normalize(**x._asdict())
    y, mean, var = branch_norm_conv2d(z, weight, stride=stride, padding=padding, replicate=replicate)
    return z, ConvStats(y, None, mean, var)


def materialize(x: Features) -> Tensor:
    """The features as a tensor ``[G, B, H, W, C]``."""
    if isinstance(x, LazyPointwise):
        return branch_pointwise_norm_conv2d(**_arguments(x))[0]
    return x if isinstance(x, Tensor) else branch_normalize(**x._asdict())


def _arguments(x: LazyPointwise) -> dict[str, Any]:
    """The arguments of :func:`branch_pointwise_norm_conv2d` for ``x``."""
    arguments = {
        "x": x.x.x,
        "weight": x.weight,
        "norm": x.x.norm,
        "activation": x.x.activation,
        "out_norm": x.norm,
        "out_activation": x.activation,
    }
    if isinstance(x.residual, LazyNorm):
        return arguments | {"residual": x.residual.x, "residual_norm": x.residual.norm}
    return arguments | {"residual": x.residual}


def _is_pointwise(weight: Tensor, stride: int, padding: int, replicate: int) -> bool:
    return weight.dim() == 5 and weight.shape[3] == 1 and (stride, padding, replicate) == (1, 0, 1)


def _is_deferred(x: Tensor, weight: Tensor) -> bool:
    """Whether a 1x1 convolution of ``x`` is faster where its output is read.

    Its statistics then cost a product for the covariance of ``x``, which pays where the output is twice as wide.
    """
    return 2 * x.shape[4] <= weight.shape[1] and dispatch.has_kernel("branch_pointwise_stats", x)


def _is_affine(x: LazyNorm) -> bool:
    return x.activation == "none" and x.residual is None
