"""TEMPORARY shim."""
from __future__ import annotations
from typing import NamedTuple, Any
from torch import Tensor
from .ops.branch_conv2d_moments import branch_conv2d_moments
from .ops.branch_conv2d_stats import branch_conv2d_stats
from .ops.branch_depthwise_conv2d_stats import branch_depthwise_conv2d_stats
from .ops.branch_normalize import branch_normalize
from .ops.branch_projection import branch_projection, projection_pays
from .ops.branch_residual_conv2d_stats import branch_residual_conv2d_stats


class LazyNorm(NamedTuple):
    x: Any
    norm: Any
    activation: str = "none"
    residual: Any = None


class LazyPointwise(NamedTuple):
    x: Any
    weight: Any
    norm: Any
    activation: str = "none"
    residual: Any = None


class ConvStats(NamedTuple):
    x: Any
    weight: Any
    mean: Any
    var: Any

    @property
    def count(self):
        x = self.x.x if isinstance(self.x, LazyNorm) else self.x
        return x.shape[1:4].numel()

    def normalize(self, norm, activation="none", residual=None):
        if self.weight is not None:
            affine = isinstance(residual, LazyNorm) and residual.activation == "none" and residual.residual is None
            return LazyPointwise(self.x, self.weight, norm, activation, residual if affine or residual is None else materialize(residual))
        return LazyNorm(self.x, norm, activation, None if residual is None else materialize(residual))


def _vec(n):
    return dict(zip(("mean", "scale", "shift"), n.unbind(0)))


def _pointwise(x, next_weight=None):
    added = x.residual
    res = {"residual": added}
    if isinstance(added, LazyNorm):
        m, s, b = added.norm.unbind(0)
        res = {"residual": added.x, "residual_mean": m, "residual_scale": s, "residual_shift": b}
    m, s, b = x.norm.unbind(0)
    return [r for r in branch_projection(x.x.x, x.weight, **_vec(x.x.norm), activation=x.x.activation, out_mean=m, out_scale=s, out_shift=b, out_activation=x.activation, next_weight=next_weight, **res) if r is not None]


def materialize(x):
    if isinstance(x, LazyPointwise):
        return _pointwise(x)[0]
    if isinstance(x, Tensor):
        return x
    return branch_normalize(x.x, *x.norm.unbind(0), residual=x.residual, activation=x.activation)


def conv_stats(x, weight, *, stride=1, padding=0, replicate=1):
    if isinstance(x, LazyNorm) and x.residual is None and weight.dim() == 5 and weight.shape[-1] == stride == replicate == 1 and projection_pays(x.x, weight.shape[1]):
        mean, var = branch_conv2d_moments(x.x, weight, **_vec(x.norm), activation=x.activation)
        return ConvStats(x, weight, mean, var)
    f = branch_depthwise_conv2d_stats if weight.dim() == 4 else branch_conv2d_stats
    kw = {}
    if isinstance(x, LazyNorm) and x.residual is None:
        kw = {**_vec(x.norm), "activation": x.activation}
        x = x.x
    y, mean, var = f(materialize(x), weight, **kw, stride=stride, padding=padding, replicate=replicate)
    return ConvStats(y, None, mean, var)


def entry_conv_stats(x, weight, *, stride=1, padding=0, replicate=1):
    if isinstance(x, Tensor) or replicate > 1:
        x = materialize(x)
        return x, conv_stats(x, weight, stride=stride, padding=padding, replicate=replicate)
    if isinstance(x, LazyPointwise):
        x, *y = _pointwise(x, weight)
    else:
        x, *y = branch_residual_conv2d_stats(x.x, weight, **_vec(x.norm), residual=x.residual, activation=x.activation)
    return x, ConvStats(y[0], None, *y[1:])
