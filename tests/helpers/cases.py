"""Samples of every op: inputs, the float64 result they are judged against, and how far off a result may be.

The yardstick is :mod:`hne_kernels.reference` in float64. A result may differ by rounding only, and a bound for that
is known: a sum of K products computed in any order is off by at most ``K eps sum |a_k b_k|``. The sum of
magnitudes is the op itself on absolute values, so ``magnitude`` gives a bound for each element, however large
or small the inputs are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hne_kernels as K

Inputs = dict[str, Any]
UNITS = (
    "branch_conv2d_stats",
    "branch_depthwise_conv2d_stats",
    "branch_residual_conv2d_stats",
    "branch_conv2d_moments",
    "branch_projection",
)
VECTORS = ("mean", "scale", "shift")
OUT_VECTORS = ("out_mean", "out_scale", "out_shift")
RESIDUAL_VECTORS = ("residual_mean", "residual_scale", "residual_shift")
KINK = 0.05  # gradients are not compared this close to where an activation bends


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    name: str
    make: Callable[[torch.Generator], Inputs] = field(repr=False)
    differentiable: tuple[str, ...]  # inputs with a gradient
    terms: int  # length of the longest sum behind an element of the result or a gradient
    roundings: int = 1  # times a value is stored in the dtype on its way to the result or a gradient
    naive_roundings: int = 1  # the same in plain PyTorch, which stores the result of each step
    arguments: Callable[[Inputs], Inputs] = field(default=dict, repr=False)  # of the op, made of the inputs

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def inputs(self, rng: torch.Generator, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        """Fresh arguments; the statistics of a map are kept in float32 or better."""
        made = cast(self.make(rng), dtype, device)
        if dtype.itemsize < 4:
            made |= {name: made[name].float() for name in self.statistics if made.get(name) is not None}
        return made

    @property
    def statistics(self) -> tuple[str, ...]:
        """Inputs that are kept in float32 or better."""
        return (*VECTORS, *OUT_VECTORS, *RESIDUAL_VECTORS) if self.op in (*UNITS, "branch_normalize") else ()

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        op = _fused_layers if self.op == "FusedLayers" else getattr(K, self.op)
        result = op(**self.arguments(inputs))
        return tuple(r for r in result if r is not None) if isinstance(result, tuple) else (result,)


def _fused_layers(x: Tensor, layers: Sequence[K.FusedLayer], keep: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(K.FusedLayers(layers, keep)(x))


@dataclass
class Outcome:
    """Results of a call and gradients of its differentiable inputs."""

    results: tuple[Tensor, ...]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def items(self) -> list[tuple[str, Tensor]]:
        return [(f"result {i}", t) for i, t in enumerate(self.results)] + [
            (f"gradient of {name}", t) for name, t in self.gradients.items()
        ]


# --- inputs ------------------------------------------------------------------------------------------------


def normal(rng: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64) * scale


def cast(inputs: Inputs, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The same inputs in another dtype and place; integers keep their dtype."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def out_size(size: int, k: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - k) // stride + 1


@dataclass(frozen=True)
class Geometry:
    """A convolution: G input branches with r children each (the last may lack some), B maps of H x W."""

    G: int
    r: int
    B: int
    H: int
    W: int
    ci: int
    co: int
    k: int
    stride: int
    padding: int
    missing: int = 0

    def __str__(self) -> str:
        missing = f"-missing{self.missing}" if self.missing else ""
        return (
            f"G{self.G}r{self.r}B{self.B}-{self.H}x{self.W}-{self.ci}to{self.co}"
            f"-k{self.k}s{self.stride}p{self.padding}{missing}"
        )

    @property
    def branches(self) -> int:
        return self.G * self.r - self.missing

    @property
    def positions(self) -> int:
        return (
            self.B
            * out_size(self.H, self.k, self.stride, self.padding)
            * out_size(self.W, self.k, self.stride, self.padding)
        )

    def options(self) -> Inputs:
        return {"stride": self.stride, "padding": self.padding, "replicate": self.r}


# Between them: every G of 1, 2, 3, 5 with r of 1 to 4; empty batches and batches of one; maps of one pixel,
# smaller than the kernel, odd, not square; channels that no vector width divides; windows that lie wholly in
# the padding; rows the stride leaves over.
GEOMETRIES = [
    Geometry(1, 1, 1, 1, 1, 1, 1, 1, 1, 0),
    Geometry(1, 1, 2, 8, 8, 3, 16, 3, 1, 1),
    Geometry(2, 1, 2, 8, 8, 16, 32, 1, 1, 0),
    Geometry(2, 2, 1, 7, 7, 17, 5, 1, 2, 0),
    Geometry(3, 1, 2, 7, 7, 5, 17, 3, 2, 1),
    Geometry(5, 1, 1, 5, 9, 3, 3, 5, 1, 2),
    Geometry(1, 4, 3, 4, 3, 33, 5, 3, 1, 1),
    Geometry(3, 3, 1, 1, 1, 5, 33, 3, 1, 1),
    Geometry(2, 3, 2, 9, 5, 1, 17, 5, 3, 2),
    Geometry(5, 2, 0, 7, 7, 5, 3, 3, 1, 1),
    Geometry(1, 2, 1, 6, 6, 17, 33, 2, 2, 0),
    Geometry(2, 1, 3, 5, 6, 3, 1, 2, 1, 1),
    Geometry(1, 1, 1, 7, 7, 33, 65, 3, 1, 0),
    Geometry(1, 1, 2, 10, 4, 5, 5, 1, 3, 2),
    Geometry(3, 4, 1, 8, 7, 1, 3, 3, 3, 0),
    Geometry(2, 2, 2, 6, 5, 130, 40, 1, 1, 0),
    Geometry(1, 1, 1, 3, 4, 300, 17, 3, 1, 1),
    Geometry(2, 1, 2, 33, 31, 17, 24, 3, 2, 1),
    Geometry(2, 2, 2, 6, 5, 5, 3, 3, 1, 1, missing=1),
    Geometry(3, 4, 1, 7, 7, 3, 17, 1, 2, 0, missing=3),
    # Channels that fill vectors, several tiles of a matrix kernel, windows that step.
    Geometry(2, 2, 1, 9, 7, 16, 24, 3, 2, 1),
    Geometry(1, 2, 3, 7, 9, 72, 136, 1, 1, 0),
    Geometry(2, 1, 2, 5, 4, 24, 93, 1, 1, 0),  # few terms, a panel of weights that is not full
    # Images: blocks of pixels that begin and end within a row.
    Geometry(2, 1, 3, 9, 17, 3, 17, 3, 1, 1),
    Geometry(1, 2, 2, 11, 31, 5, 5, 5, 2, 2),
]


def convolution(op: str, geometry: Geometry, bias: bool) -> Case:
    depthwise = op == "branch_depthwise_conv2d"
    g = geometry
    channels = (g.ci,) if depthwise else (g.co, g.ci)

    def make(rng: torch.Generator) -> Inputs:
        return {
            "x": normal(rng, g.G, g.B, g.H, g.W, g.ci),
            "weight": normal(rng, g.branches, *channels, g.k, g.k),
            "bias": normal(rng, g.branches, channels[0]) if bias else None,
            **g.options(),
        }

    forward = g.k**2 * (1 if depthwise else g.ci) + 1
    backward = g.k**2 * g.r * (1 if depthwise else g.co)
    return Case(
        op,
        f"{g}{'-bias' if bias else ''}",
        make,
        ("x", "weight", "bias") if bias else ("x", "weight"),
        max(forward, backward, g.positions),
    )


def _away_from_kinks(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | float = 0.0) -> Tensor:
    """``x`` moved to where the normalised values are not near 0 or 6, where an activation bends."""
    mean, scale, shift = (vector[:, None, None, None] for vector in (mean, scale, shift))
    shift = shift + residual
    normal_x = (x - mean) * scale + shift
    for kink in (0, 6):
        near = (normal_x - kink).abs() < 2 * KINK
        normal_x = torch.where(near, kink + 3 * KINK, normal_x)
    return (normal_x - shift) / scale + mean


def normalization(rng: torch.Generator, branches: int, channels: int) -> Inputs:
    """Mean, scale and shift; no scale is near 0."""
    scale = normal(rng, branches, channels).sign() * (0.5 + normal(rng, branches, channels).abs())
    return {"mean": normal(rng, branches, channels), "scale": scale, "shift": normal(rng, branches, channels)}


def unit(op: str, geometry: Geometry, activation: str | None, offset: float = 0.0) -> Case:
    """A training unit; without an activation, one that does not normalise. ``offset`` moves the mean of all maps."""
    depthwise = op == "branch_depthwise_conv2d_stats"
    g = geometry
    channels = (g.ci,) if depthwise else (g.co, g.ci)

    def make(rng: torch.Generator) -> Inputs:
        x = normal(rng, g.G, g.B, g.H, g.W, g.ci) + offset
        inputs: Inputs = {"x": x, "weight": normal(rng, g.branches, *channels, g.k, g.k), **g.options()}
        if activation is not None:
            inputs |= normalization(rng, g.G, g.ci)
            inputs["mean"] += offset
            inputs |= {"x": _away_from_kinks(x, *(inputs[name] for name in VECTORS)), "activation": activation}
        return inputs

    forward = g.k**2 * (1 if depthwise else g.ci) + 1
    backward = g.k**2 * g.r * (1 if depthwise else g.co)
    vectors = VECTORS if activation is not None else ()
    # Rounded on the way to a gradient: what is read, what is written, the gradient of that, the result.
    return Case(
        op,
        f"{g}-{activation or 'as-it-is'}" + (f"-offset{offset:g}" if offset else ""),
        make,
        ("x", "weight", *vectors),
        forward + backward + g.positions + g.B * g.H * g.W + 16,
        roundings=4,
        naive_roundings=6,
    )


UNIT_OPTIONS = ("relu", None, "relu6", "none")


def residual_unit(shape: Sequence[int], out_channels: int, activation: str, residual: bool) -> Case:
    """The end of one bottleneck and the training unit that begins the next."""
    branches, batch, height, width, channels = shape

    def make(rng: torch.Generator) -> Inputs:
        vectors = normalization(rng, branches, channels)
        added = normal(rng, *shape) if residual else None
        return {
            "x": _away_from_kinks(normal(rng, *shape), *vectors.values(), 0.0 if added is None else added),
            "weight": normal(rng, branches, out_channels, channels, 1, 1),
            **vectors,
            "residual": added,
            "activation": activation,
        }

    positions = batch * height * width
    return Case(
        "branch_residual_conv2d_stats",
        f"{'x'.join(map(str, shape))}to{out_channels}-{activation}{'-residual' if residual else ''}",
        make,
        ("x", "weight", *VECTORS, *(("residual",) if residual else ())),
        channels + out_channels + 2 * positions + 16,
        roundings=5,
        naive_roundings=8,
    )


RESIDUAL_UNITS = [
    residual_unit((1, 1, 1, 1, 1), 1, "none", True),
    residual_unit((1, 2, 2, 1, 3), 2, "relu", True),
    residual_unit((3, 1, 7, 7, 33), 17, "relu", True),
    residual_unit((2, 3, 8, 7, 16), 40, "relu6", True),
    residual_unit((2, 0, 4, 4, 8), 3, "relu", True),
    residual_unit((1, 2, 9, 13, 64), 16, "relu6", False),
    residual_unit((5, 2, 5, 3, 5), 33, "none", False),
]


def moments(shape: Sequence[int], out_channels: int, activation: str, offset: float = 0.0) -> Case:
    """Statistics of a pointwise training unit whose map is not wanted; ``offset`` moves what it reads."""
    branches, batch, height, width, channels = shape

    def make(rng: torch.Generator) -> Inputs:
        vectors = normalization(rng, branches, channels)
        vectors["shift"] += offset
        return {
            "x": _away_from_kinks(normal(rng, *shape), *vectors.values()),
            "weight": normal(rng, branches, out_channels, channels, 1, 1),
            **vectors,
            "activation": activation,
        }

    positions = batch * height * width
    return Case(
        "branch_conv2d_moments",
        f"{'x'.join(map(str, shape))}to{out_channels}-{activation}" + (f"-offset{offset:g}" if offset else ""),
        make,
        ("x", "weight", *VECTORS),
        2 * channels + 2 * out_channels + 2 * positions + 16,
        roundings=4,
        naive_roundings=6,
    )


MOMENTS = [
    moments((1, 1, 1, 1, 1), 1, "none"),
    moments((1, 2, 2, 1, 3), 2, "relu"),
    moments((3, 1, 7, 7, 33), 17, "relu"),
    moments((2, 3, 8, 7, 16), 40, "relu6"),
    moments((2, 0, 4, 4, 8), 3, "relu"),
    moments((1, 4, 9, 13, 16), 64, "relu", offset=100.0),
    moments((5, 2, 5, 3, 5), 33, "none"),
]


def projection(
    shape: Sequence[int], out_channels: int, next_channels: int, activations: tuple[str, str], residual: str
) -> Case:
    """The end of a bottleneck from the map before its last convolution, and the unit after it (of 0 channels: none).
    The residual is ``plain``, ``normalised`` or ``none``."""
    branches, batch, height, width, channels = shape
    activation, out_activation = activations

    def make(rng: torch.Generator) -> Inputs:
        inputs: Inputs = {"x": normal(rng, *shape), "weight": normal(rng, branches, out_channels, channels, 1, 1)}
        inputs |= normalization(rng, branches, channels)
        inputs |= {f"out_{name}": vector for name, vector in normalization(rng, branches, out_channels).items()}
        inputs["x"] = _away_from_kinks(inputs["x"], *(inputs[name] for name in VECTORS))
        inputs |= {"activation": activation, "out_activation": out_activation, "residual": None, "next_weight": None}
        inputs |= dict.fromkeys(RESIDUAL_VECTORS)
        if residual != "none":
            added = [torch.tensor([[v]], dtype=torch.float64) for v in (0.0, 1.0, 0.0)]
            if residual == "normalised":
                added = list(normalization(rng, branches, out_channels).values())
                inputs |= dict(zip(RESIDUAL_VECTORS, added, strict=True))
            with K.use_backend("reference"):
                before = {**inputs, "out_activation": "none"} | dict.fromkeys(RESIDUAL_VECTORS)
                sums = K.branch_projection(**before)[0]
            inputs["residual"] = _away_from_kinks(normal(rng, *sums.shape), *added, sums)
        if next_channels:
            inputs["next_weight"] = normal(rng, branches, next_channels, out_channels, 1, 1)
        return inputs

    positions = batch * height * width
    following = ("next_weight",) if next_channels else ()
    added = {"none": (), "plain": ("residual",), "normalised": ("residual", *RESIDUAL_VECTORS)}[residual]
    return Case(
        "branch_projection",
        f"{'x'.join(map(str, shape))}to{out_channels}to{next_channels}-{activation}-{out_activation}-{residual}",
        make,
        ("x", "weight", *VECTORS, *OUT_VECTORS, *added, *following),
        2 * channels + 2 * out_channels + next_channels + 2 * positions + 16,
        roundings=6,
        naive_roundings=12,
    )


PROJECTIONS = [
    projection((1, 1, 1, 1, 1), 1, 1, ("none", "none"), "plain"),
    projection((1, 2, 2, 1, 3), 2, 2, ("relu", "relu"), "normalised"),
    projection((3, 1, 7, 7, 17), 33, 5, ("relu", "relu"), "plain"),
    projection((2, 3, 8, 7, 16), 40, 16, ("relu6", "relu6"), "normalised"),
    projection((2, 0, 4, 4, 8), 3, 2, ("relu", "relu"), "normalised"),
    projection((2, 2, 5, 3, 5), 33, 0, ("relu", "relu"), "plain"),
    projection((1, 2, 9, 13, 16), 64, 7, ("relu6", "none"), "none"),
    projection((5, 2, 5, 3, 5), 6, 0, ("none", "none"), "none"),
]


def normalize(shape: Sequence[int], activation: str, residual: bool, offset: float = 0.0) -> Case:
    def make(rng: torch.Generator) -> Inputs:
        branches, channels = shape[0], shape[-1]
        return {
            "x": normal(rng, *shape) + offset,
            "mean": normal(rng, branches, channels) + offset,
            "scale": normal(rng, branches, channels) * 2,
            "shift": normal(rng, branches, channels) * 2,
            "residual": normal(rng, *shape) * 2 if residual else None,
            "activation": activation,
        }

    name = "x".join(map(str, shape)) + f"-{activation}{'-residual' if residual else ''}"
    return Case(
        "branch_normalize",
        f"{name}-offset{offset:g}" if offset else name,
        make,
        ("x", *VECTORS, "residual") if residual else ("x", *VECTORS),
        shape[1] * shape[2] * shape[3] + 4,
        naive_roundings=2,
    )


NORMALIZES = [
    normalize((1, 1, 1, 1, 1), "none", False),
    normalize((1, 2, 1, 1, 3), "none", True),
    normalize((2, 3, 5, 4, 17), "relu", False),
    normalize((3, 1, 7, 7, 33), "relu", True),
    normalize((5, 2, 4, 3, 5), "relu6", False),
    normalize((2, 2, 8, 8, 16), "relu6", True),
    normalize((2, 0, 4, 4, 8), "relu", True),
    normalize((1, 4, 9, 7, 64), "relu", True),
    # The gradient of the scale is a sum of deviations, not a difference of sums.
    normalize((2, 2, 6, 5, 17), "none", False, offset=300.0),
]


def fused_convolution(geometry: Geometry, activation: str) -> Case:
    g = geometry

    def make(rng: torch.Generator) -> Inputs:
        weight = normal(rng, g.branches, g.co, g.ci, g.k, g.k)
        return {
            "x": normal(rng, g.G, g.B, g.H, g.W, g.ci),
            "weight": K.pack_weight(weight),
            "bias": normal(rng, g.branches, g.co),
            "activation": activation,
            **g.options(),
        }

    return Case("fused_conv2d", f"{g}-{activation}", make, (), g.k**2 * g.ci + 1)


@dataclass(frozen=True)
class Bottleneck:
    """A bottleneck or inverted residual; ``join`` is what is added at its end."""

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
    # Expanded maps beyond a cache, so that they are computed a few rows at a time; a row beyond it, too.
    Bottleneck(1, 2, 1, 33, 33, 9, 96, 20, 3, 2, "shortcut", "relu", "relu"),
    Bottleneck(1, 1, 1, 40, 30, 16, 128, 16, 5, 1, "identity", "relu6", "none"),
    Bottleneck(1, 1, 1, 6, 64, 3, 512, 4, 3, 1, "nothing", "relu", "none"),
]


def bottleneck(b: Bottleneck) -> Case:
    branches = b.G * b.r - b.missing

    def make(rng: torch.Generator) -> Inputs:
        def pointwise(outputs: int, inputs: int) -> Tensor:
            scale = inputs**-0.5  # keeps values near 1, where the activations bend
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

    # Errors of the three convolutions add up, and so do the shortcut's.
    terms = (b.ci + 1) + (b.k**2 + 1) + (b.middle + 1) + (b.ci + 2)
    return Case("fused_bottleneck", str(b), make, (), terms, roundings=2, naive_roundings=6)


def layers(name: str, *singles: Case, keep: Sequence[int] = (), mean: Sequence[int] = ()) -> Case:
    """Layers one after the other, the features after those of ``keep`` results as well, those of ``mean`` of the mean
    over each map. The arguments of each are named by its number."""

    def make(rng: torch.Generator) -> Inputs:
        made = [single.make(rng) for single in singles]
        later = {f"{name}_{i}": value for i, one in enumerate(made) for name, value in one.items() if name != "x"}
        return {"x": made[0]["x"], **later}

    def arguments(inputs: Inputs) -> Inputs:
        described = []
        for i in range(len(singles)):
            own = {name.removesuffix(f"_{i}"): v for name, v in inputs.items() if name.endswith(f"_{i}")}
            options = {name: own.pop(name) for name in K.FusedLayer._fields if name in own}
            described.append(K.FusedLayer(tuple(own.values()), **options, mean=i in mean))
        return {"x": inputs["x"], "layers": described, "keep": keep}

    terms = sum(single.terms for single in singles) + 100 * len(mean)
    roundings = sum(single.roundings for single in singles) + len(mean)
    naive_roundings = sum(single.naive_roundings for single in singles) + len(mean)
    return Case("FusedLayers", name, make, (), terms, roundings, naive_roundings, arguments)


# In the runs of bottlenecks: more maps than threads, as many, and fewer; the last have some left over.
LAYERS = [
    layers("one", bottleneck(Bottleneck(1, 1, 1, 7, 7, 4, 3, 4, 3, 1, "identity", "relu", "relu"))),
    layers(
        "run",
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
        "kept",
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


def prefix_mean(models: int, batch: int, classes: int, sizes: tuple[int, ...] | None) -> Case:
    def make(rng: torch.Generator) -> Inputs:
        return {"logits": normal(rng, models, batch, classes), "sizes": sizes}

    name = f"N{models}B{batch}L{classes}-{sizes or 'default'}".replace(" ", "")
    # The reference sums a member's gradient over the ensembles it belongs to, one rounding each.
    return Case("prefix_mean", name, make, ("logits",), models + 5, naive_roundings=6)


def prefix_logits(
    models: int, batch: int, channels: int, classes: int, sizes: tuple[int, ...] | None, bias: bool
) -> Case:
    def make(rng: torch.Generator) -> Inputs:
        return {
            "features": normal(rng, models, batch, channels),
            "weight": normal(rng, models, classes, channels),
            "bias": normal(rng, models, classes) if bias else None,
            "sizes": sizes,
        }

    name = f"N{models}B{batch}C{channels}L{classes}-{sizes or 'default'}".replace(" ", "")
    return Case(
        "prefix_logits",
        f"{name}{'-bias' if bias else ''}",
        make,
        ("features", "weight", "bias") if bias else ("features", "weight"),
        max(channels, batch, classes) + models + 6,
        roundings=2,
        naive_roundings=8,
    )


def loss(models: int, batch: int, classes: int, alpha: float, temperature: float, scale: float = 1.0) -> Case:
    def make(rng: torch.Generator) -> Inputs:
        return {
            "logits": normal(rng, models, batch, classes, scale=scale),
            "target": torch.randint(classes, (batch,), generator=rng),
            "alpha": alpha,
            "temperature": temperature,
        }

    name = f"N{models}B{batch}L{classes}-alpha{alpha:g}-T{temperature:g}-scale{scale:g}"
    return Case(
        "hierarchical_distillation_loss",
        name,
        make,
        ("logits",),
        models + batch + classes + 16,
        naive_roundings=8 * models,
    )


CASES = [
    *(convolution("branch_conv2d", g, bool(i % 2)) for i, g in enumerate(GEOMETRIES)),
    *(convolution("branch_depthwise_conv2d", g, not i % 2) for i, g in enumerate(GEOMETRIES)),
    *(fused_convolution(g, ("none", "relu", "relu6")[i % 3]) for i, g in enumerate(GEOMETRIES)),
    *(bottleneck(b) for b in BOTTLENECKS),
    *LAYERS,
    *(unit("branch_conv2d_stats", g, UNIT_OPTIONS[i % 4]) for i, g in enumerate(GEOMETRIES)),
    *(unit("branch_depthwise_conv2d_stats", g, UNIT_OPTIONS[(i + 1) % 4]) for i, g in enumerate(GEOMETRIES)),
    # Where a mean of squares minus a squared mean would cancel.
    *(unit(op, Geometry(2, 2, 2, 6, 5, 17, 17, 1, 1, 0), None, offset=300.0) for op in UNITS[:2]),
    *RESIDUAL_UNITS,
    *MOMENTS,
    *PROJECTIONS,
    *NORMALIZES,
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
    loss(1, 1, 1, 0.5, 2.0),
    loss(1, 3, 5, 0.5, 2.0),
    loss(2, 4, 10, 0.5, 2.0),
    loss(3, 5, 17, 0.75, 1.0),
    loss(5, 2, 33, 1.0, 4.0),
    loss(16, 8, 100, 0.5, 2.0),
    loss(16, 3, 10, 0.0, 2.0, scale=30.0),
    loss(40, 2, 70, 0.5, 2.0),
    loss(16, 3, 10, 0.5, 2.0, scale=1e4),
]


def representative(*, differentiable: bool = False) -> list[Case]:
    """One case per op, small but general: several branches and children, odd sizes, every option used."""
    chosen = {
        "branch_conv2d": convolution("branch_conv2d", Geometry(2, 2, 2, 5, 4, 3, 2, 3, 2, 1), True),
        "branch_depthwise_conv2d": convolution("branch_depthwise_conv2d", Geometry(2, 2, 2, 5, 4, 3, 3, 3, 2, 1), True),
        "branch_conv2d_stats": unit("branch_conv2d_stats", Geometry(2, 2, 2, 5, 4, 3, 2, 3, 2, 1), "relu"),
        "branch_depthwise_conv2d_stats": unit(
            "branch_depthwise_conv2d_stats", Geometry(2, 2, 2, 5, 4, 3, 3, 3, 2, 1), "relu6"
        ),
        "branch_residual_conv2d_stats": residual_unit((2, 2, 3, 2, 3), 4, "relu", True),
        "branch_conv2d_moments": moments((2, 2, 3, 2, 3), 4, "relu"),
        "branch_projection": projection((2, 2, 3, 2, 3), 4, 2, ("relu", "relu"), "normalised"),
        "branch_normalize": normalize((2, 2, 3, 2, 3), "relu", True),
        "fused_conv2d": fused_convolution(Geometry(2, 2, 2, 5, 4, 3, 18, 3, 2, 1), "relu"),
        "fused_bottleneck": bottleneck(Bottleneck(2, 2, 2, 5, 4, 3, 5, 18, 3, 2, "shortcut", "relu", "relu")),
        "prefix_mean": prefix_mean(5, 2, 3, (1, 2, 4)),
        "prefix_logits": prefix_logits(5, 2, 3, 4, None, True),
        "hierarchical_distillation_loss": loss(5, 3, 4, 0.5, 2.0),
    }
    return [case for case in chosen.values() if case.differentiable or not differentiable]


# --- judging -----------------------------------------------------------------------------------------------


def cotangents(case: Case, inputs: Inputs, rng: torch.Generator) -> list[Tensor]:
    """A float64 gradient for every differentiable result, zero where an activation bends."""
    with torch.no_grad(), K.use_backend("reference"):
        results = case(inputs)
        grads = [normal(rng, *result.shape) for result in results]
        if inputs.get("activation", "none") != "none" and case.differentiable and case.op not in UNITS:
            bent = case({**inputs, "activation": "none"})[0]
            grads[0] *= (bent.abs() > KINK) & ((bent - 6).abs() > KINK)
    return grads


def evaluate(case: Case, inputs: Inputs, grads: Sequence[Tensor] = ()) -> Outcome:
    """Call the op; with ``grads`` for its results, differentiate too."""
    if not grads:
        with torch.no_grad():
            return Outcome(case(inputs))
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    results = case({**inputs, **leaves})
    gradients = torch.autograd.grad(results[: len(grads)], list(leaves.values()), grads)
    return Outcome(tuple(result.detach() for result in results), dict(zip(leaves, gradients, strict=True)))


def expected(case: Case, inputs: Inputs, grads: Sequence[Tensor] = ()) -> Outcome:
    """The reference in float64."""
    with K.use_backend("reference"):
        return evaluate(case, cast(inputs, torch.float64), [grad.to("cpu", torch.float64) for grad in grads])


def magnitude(case: Case, inputs: Inputs, grads: Sequence[Tensor] = ()) -> Outcome:
    """For each element, the size of what was added up to get it."""
    rounding = next(torch.finfo(value.dtype).eps for value in tensors(inputs).values() if value.is_floating_point())
    inputs = cast(inputs, torch.float64)
    grads = [grad.to("cpu", torch.float64).abs() for grad in grads]
    if case.op == "hierarchical_distillation_loss":
        return _loss_magnitude(inputs, grads)
    absolute = {name: value.abs() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for name in ("mean", "out_mean", "residual_mean"):
        if absolute.get(name) is not None:
            absolute[name] *= -1  # x - mean is then the sum of their sizes
    for option in ("activation", "final_activation", "out_activation"):
        if option in absolute:
            absolute[option] = "none"
    if case.op == "branch_conv2d_moments":
        outcome = _moments_magnitude(case, inputs, absolute, rounding, grads)
    elif case.op in UNITS and absolute.get("next_weight", "") is not None:
        outcome = _unit_magnitude(case, inputs, absolute, rounding, grads)
    else:
        outcome = expected(case, absolute, grads)
    outcome.gradients = {name: gradient.abs() for name, gradient in outcome.gradients.items()}
    return outcome


def _unit_magnitude(case: Case, inputs: Inputs, absolute: Inputs, rounding: float, grads: Sequence[Tensor]) -> Outcome:
    """Sizes of what a training unit adds up; the map that it writes is rounded by ``rounding``."""
    over = (1, 2, 3)
    *_, y, mean, _ = expected(case, inputs).results
    *before, size, mean_size, _ = expected(case, absolute).results
    values = max(y.shape[1:4].numel(), 1)
    both = size + mean_size[:, None, None, None]
    apart = (y - mean[:, None, None, None]).abs()
    # A deviation y - mean carries the rounding of both, once more for its other factor.
    spread = (both * (2 * apart + rounding * both)).sum(over) / values
    if not grads:
        return Outcome((*before, size, mean_size, spread))
    *others, grad, grad_mean, grad_var = grads
    total = grad + (grad_mean[:, None, None, None] + grad_var[:, None, None, None] * 2 * both) / values
    none = torch.zeros_like(mean_size)
    outcome = expected(case, absolute, (*others, total, none, none))
    outcome.results = (*before, size, mean_size, spread)
    return outcome


def _moments_magnitude(
    case: Case, inputs: Inputs, absolute: Inputs, rounding: float, grads: Sequence[Tensor]
) -> Outcome:
    """Sizes of what the statistics of a map are made of: the variance is of products of distances from a mean."""
    unit = dataclasses.replace(case, op="branch_conv2d_stats")
    size, mean_size, _ = expected(unit, absolute).results
    of_map = (torch.zeros_like(size), *grads) if grads else ()
    outcome = _unit_magnitude(unit, inputs, absolute, rounding, of_map)
    with torch.no_grad(), K.use_backend("reference"):
        read = K.branch_normalize(*(inputs[name] for name in ("x", *VECTORS)), activation=inputs["activation"])
        distances = read - read.mean((1, 2, 3), keepdim=True).nan_to_num()
        apart = K.branch_conv2d(distances.abs(), absolute["weight"])
    # A distance carries the rounding of what it is the distance of, and of the mean.
    spread = (apart * (apart + 2 * (size + mean_size[:, None, None, None]))).sum((1, 2, 3))
    outcome.results = (mean_size, spread / max(size.shape[1:4].numel(), 1))
    return outcome


def _loss_magnitude(inputs: Inputs, grads: Sequence[Tensor]) -> Outcome:
    """Every exponent is off by eps times the largest logit; a probability, relatively, by as much."""
    logits, alpha, temperature = inputs["logits"], inputs["alpha"], inputs["temperature"]
    models, batch, _ = logits.shape
    largest = 1 + logits.abs().max()
    sizes = K.default_sizes(models)[:-1]
    loss = largest * ((1 - alpha) * models + alpha * temperature**2 * len(sizes))
    outcome = Outcome((loss,))
    if grads:
        per_logit = (1 - alpha) + alpha * temperature * sum(1 / size for size in sizes)
        outcome.gradients = {"logits": (grads[0] * largest * per_logit / batch).expand(logits.shape)}
    return outcome


def tolerance(case: Case, backend: str, dtype: torch.dtype, size: Tensor) -> Tensor:
    """Rounding that ``case`` may show: sums are kept in float32 or better, values stored in ``dtype``."""
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    stored = torch.finfo(dtype)
    composed = (("triton", "fused_bottleneck"), ("triton", "branch_projection"), ("cuda", "branch_projection"))
    naive = backend == "reference" or (backend, case.op) in composed  # a kernel for each step
    roundings = case.naive_roundings if naive else case.roundings
    subnormal = roundings * stored.tiny * stored.eps  # the smallest numbers lie a fixed distance apart
    return (case.terms * sums + roundings * stored.eps) * size + subnormal


def check(case: Case, backend: str, inputs: Inputs, actual: Outcome, grads: Sequence[Tensor] = ()) -> None:
    """Raise unless ``actual`` is what the op should give for ``inputs``, but for the rounding of ``backend``."""
    want, sizes = expected(case, inputs, grads), magnitude(case, inputs, grads)
    for (name, got), (_, right), (_, size) in zip(actual.items(), want.items(), sizes.items(), strict=True):
        assert got.shape == right.shape, f"{case}: shape of {name}"
        error = (got.to("cpu", torch.float64) - right).abs()
        error[(right.abs() > torch.finfo(got.dtype).max) & (got.cpu() == right.sign() * torch.inf)] = 0
        # The statistics of a unit are those of a map that is stored in a smaller dtype.
        dtype = inputs["x"].dtype if case.op in UNITS else got.dtype
        allowed = tolerance(case, backend, dtype, size).expand_as(right)
        wrong = ~(error <= allowed)  # NaN is wrong too
        assert not wrong.any(), (
            f"{case}: {name} is wrong in {int(wrong.sum())} of {wrong.numel()} elements; the first at "
            f"{tuple(wrong.nonzero()[0].tolist())}: got {got.cpu()[wrong][0]}, "
            f"expected {right[wrong][0]}, allowed error {allowed[wrong][0]:.3g}"
        )
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == inputs[name].dtype, f"{case}: dtype of the gradient of {name}"
