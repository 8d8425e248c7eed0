"""Cases of the fused ops for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from case import Case, Inputs, normal
from conv_cases import Geometry
from torch import Tensor

import hne_kernels as K

# Few input channels, as of images: tiles of 128, 256 and 512 pixels, several panels of 16 outputs. Then products of
# few rows, in small tiles of both sizes: several strips of the depth, outputs that fill vectors and outputs that fill
# pairs; and a product of many tiles.
FUSED_CONVOLUTIONS = [
    Geometry(1, 2, 1, 33, 35, 3, 24, 3, 2, 1),
    Geometry(2, 2, 2, 11, 9, 1, 8, 3, 1, 1, missing=1),
    Geometry(1, 3, 2, 13, 13, 4, 40, 3, 2, 1),
    Geometry(1, 1, 3, 19, 23, 4, 17, 4, 2, 2),
    Geometry(1, 1, 1, 24, 25, 1, 16, 7, 3, 3),
    Geometry(1, 70, 2, 15, 32, 3, 16, 3, 1, 1),
    Geometry(1, 70, 2, 8, 31, 2, 8, 3, 1, 1),
    Geometry(1, 1, 0, 16, 16, 3, 16, 3, 1, 1),
    Geometry(2, 2, 3, 1, 1, 264, 100, 1, 1, 0),
    Geometry(16, 1, 1, 1, 1, 256, 16, 1, 1, 0),
    Geometry(3, 2, 40, 1, 1, 520, 176, 1, 1, 0, missing=1),
    Geometry(24, 1, 17, 1, 1, 264, 176, 1, 1, 0),
    Geometry(24, 2, 17, 1, 1, 16, 66, 1, 1, 0),
    Geometry(33, 2, 33, 1, 1, 16, 72, 1, 1, 0),
]


def fused_convolution(
    geometry: Geometry, activation: str, residual_replicate: int = 0, *, scaled: bool = False, variant: str = ""
) -> Case:
    """A convolution, with a residual unless ``residual_replicate`` is 0; ``scaled`` keeps the variance of x."""
    g = geometry

    def make(rng: torch.Generator) -> Inputs:
        weight = normal(rng, g.branches, g.co, g.ci, g.k, g.k, scale=(g.ci * g.k**2) ** -0.5 if scaled else 1.0)
        return {
            "x": normal(rng, g.G, g.B, g.H, g.W, g.ci),
            "weight": K.pack_weight(weight),
            "bias": normal(rng, g.branches, g.co),
            "residual": residual(rng) if residual_replicate else None,
            "activation": activation,
            **g.options(),
            "residual_replicate": max(residual_replicate, 1),
        }

    def residual(rng: torch.Generator) -> Tensor:
        return normal(rng, -(-g.branches // residual_replicate), g.B, *g.out_pixels, g.co)

    summed = int(residual_replicate > 0)
    name = f"{g}-{activation}" + f"-residual{residual_replicate}" * summed
    terms = g.k**2 * g.ci + 1 + summed
    return Case("fused_conv2d", name, make, (), terms, naive_roundings=1 + summed, variant=variant)


# Sums with a residual: a branch of it for one or several output branches, also more than there are. On a GPU, all tiles
# of both matrix products, with and without vectors, and images.
FUSED_SUMS = [
    fused_convolution(Geometry(1, 1, 1, 1, 1, 1, 1, 1, 1, 0), "relu", 1),
    fused_convolution(Geometry(2, 2, 2, 7, 7, 16, 24, 3, 1, 1), "relu", 1),
    fused_convolution(Geometry(2, 3, 2, 9, 7, 16, 24, 3, 2, 1, missing=1), "relu", 3),
    fused_convolution(Geometry(3, 1, 1, 7, 5, 17, 33, 3, 1, 1), "relu6", 2),
    fused_convolution(Geometry(1, 4, 3, 4, 3, 33, 5, 3, 1, 1), "none", 9),
    fused_convolution(Geometry(2, 1, 2, 6, 5, 130, 40, 1, 1, 0), "relu", 1),
    fused_convolution(Geometry(2, 1, 2, 5, 4, 24, 93, 1, 1, 0), "relu", 2),
    fused_convolution(Geometry(1, 2, 2, 9, 17, 3, 17, 3, 1, 1), "relu", 2),
    fused_convolution(Geometry(1, 1, 1, 24, 25, 1, 16, 7, 3, 3), "relu6", 1),
    fused_convolution(Geometry(5, 2, 0, 7, 7, 5, 3, 3, 1, 1), "relu", 2),
    fused_convolution(Geometry(16, 1, 1, 1, 1, 256, 16, 1, 1, 0), "relu", 4),
    fused_convolution(Geometry(3, 2, 40, 1, 1, 520, 176, 1, 1, 0, missing=1), "none", 2),
    fused_convolution(Geometry(24, 2, 17, 1, 1, 16, 66, 1, 1, 0), "relu", 3),
    fused_convolution(Geometry(66, 2, 2, 3, 3, 136, 72, 1, 2, 0), "relu6", 2),
    fused_convolution(Geometry(33, 1, 2, 13, 5, 72, 136, 1, 1, 0), "relu", 1),
]


@dataclass(frozen=True)
class Bottleneck:
    """The sizes of a bottleneck or inverted residual; ``join`` is the summand at its end."""

    G: int
    r: int
    B: int
    H: int
    W: int
    ci: int
    middle: int
    co: int
    k: int
    stride: int
    join: str  # nothing, identity, shortcut
    activation: str
    final: str
    missing: int = 0

    def __str__(self) -> str:
        missing = f"-missing{self.missing}" if self.missing else ""
        return (
            f"G{self.G}r{self.r}B{self.B}-{self.H}x{self.W}-{self.ci}to{self.middle}to{self.co}"
            f"-k{self.k}s{self.stride}-{self.join}-{self.activation}-{self.final}{missing}"
        )


BOTTLENECKS = [
    Bottleneck(1, 1, 1, 1, 1, 1, 1, 1, 3, 1, "identity", "relu", "relu"),
    Bottleneck(1, 2, 2, 8, 8, 16, 16, 32, 3, 1, "shortcut", "relu", "relu"),
    Bottleneck(2, 2, 1, 7, 7, 17, 5, 33, 3, 2, "shortcut", "relu", "relu"),
    Bottleneck(2, 1, 2, 8, 8, 32, 8, 32, 3, 1, "identity", "relu", "relu"),
    Bottleneck(3, 1, 1, 5, 9, 3, 18, 5, 3, 2, "nothing", "relu6", "none"),
    Bottleneck(1, 1, 3, 6, 5, 5, 33, 5, 5, 1, "identity", "relu6", "none"),
    Bottleneck(5, 2, 1, 4, 3, 3, 17, 3, 3, 1, "identity", "relu6", "none"),
    Bottleneck(1, 4, 2, 1, 1, 33, 17, 17, 5, 2, "nothing", "relu6", "relu6"),
    Bottleneck(2, 3, 0, 7, 7, 5, 3, 1, 3, 2, "shortcut", "relu", "relu"),
    Bottleneck(3, 3, 1, 5, 4, 1, 5, 3, 1, 3, "shortcut", "none", "none"),
    Bottleneck(1, 1, 2, 17, 19, 24, 144, 40, 3, 2, "nothing", "relu6", "none"),
    Bottleneck(2, 2, 2, 16, 16, 64, 32, 128, 3, 2, "shortcut", "relu", "relu"),
    Bottleneck(2, 2, 1, 5, 6, 8, 4, 16, 3, 1, "shortcut", "relu", "relu", missing=1),
    Bottleneck(1, 1, 1, 9, 10, 16, 40, 200, 3, 1, "shortcut", "relu", "relu"),
    # A tile of a GPU that holds the whole feature map, of any size up to 8x8, and one that does not; 256 channels.
    Bottleneck(1, 1, 2, 7, 7, 24, 40, 24, 3, 1, "identity", "relu6", "none"),
    Bottleneck(1, 2, 1, 8, 8, 256, 64, 256, 3, 1, "shortcut", "relu", "relu"),
    Bottleneck(1, 1, 1, 8, 8, 256, 64, 256, 3, 1, "identity", "relu", "relu"),
    Bottleneck(2, 1, 1, 16, 16, 128, 64, 256, 3, 2, "shortcut", "relu", "relu"),
    Bottleneck(1, 1, 1, 15, 13, 48, 72, 48, 3, 2, "shortcut", "relu6", "none"),
    Bottleneck(1, 1, 1, 9, 17, 136, 24, 136, 3, 1, "identity", "relu", "relu"),
    # Expanded feature maps larger than a cache, which are computed a few rows at a time; and a row larger than a cache.
    Bottleneck(1, 2, 1, 33, 33, 9, 96, 20, 3, 2, "shortcut", "relu", "relu"),
    Bottleneck(1, 1, 1, 40, 30, 16, 128, 16, 5, 1, "identity", "relu6", "none"),
    Bottleneck(1, 1, 1, 6, 64, 3, 512, 4, 3, 1, "nothing", "relu", "none"),
]


def bottleneck(b: Bottleneck) -> Case:
    branches = b.G * b.r - b.missing

    def make(rng: torch.Generator) -> Inputs:
        def pointwise(outputs: int, inputs: int) -> Tensor:
            scale = inputs**-0.5  # values near 1, where the activations bend
            return K.pack_weight(normal(rng, branches, outputs, inputs, 1, 1, scale=scale))

        shortcut = b.join == "shortcut"
        return {
            "x": normal(rng, b.G, b.B, b.H, b.W, b.ci, scale=3),
            "expand": pointwise(b.middle, b.ci),
            "expand_bias": normal(rng, branches, b.middle),
            "depthwise": normal(rng, branches, b.k, b.k, b.middle),
            "depthwise_bias": normal(rng, branches, b.middle),
            "project": pointwise(b.co, b.middle),
            "project_bias": normal(rng, branches, b.co),
            "shortcut": pointwise(b.co, b.ci) if shortcut else None,
            "shortcut_bias": normal(rng, branches, b.co) if shortcut else None,
            "stride": b.stride,
            "replicate": b.r,
            "activation": b.activation,
            "identity": b.join == "identity",
            "final_activation": b.final,
        }

    # The errors of the three convolutions and of the shortcut add up.
    terms = (b.ci + 1) + (b.k**2 + 1) + (b.middle + 1) + (b.ci + 2)
    return Case("fused_bottleneck", str(b), make, (), terms, roundings=2, naive_roundings=6)


def bottleneck_chain(name: str, *sizes: Bottleneck, pool: bool = False) -> Case:
    """Bottlenecks of stride 1. The names of a layer's inputs end with its index."""
    made = layers(name, *map(bottleneck, sizes))

    def arguments(inputs: Inputs) -> Inputs:
        given = made.arguments(inputs)["layers"]
        weights = [weight for layer in given for weight in layer.weights]
        names = ("none", "relu", "relu6")
        numbers = []
        for one in given:
            numbers += [
                one.replicate,
                names.index(one.activation),
                int(one.identity),
                names.index(one.final_activation),
            ]
        return {"x": inputs["x"], "weights": weights, "numbers": numbers, "pool": pool}

    terms = made.terms + 100 * pool
    roundings, naive_roundings = made.roundings + pool, made.naive_roundings + pool
    return Case("fused_bottleneck_chain", name, made.make, (), terms, roundings, naive_roundings, arguments)


def layers(
    name: str, *singles: Case, keep: Sequence[int] = (), mean: Sequence[int] = (), reads: Inputs | None = None
) -> Case:
    """A sequence of layers.

    Args:
        keep: indices of the layers whose outputs are results, too.
        mean: indices of the layers that average over each feature map first.
        reads: by the index of a layer, its ``source``, ``residual`` and ``residual_replicate``.

    The names of a layer's inputs end with its index.
    """

    def make(rng: torch.Generator) -> Inputs:
        made = [single.make(rng) for single in singles]
        later = {f"{name}_{i}": value for i, one in enumerate(made) for name, value in one.items() if name != "x"}
        return {"x": made[0]["x"], **later}

    def arguments(inputs: Inputs) -> Inputs:
        given = []
        for i in range(len(singles)):
            own = {name.removesuffix(f"_{i}"): v for name, v in inputs.items() if name.endswith(f"_{i}")}
            options = {name: own.pop(name) for name in K.FusedLayer._fields if name in own}
            options |= (reads or {}).get(i, {})
            given.append(K.FusedLayer(tuple(own.values()), **options, mean=i in mean))
        return {"x": inputs["x"], "layers": given, "keep": keep}

    terms = sum(single.terms for single in singles) + 100 * len(mean) + len(reads or {})
    roundings = sum(single.roundings for single in singles) + len(mean)
    naive_roundings = sum(single.naive_roundings for single in singles) + len(mean) + len(reads or {})
    return Case("FusedLayers", name, make, (), terms, roundings, naive_roundings, arguments)


# Chains of bottlenecks with more feature maps than threads, as many, and fewer, and numbers that threads do not divide.
LAYERS = [
    layers("one", bottleneck(Bottleneck(1, 1, 1, 7, 7, 4, 3, 4, 3, 1, "identity", "relu", "relu"))),
    layers(
        "chain",
        bottleneck(Bottleneck(2, 2, 2, 7, 6, 5, 3, 9, 3, 2, "shortcut", "relu", "relu", missing=1)),
        bottleneck(Bottleneck(3, 1, 2, 4, 3, 9, 20, 9, 3, 1, "identity", "relu", "relu")),
        bottleneck(Bottleneck(3, 1, 2, 4, 3, 9, 17, 33, 5, 1, "shortcut", "relu6", "none")),
    ),
    layers(
        "network",
        fused_convolution(Geometry(1, 1, 3, 9, 8, 3, 16, 3, 1, 1), "relu"),
        bottleneck(Bottleneck(1, 3, 3, 9, 8, 16, 32, 8, 3, 2, "nothing", "relu6", "none")),
        bottleneck(Bottleneck(3, 1, 3, 5, 4, 8, 48, 8, 3, 1, "identity", "relu6", "none")),
        bottleneck(Bottleneck(3, 1, 3, 5, 4, 8, 4, 6, 1, 2, "nothing", "relu6", "none")),
        fused_convolution(Geometry(3, 2, 3, 1, 1, 6, 37, 1, 1, 0), "none"),
        mean=[4],
    ),
    layers(
        "images",
        fused_convolution(Geometry(1, 1, 5, 9, 17, 3, 18, 3, 2, 1), "relu"),
        fused_convolution(Geometry(1, 1, 5, 5, 9, 18, 7, 1, 1, 0), "relu6"),
        bottleneck(Bottleneck(1, 1, 5, 5, 9, 7, 3, 7, 3, 1, "identity", "relu", "relu")),
        bottleneck(Bottleneck(1, 1, 5, 5, 9, 7, 20, 9, 3, 2, "shortcut", "relu", "none")),
    ),
    layers(
        "keep",
        bottleneck(Bottleneck(1, 1, 1, 5, 7, 8, 3, 8, 3, 1, "identity", "relu", "relu")),
        bottleneck(Bottleneck(1, 1, 1, 5, 7, 8, 4, 20, 3, 1, "shortcut", "relu", "relu")),
        bottleneck(Bottleneck(1, 1, 1, 5, 7, 20, 3, 6, 3, 2, "shortcut", "relu", "relu")),
        fused_convolution(Geometry(1, 1, 1, 1, 1, 6, 300, 1, 1, 0), "relu6"),
        keep=[0, 2],
        mean=[3],
    ),
    layers(
        "mean-first",
        fused_convolution(Geometry(2, 2, 2, 5, 4, 5, 70, 1, 1, 0, missing=1), "relu"),
        fused_convolution(Geometry(3, 1, 2, 1, 1, 70, 130, 1, 1, 0), "none"),
        mean=[0],
    ),
    layers(
        "empty",
        bottleneck(Bottleneck(2, 2, 0, 4, 4, 3, 2, 3, 3, 1, "identity", "relu", "relu")),
        bottleneck(Bottleneck(4, 1, 0, 4, 4, 3, 2, 5, 3, 1, "nothing", "relu", "relu")),
        fused_convolution(Geometry(4, 1, 0, 1, 1, 5, 3, 1, 1, 0), "none"),
        mean=[2],
    ),
]

# For each kernel of a chain (64 or 128 pixels a block, one or many chunks of expanded channels, halves of columns or
# rows), and for what no kernel takes.
CHAINS = [
    bottleneck_chain(
        "pooled",
        Bottleneck(2, 2, 3, 8, 8, 144, 64, 144, 3, 1, "shortcut", "relu", "relu"),
        *2 * [Bottleneck(4, 1, 3, 8, 8, 144, 64, 144, 3, 1, "identity", "relu", "relu")],
        pool=True,
    ),
    bottleneck_chain("7x7", *2 * [Bottleneck(2, 1, 4, 7, 7, 256, 32, 256, 3, 1, "identity", "relu", "relu")]),
    bottleneck_chain(
        "missing",
        Bottleneck(2, 2, 3, 7, 7, 24, 144, 24, 3, 1, "identity", "relu6", "none", missing=1),
        *2 * [Bottleneck(3, 1, 3, 7, 7, 24, 144, 24, 3, 1, "identity", "relu6", "none")],
    ),
    bottleneck_chain(
        "4x4",
        Bottleneck(3, 1, 11, 4, 4, 16, 8, 16, 3, 1, "nothing", "none", "relu6"),
        Bottleneck(3, 1, 11, 4, 4, 16, 8, 16, 3, 1, "shortcut", "relu6", "none"),
    ),
    bottleneck_chain("3x5", *3 * [Bottleneck(1, 1, 1, 3, 5, 40, 40, 40, 3, 1, "identity", "relu", "relu")], pool=True),
    bottleneck_chain("chunks", Bottleneck(1, 1, 2, 8, 6, 200, 72, 200, 3, 1, "shortcut", "relu", "none"), pool=True),
    bottleneck_chain("1x8", *2 * [Bottleneck(2, 1, 5, 1, 8, 8, 8, 8, 3, 1, "identity", "relu", "none")]),
    bottleneck_chain("8x1", *2 * [Bottleneck(1, 1, 40, 8, 1, 8, 24, 8, 3, 1, "identity", "relu", "none")]),
    bottleneck_chain("1x1", *2 * [Bottleneck(5, 1, 130, 1, 1, 8, 8, 8, 3, 1, "identity", "relu", "none")], pool=True),
    bottleneck_chain("ten", *10 * [Bottleneck(1, 1, 1, 2, 3, 8, 8, 8, 3, 1, "identity", "relu", "relu")]),
    bottleneck_chain("ragged", *2 * [Bottleneck(1, 1, 2, 5, 4, 12, 20, 12, 3, 1, "identity", "relu", "relu")]),
    bottleneck_chain("odd", *2 * [Bottleneck(2, 1, 2, 5, 4, 3, 5, 3, 3, 1, "identity", "relu", "relu")], pool=True),
    bottleneck_chain("5x5 filter", *2 * [Bottleneck(1, 1, 2, 8, 8, 8, 8, 8, 5, 1, "identity", "relu", "relu")]),
    bottleneck_chain("9 rows", *2 * [Bottleneck(1, 1, 1, 9, 4, 8, 8, 8, 3, 1, "identity", "relu", "relu")], pool=True),
    bottleneck_chain(
        "wider",
        Bottleneck(1, 2, 1, 4, 4, 8, 8, 16, 3, 1, "shortcut", "relu", "relu"),
        Bottleneck(2, 1, 1, 4, 4, 16, 8, 16, 3, 1, "identity", "relu", "relu"),
    ),
    bottleneck_chain("empty", Bottleneck(2, 2, 0, 4, 4, 8, 8, 8, 3, 1, "nothing", "relu", "relu"), pool=True),
]


def _scaled(geometry: Geometry, activation: str) -> Case:
    return fused_convolution(geometry, activation, scaled=True)


LAYERS += [
    layers(
        # Even numbers of channels, whose bfloat16 is multiplied in pairs: panels with padding, short and long sums,
        # and an input with an odd number.
        "even channels",
        fused_convolution(Geometry(1, 1, 3, 9, 17, 3, 18, 3, 2, 1), "relu"),
        fused_convolution(Geometry(1, 1, 3, 5, 9, 18, 34, 1, 1, 0), "relu6"),
        bottleneck(Bottleneck(1, 1, 3, 5, 9, 34, 70, 34, 3, 1, "identity", "relu", "relu")),
        bottleneck(Bottleneck(1, 3, 3, 5, 9, 34, 6, 50, 3, 2, "shortcut", "relu", "none", missing=1)),
        bottleneck(Bottleneck(2, 1, 3, 3, 5, 50, 266, 50, 5, 1, "identity", "relu6", "none")),
        fused_convolution(Geometry(2, 2, 3, 1, 1, 50, 37, 1, 1, 0), "none"),
        keep=[1, 3],
        mean=[5],
    ),
    layers(
        # Large filters of images, and sums over different numbers of channels.
        "wide stem",
        fused_convolution(Geometry(1, 1, 2, 9, 17, 3, 32, 7, 1, 3), "relu"),
        bottleneck(Bottleneck(1, 2, 2, 9, 17, 32, 48, 40, 3, 2, "shortcut", "relu", "relu")),
        bottleneck(Bottleneck(2, 1, 2, 5, 9, 40, 48, 72, 3, 1, "shortcut", "relu", "none")),
        fused_convolution(Geometry(2, 1, 2, 1, 1, 72, 10, 1, 1, 0), "none"),
        mean=[3],
    ),
    layers(
        "narrow stem",
        fused_convolution(Geometry(1, 1, 2, 11, 8, 3, 20, 5, 1, 2), "relu"),
        bottleneck(Bottleneck(1, 1, 2, 11, 8, 20, 44, 20, 3, 1, "identity", "relu", "relu")),
    ),
    layers(
        # Sums of convolutions with even numbers of channels.
        "even sums",
        _scaled(Geometry(1, 2, 4, 7, 9, 4, 16, 1, 1, 0), "relu"),
        _scaled(Geometry(2, 1, 4, 7, 9, 16, 16, 1, 1, 0), "relu"),
        _scaled(Geometry(2, 2, 4, 7, 9, 16, 52, 1, 2, 0), "relu6"),
        _scaled(Geometry(4, 1, 4, 4, 5, 52, 386, 1, 1, 0), "relu"),
        _scaled(Geometry(4, 1, 4, 4, 5, 386, 52, 1, 2, 0), "relu"),
        _scaled(Geometry(4, 1, 4, 2, 3, 52, 52, 1, 1, 0), "relu"),
        reads={1: {"residual": -1}, 5: {"residual": -1}},
    ),
    layers(
        "small maps",
        fused_convolution(Geometry(1, 1, 2, 16, 15, 3, 8, 3, 1, 1), "relu"),
        bottleneck(Bottleneck(1, 2, 2, 16, 15, 8, 8, 16, 3, 2, "shortcut", "relu", "relu")),
        *2 * [bottleneck(Bottleneck(2, 1, 2, 8, 8, 16, 8, 16, 3, 1, "identity", "relu", "relu"))],
        bottleneck(Bottleneck(2, 2, 2, 8, 8, 16, 8, 16, 3, 1, "shortcut", "relu", "relu")),
        *2 * [bottleneck(Bottleneck(4, 1, 2, 8, 8, 16, 8, 16, 3, 1, "identity", "relu", "relu"))],
        fused_convolution(Geometry(4, 1, 2, 1, 1, 16, 10, 1, 1, 0), "none"),
        keep=[3],
        mean=[7],
    ),
    layers(
        "small maps, features and mean",
        *2 * [bottleneck(Bottleneck(2, 1, 3, 4, 4, 8, 16, 8, 3, 1, "identity", "relu6", "none"))],
        fused_convolution(Geometry(2, 1, 3, 1, 1, 8, 10, 1, 1, 0), "none"),
        keep=[1],
        mean=[2],
    ),
    layers(
        "basic block",
        _scaled(Geometry(1, 1, 3, 9, 8, 3, 16, 3, 1, 1), "relu"),
        *2 * [_scaled(Geometry(1, 1, 3, 9, 8, 16, 16, 3, 1, 1), "relu")],
        _scaled(Geometry(1, 2, 3, 1, 1, 16, 10, 1, 1, 0), "none"),
        mean=[3],
        reads={2: {"residual": -2}},
    ),
    layers(
        # A block that branches and has a convolution as its shortcut, and one that branches and has the identity.
        "branching blocks",
        _scaled(Geometry(1, 2, 3, 9, 8, 16, 24, 1, 2, 0), "none"),
        _scaled(Geometry(1, 2, 3, 9, 8, 16, 24, 3, 2, 1), "relu"),
        _scaled(Geometry(2, 1, 3, 5, 4, 24, 24, 3, 1, 1), "relu"),
        _scaled(Geometry(2, 2, 3, 5, 4, 24, 24, 3, 1, 1, missing=1), "relu6"),
        _scaled(Geometry(3, 1, 3, 5, 4, 24, 24, 3, 1, 1), "relu"),
        reads={1: {"source": -2}, 2: {"residual": -2}, 4: {"residual": -2, "residual_replicate": 2}},
    ),
    layers(
        # The output within a chain of bottlenecks and that before a mean have another reader.
        "bottlenecks and sums",
        *2 * [bottleneck(Bottleneck(2, 1, 2, 5, 6, 8, 16, 8, 3, 1, "identity", "relu", "relu"))],
        _scaled(Geometry(2, 1, 2, 5, 6, 8, 8, 3, 1, 1), "relu"),
        _scaled(Geometry(2, 1, 2, 5, 6, 8, 8, 3, 1, 1), "none"),
        *2 * [bottleneck(Bottleneck(2, 1, 2, 5, 6, 8, 16, 8, 3, 1, "identity", "relu6", "none"))],
        _scaled(Geometry(2, 1, 2, 1, 1, 8, 20, 1, 1, 0), "relu"),
        _scaled(Geometry(2, 2, 2, 5, 6, 8, 20, 5, 1, 0), "relu"),
        keep=[3],
        mean=[6],
        reads={2: {"residual": -3}, 3: {"residual": -3}, 7: {"source": -2}},
    ),
    layers(
        # Sums with the input of all layers and with the layer's own, in a stem of one branch before bottlenecks.
        "sums in a stem",
        _scaled(Geometry(1, 1, 4, 7, 9, 5, 5, 3, 1, 1), "relu"),
        _scaled(Geometry(1, 1, 4, 7, 9, 5, 5, 1, 1, 0), "relu"),
        _scaled(Geometry(1, 1, 4, 7, 9, 5, 5, 3, 1, 1), "none"),
        bottleneck(Bottleneck(1, 1, 4, 7, 9, 5, 3, 5, 3, 1, "identity", "relu", "relu")),
        _scaled(Geometry(1, 3, 4, 7, 9, 5, 5, 1, 1, 0), "relu"),
        reads={0: {"residual": -1}, 1: {"residual": -2}, 4: {"residual": -1, "residual_replicate": 3}},
    ),
]
