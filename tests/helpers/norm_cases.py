"""Cases of the training ops around a normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from case import KINK, Case, Inputs, normal
from conv_cases import Geometry
from torch import Tensor

import hne_kernels as K


def _away_from_kinks(x: Tensor, norm: Tensor, residual: Tensor | float = 0.0) -> Tensor:
    """``x`` moved to where the normalised values are not near 0 or 6, where an activation bends."""
    mean, scale, shift = norm[:, :, None, None, None].unbind()
    shift = shift + residual
    normal_x = (x - mean) * scale + shift
    for kink in (0, 6):
        near = (normal_x - kink).abs() < 2 * KINK
        normal_x = torch.where(near, kink + 3 * KINK, normal_x)
    return (normal_x - shift) / scale + mean


def normalization(rng: torch.Generator, branches: int, channels: int) -> Tensor:
    """Mean, scale and shift ``[3, branches, channels]``; no scale is near 0."""
    scale = normal(rng, branches, channels).sign() * (0.5 + normal(rng, branches, channels).abs())
    return torch.stack([normal(rng, branches, channels), scale, normal(rng, branches, channels)])


def norm_conv(geometry: Geometry, activation: str | None, *, depthwise: bool = False, offset: float = 0.0) -> Case:
    """A convolution between two batch norms; without an activation, one that does not normalise.

    ``offset`` moves the mean of all feature maps.
    """
    g = geometry
    channels = (g.ci,) if depthwise else (g.co, g.ci)

    def make(rng: torch.Generator) -> Inputs:
        x = normal(rng, g.G, g.B, g.H, g.W, g.ci) + offset
        inputs: Inputs = {"x": x, "weight": normal(rng, g.branches, *channels, g.k, g.k), **g.options()}
        inputs |= {"norm": None, "residual": None, "residual_norm": None}
        inputs |= {"activation": activation or "none", "materialize": False}
        if activation is not None:
            norm = normalization(rng, g.G, g.ci)
            norm[0] += offset
            inputs |= {"x": _away_from_kinks(x, norm), "norm": norm}
        return inputs

    forward = g.k**2 * (1 if depthwise else g.ci) + 1
    backward = g.k**2 * g.r * (1 if depthwise else g.co)
    # Rounded on the way to a gradient: the normalised input, the output, its gradient, the result.
    return Case(
        "branch_norm_conv2d",
        f"{g}-{activation or 'as-it-is'}" + (f"-offset{offset:g}" if offset else ""),
        make,
        ("x", "weight") if activation is None else ("x", "weight", "norm"),
        forward + backward + g.positions + g.B * g.H * g.W + 16,
        roundings=4,
        naive_roundings=6,
        variant="depthwise" if depthwise else "dense",
    )


NORM_CONV_ACTIVATIONS = ("relu", None, "relu6", "none")


RESIDUALS = {"none": (), "plain": ("residual",), "normalised": ("residual", "residual_norm")}  # inputs by kind


def _residual(rng: torch.Generator, shape: Sequence[int], kind: str) -> tuple[Inputs, Tensor | float]:
    """The inputs of a residual of this kind, and the values that are added."""
    if kind == "none":
        return {"residual": None, "residual_norm": None}, 0.0
    residual = normal(rng, *shape)
    if kind == "plain":
        return {"residual": residual, "residual_norm": None}, residual
    norm = normalization(rng, shape[0], shape[-1])
    mean, scale, shift = norm[:, :, None, None, None].unbind()
    return {"residual": residual, "residual_norm": norm}, (residual - mean) * scale + shift


def materializing_norm_conv(geometry: Geometry, activation: str, residual: str) -> Case:
    """The end of one bottleneck and the convolution that begins the next.

    The residual is ``plain``, ``normalised`` or ``none``.
    """
    g = geometry

    def make(rng: torch.Generator) -> Inputs:
        shape = (g.G, g.B, g.H, g.W, g.ci)
        norm = normalization(rng, g.G, g.ci)
        inputs, added = _residual(rng, shape, residual)
        return {
            "x": _away_from_kinks(normal(rng, *shape), norm, added),
            "weight": normal(rng, g.branches, g.co, g.ci, g.k, g.k),
            "norm": norm,
            **inputs,
            "activation": activation,
            **g.options(),
            "materialize": True,
        }

    pointwise = (g.k, g.stride, g.padding, g.r) == (1, 1, 0, 1)
    return Case(
        "branch_norm_conv2d",
        f"{g}-{activation}-{residual}",
        make,
        ("x", "weight", "norm", *RESIDUALS[residual]),
        g.k**2 * (g.ci + g.r * g.co) + g.positions + g.B * g.H * g.W + 16,
        roundings=5,
        naive_roundings=8,
        variant="materialize" if pointwise else "materialize-window",
    )


MATERIALIZING = [
    materializing_norm_conv(Geometry(1, 1, 1, 1, 1, 1, 1, 1, 1, 0), "none", "plain"),
    materializing_norm_conv(Geometry(1, 1, 2, 2, 1, 3, 2, 1, 1, 0), "relu", "plain"),
    materializing_norm_conv(Geometry(3, 1, 1, 7, 7, 33, 17, 1, 1, 0), "relu", "plain"),
    materializing_norm_conv(Geometry(2, 1, 3, 8, 7, 16, 40, 1, 1, 0), "relu6", "plain"),
    materializing_norm_conv(Geometry(2, 1, 0, 4, 4, 8, 3, 1, 1, 0), "relu", "plain"),
    materializing_norm_conv(Geometry(1, 1, 2, 9, 13, 64, 16, 1, 1, 0), "relu6", "none"),
    materializing_norm_conv(Geometry(5, 1, 2, 5, 3, 5, 33, 1, 1, 0), "none", "none"),
    # The residual is a shortcut that is normalised where it is added.
    materializing_norm_conv(Geometry(1, 1, 1, 1, 1, 1, 1, 1, 1, 0), "relu", "normalised"),
    materializing_norm_conv(Geometry(2, 1, 3, 8, 7, 16, 72, 1, 1, 0), "relu6", "normalised"),
    materializing_norm_conv(Geometry(3, 1, 1, 7, 7, 33, 17, 1, 1, 0), "none", "normalised"),
    materializing_norm_conv(Geometry(2, 1, 0, 4, 4, 8, 3, 1, 1, 0), "relu", "normalised"),
    # Children, strides and windows.
    materializing_norm_conv(Geometry(2, 2, 2, 6, 5, 72, 40, 1, 1, 0), "relu", "plain"),
    materializing_norm_conv(Geometry(3, 4, 1, 7, 7, 3, 17, 1, 2, 0, missing=3), "relu", "normalised"),
    materializing_norm_conv(Geometry(1, 2, 3, 7, 9, 16, 24, 3, 2, 1), "relu6", "normalised"),
    materializing_norm_conv(Geometry(2, 3, 1, 9, 5, 5, 3, 5, 3, 2), "none", "plain"),
    materializing_norm_conv(Geometry(2, 1, 2, 6, 7, 17, 33, 2, 2, 0), "relu", "none"),
    materializing_norm_conv(Geometry(5, 2, 0, 7, 7, 5, 3, 3, 1, 1), "relu", "normalised"),
]


def pointwise_stats(shape: Sequence[int], out_channels: int, activation: str, offset: float = 0.0) -> Case:
    """Statistics of a pointwise convolution; ``offset`` moves the mean of its input."""
    branches, batch, height, width, channels = shape

    def make(rng: torch.Generator) -> Inputs:
        norm = normalization(rng, branches, channels)
        norm[2] += offset
        return {
            "x": _away_from_kinks(normal(rng, *shape), norm),
            "weight": normal(rng, branches, out_channels, channels, 1, 1),
            "norm": norm,
            "activation": activation,
        }

    positions = batch * height * width
    return Case(
        "branch_pointwise_stats",
        f"{'x'.join(map(str, shape))}to{out_channels}-{activation}" + (f"-offset{offset:g}" if offset else ""),
        make,
        ("x", "weight", "norm"),
        2 * channels + 2 * out_channels + 2 * positions + 16,
        roundings=4,
        naive_roundings=6,
    )


POINTWISE_STATS = [
    pointwise_stats((1, 1, 1, 1, 1), 1, "none"),
    pointwise_stats((1, 2, 2, 1, 3), 2, "relu"),
    pointwise_stats((3, 1, 7, 7, 33), 17, "relu"),
    pointwise_stats((2, 3, 8, 7, 16), 40, "relu6"),
    pointwise_stats((2, 0, 4, 4, 8), 3, "relu"),
    pointwise_stats((1, 4, 9, 13, 16), 64, "relu", offset=100.0),
    pointwise_stats((5, 2, 5, 3, 5), 33, "none"),
]


def pointwise_norm_conv(
    shape: Sequence[int], out_channels: int, next_channels: int, activations: tuple[str, str], residual: str
) -> Case:
    """The end of a bottleneck from the feature map before its last convolution, and the convolution after it.

    Without ``next_channels`` no convolution follows. The residual is ``plain``, ``normalised`` or ``none``.
    """
    branches, batch, height, width, channels = shape
    activation, out_activation = activations

    def make(rng: torch.Generator) -> Inputs:
        norm, out_norm = normalization(rng, branches, channels), normalization(rng, branches, out_channels)
        inputs: Inputs = {
            "x": _away_from_kinks(normal(rng, *shape), norm),
            "weight": normal(rng, branches, out_channels, channels, 1, 1),
            "norm": norm,
            "out_norm": out_norm,
            "activation": activation,
            "out_activation": out_activation,
            "residual": None,
            "residual_norm": None,
            "next_weight": None,
        }
        if residual != "none":
            added = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)[:, None, None]
            if residual == "normalised":
                added = inputs["residual_norm"] = normalization(rng, branches, out_channels)
            with K.use_backend("reference"):
                before = {**inputs, "out_activation": "none", "residual_norm": None}
                sums = K.branch_pointwise_norm_conv2d(**before)[0]
            inputs["residual"] = _away_from_kinks(normal(rng, *sums.shape), added, sums)
        if next_channels:
            inputs["next_weight"] = normal(rng, branches, next_channels, out_channels, 1, 1)
        return inputs

    positions = batch * height * width
    following = ("next_weight",) if next_channels else ()
    return Case(
        "branch_pointwise_norm_conv2d",
        f"{'x'.join(map(str, shape))}to{out_channels}to{next_channels}-{activation}-{out_activation}-{residual}",
        make,
        ("x", "weight", "norm", "out_norm", *RESIDUALS[residual], *following),
        2 * channels + 2 * out_channels + next_channels + 2 * positions + 16,
        roundings=6,
        naive_roundings=12,
    )


POINTWISE_NORM_CONVS = [
    pointwise_norm_conv((1, 1, 1, 1, 1), 1, 1, ("none", "none"), "plain"),
    pointwise_norm_conv((1, 2, 2, 1, 3), 2, 2, ("relu", "relu"), "normalised"),
    pointwise_norm_conv((3, 1, 7, 7, 17), 33, 5, ("relu", "relu"), "plain"),
    pointwise_norm_conv((2, 3, 8, 7, 16), 40, 16, ("relu6", "relu6"), "normalised"),
    pointwise_norm_conv((2, 0, 4, 4, 8), 3, 2, ("relu", "relu"), "normalised"),
    pointwise_norm_conv((2, 2, 5, 3, 5), 33, 0, ("relu", "relu"), "plain"),
    pointwise_norm_conv((1, 2, 9, 13, 16), 64, 7, ("relu6", "none"), "none"),
    pointwise_norm_conv((5, 2, 5, 3, 5), 6, 0, ("none", "none"), "none"),
]


def batch_norm(
    branches: int,
    channels: int,
    count: int = 12,
    *,
    flat: bool = True,
    affine: bool = True,
    tracked: bool = True,
    total: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    least_var: float = 0.1,
) -> Case:
    """A batch norm over ``count`` values per channel, with parameters ``[G * C]`` or, if not ``flat``, ``[G, C]``."""
    shape = (branches * channels,) if flat else (branches, channels)

    def make(rng: torch.Generator) -> Inputs:
        return {
            "mean": normal(rng, branches, channels),
            "var": normal(rng, branches, channels).square() + least_var,
            "weight": normal(rng, *shape) if affine else None,
            "bias": normal(rng, *shape) if affine else None,
            "running_mean": normal(rng, *shape) if tracked else None,
            "running_var": normal(rng, *shape).square() if tracked else None,
            "num_batches_tracked": torch.tensor([5]) if tracked else None,
            "total": torch.tensor([float(count)], dtype=torch.float64) if total else None,
            "count": 3 if total else count,
            "momentum": momentum,
            "eps": eps,
        }

    options = {"matrix": not flat, "plain": not affine, "untracked": not tracked, "total": total}
    name = "-".join([f"{branches}x{channels}", f"count{count}", *(key for key, used in options.items() if used)])
    return Case(
        "batch_norm_scale_shift",
        f"{name}-momentum{momentum:g}-eps{eps:g}",
        make,
        ("mean", "var", "weight", "bias") if affine else ("mean", "var"),
        16,
        roundings=2,
        naive_roundings=4,
        plain_results=3 if tracked else 0,
    )


BATCH_NORMS = [
    batch_norm(1, 1),
    batch_norm(2, 3, flat=False),
    batch_norm(3, 17, 2, momentum=0.9),
    batch_norm(5, 33, 1),
    batch_norm(2, 8, 0),
    batch_norm(1, 130, 128 * 64, total=True, flat=False, eps=1e-3),
    batch_norm(2, 20, affine=False, momentum=0.0),
    batch_norm(3, 6, tracked=False, eps=0.1),
    batch_norm(7, 16, affine=False, tracked=False),
    batch_norm(4, 257, total=True, momentum=1.0),
    batch_norm(0, 4),
    batch_norm(1, 16, 2, total=True),
]


def normalize(shape: Sequence[int], activation: str, residual: str, offset: float = 0.0) -> Case:
    """A normalisation; ``offset`` moves the mean of ``x``. The residual is ``plain``, ``normalised`` or ``none``."""

    def make(rng: torch.Generator) -> Inputs:
        branches, channels = shape[0], shape[-1]
        mean, scale, shift = (normal(rng, branches, channels, scale=factor) for factor in (1, 2, 2))
        inputs, _ = _residual(rng, shape, residual)
        if inputs["residual"] is not None:
            inputs["residual"] *= 2
        return {
            "x": normal(rng, *shape) + offset,
            "norm": torch.stack([mean + offset, scale, shift]),
            **inputs,
            "activation": activation,
        }

    name = "x".join(map(str, shape)) + f"-{activation}-{residual}"
    return Case(
        "branch_normalize",
        f"{name}-offset{offset:g}" if offset else name,
        make,
        ("x", "norm", *RESIDUALS[residual]),
        shape[1] * shape[2] * shape[3] + 6,
        naive_roundings=2 if residual != "normalised" else 4,
    )


NORMALIZES = [
    normalize((1, 1, 1, 1, 1), "none", "none"),
    normalize((1, 2, 1, 1, 3), "none", "plain"),
    normalize((2, 3, 5, 4, 17), "relu", "none"),
    normalize((3, 1, 7, 7, 33), "relu", "plain"),
    normalize((5, 2, 4, 3, 5), "relu6", "none"),
    normalize((2, 2, 8, 8, 16), "relu6", "plain"),
    normalize((2, 0, 4, 4, 8), "relu", "plain"),
    normalize((1, 4, 9, 7, 64), "relu", "plain"),
    # The gradient of the scale is a sum of deviations, not a difference of sums.
    normalize((2, 2, 6, 5, 17), "none", "none", offset=300.0),
    # The residual is a shortcut that is normalised where it is added.
    normalize((1, 1, 1, 1, 1), "relu", "normalised"),
    normalize((3, 1, 7, 7, 33), "relu", "normalised"),
    normalize((2, 2, 8, 8, 16), "relu6", "normalised"),
    normalize((2, 0, 4, 4, 8), "none", "normalised"),
    normalize((1, 4, 9, 7, 64), "none", "normalised"),
]
