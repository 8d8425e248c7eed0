"""All cases, and what tests need to run and judge them."""

from __future__ import annotations

from case import NORMS, STATE, TRAINING_OPS, Case, Inputs, cast, tensors
from checking import Outcome, check, cotangents, evaluate, expected, magnitude
from conv_cases import GEOMETRIES, WIDE_GEOMETRIES, Geometry, convolution
from ensemble_cases import loss, prefix_logits, prefix_mean
from inference_cases import (
    BOTTLENECKS,
    CHAINS,
    FUSED_CONVOLUTIONS,
    LAYERS,
    Bottleneck,
    bottleneck,
    bottleneck_chain,
    fused_convolution,
    layers,
)
from norm_cases import (
    BATCH_NORMS,
    MATERIALIZING,
    NORM_CONV_ACTIVATIONS,
    NORMALIZES,
    POINTWISE_NORM_CONVS,
    POINTWISE_STATS,
    batch_norm,
    materializing_norm_conv,
    norm_conv,
    normalize,
    pointwise_norm_conv,
    pointwise_stats,
)

__all__ = [
    "BOTTLENECKS",
    "CASES",
    "GEOMETRIES",
    "NORMS",
    "STATE",
    "TRAINING_OPS",
    "Bottleneck",
    "Case",
    "Geometry",
    "Inputs",
    "Outcome",
    "bottleneck",
    "cast",
    "check",
    "convolution",
    "cotangents",
    "evaluate",
    "expected",
    "fused_convolution",
    "layers",
    "loss",
    "magnitude",
    "norm_conv",
    "prefix_logits",
    "prefix_mean",
    "representative",
    "tensors",
]

CASES = [
    *(convolution("branch_conv2d", g, bool(i % 2)) for i, g in enumerate(GEOMETRIES)),
    *(convolution("branch_depthwise_conv2d", g, not i % 2) for i, g in enumerate(GEOMETRIES)),
    *(fused_convolution(g, ("none", "relu", "relu6")[i % 3]) for i, g in enumerate([*GEOMETRIES, *FUSED_CONVOLUTIONS])),
    *(bottleneck(b) for b in BOTTLENECKS),
    *CHAINS,
    *LAYERS,
    *(norm_conv(g, NORM_CONV_ACTIVATIONS[i % 4]) for i, g in enumerate(GEOMETRIES)),
    *(norm_conv(g, NORM_CONV_ACTIVATIONS[(i + 1) % 4], depthwise=True) for i, g in enumerate(GEOMETRIES)),
    # Statistics of few input channels: several panels of 16 outputs, tiles that the map does not fill.
    norm_conv(Geometry(1, 2, 2, 13, 15, 3, 24, 3, 2, 1), None),
    norm_conv(Geometry(2, 1, 2, 21, 9, 1, 5, 5, 1, 2), None),
    # Where a mean of squares minus a squared mean would cancel.
    *(norm_conv(Geometry(2, 2, 2, 6, 5, 17, 17, 1, 1, 0), None, depthwise=d, offset=300.0) for d in (False, True)),
    *MATERIALIZING,
    *POINTWISE_STATS,
    *POINTWISE_NORM_CONVS,
    *NORMALIZES,
    *BATCH_NORMS,
    prefix_mean(1, 1, 1, None),
    prefix_mean(2, 3, 5, None),
    prefix_mean(3, 1, 17, None),
    prefix_mean(5, 2, 33, (1, 3, 5)),
    prefix_mean(16, 4, 10, None),
    prefix_mean(16, 2, 100, (3,)),
    prefix_mean(3, 30, 100, None),
    prefix_mean(7, 0, 3, None),
    # More members than a machine word has bits.
    prefix_mean(100, 2, 3, None),
    prefix_mean(70, 1, 5, (32, 33, 65)),
    prefix_logits(1, 1, 1, 1, None, False),
    prefix_logits(2, 3, 17, 5, None, True),
    prefix_logits(3, 1, 33, 17, (2, 3), False),
    prefix_logits(5, 2, 3, 33, (1, 4), True),
    prefix_logits(16, 5, 64, 10, None, True),
    prefix_logits(2, 50, 8, 5, None, True),
    prefix_logits(4, 0, 8, 3, None, True),
    prefix_logits(16, 1, 264, 100, None, True),
    prefix_logits(12, 40, 64, 66, (1, 5), False),
    prefix_logits(48, 17, 16, 66, (20,), True),
    loss(1, 1, 1, 0.5, 2.0),
    loss(1, 3, 5, 0.5, 2.0),
    loss(2, 4, 10, 0.5, 2.0),
    loss(3, 5, 17, 0.75, 1.0),
    loss(5, 2, 33, 1.0, 4.0),
    loss(16, 8, 100, 0.5, 2.0),
    loss(16, 3, 10, 0.0, 2.0, scale=30.0),
    loss(40, 2, 70, 0.5, 2.0),
    loss(16, 3, 10, 0.5, 2.0, scale=1e4),
    *(convolution("branch_conv2d", g, True) for g in WIDE_GEOMETRIES),
    *(fused_convolution(g, "relu6") for g in WIDE_GEOMETRIES),
    *(norm_conv(g, activation) for g, activation in zip(WIDE_GEOMETRIES, ("relu", "relu6"), strict=True)),
    materializing_norm_conv(Geometry(66, 1, 1, 3, 2, 136, 136, 1, 1, 0), "relu", "normalised"),
    materializing_norm_conv(WIDE_GEOMETRIES[1], "relu6", "plain"),
]


def representative(*, differentiable: bool = False) -> list[Case]:
    """One case per op and variant, small but general: several branches and children, odd sizes, every option used."""
    chosen = [
        convolution("branch_conv2d", Geometry(2, 2, 2, 5, 4, 3, 2, 3, 2, 1), True),
        convolution("branch_depthwise_conv2d", Geometry(2, 2, 2, 5, 4, 3, 3, 3, 2, 1), True),
        norm_conv(Geometry(2, 2, 2, 5, 4, 3, 2, 3, 2, 1), "relu"),
        norm_conv(Geometry(2, 2, 2, 5, 4, 3, 3, 3, 2, 1), "relu6", depthwise=True),
        materializing_norm_conv(Geometry(2, 1, 2, 3, 2, 3, 4, 1, 1, 0), "relu", "normalised"),
        materializing_norm_conv(Geometry(2, 2, 2, 5, 4, 3, 2, 3, 2, 1), "relu", "plain"),
        pointwise_stats((2, 2, 3, 2, 3), 4, "relu"),
        pointwise_norm_conv((2, 2, 3, 2, 3), 4, 2, ("relu", "relu"), "normalised"),
        normalize((2, 2, 3, 2, 3), "relu", "normalised"),
        batch_norm(2, 3, flat=False, total=True, momentum=0.25, least_var=8.0),
        fused_convolution(Geometry(2, 2, 2, 31, 4, 3, 18, 3, 2, 1), "relu"),
        bottleneck(Bottleneck(2, 2, 2, 5, 4, 3, 5, 18, 3, 2, "shortcut", "relu", "relu")),
        bottleneck_chain(
            "general",
            Bottleneck(2, 2, 3, 5, 4, 8, 8, 8, 3, 1, "shortcut", "relu", "relu"),
            Bottleneck(4, 1, 3, 5, 4, 8, 8, 8, 3, 1, "identity", "relu6", "none"),
            pool=True,
        ),
        prefix_mean(5, 2, 3, (1, 2, 4)),
        prefix_logits(5, 2, 3, 4, None, True),
        loss(5, 3, 4, 0.5, 2.0),
    ]
    return [case for case in chosen if case.differentiable or not differentiable]
