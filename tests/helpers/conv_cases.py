"""Cases of the branch convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from case import Case, Inputs, normal


def out_size(size: int, k: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - k) // stride + 1


@dataclass(frozen=True)
class Geometry:
    """The sizes of a convolution: G input branches, r children each (the last may lack some), B samples of H x W."""

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
    def out_pixels(self) -> tuple[int, int]:
        """Height and width of the output."""
        return out_size(self.H, self.k, self.stride, self.padding), out_size(self.W, self.k, self.stride, self.padding)

    @property
    def positions(self) -> int:
        return self.B * self.out_pixels[0] * self.out_pixels[1]

    def options(self) -> Inputs:
        return {"stride": self.stride, "padding": self.padding, "replicate": self.r}


# Together: every G of 1, 2, 3, 5 with r of 1 to 4; empty batches and batches of one; feature maps of one pixel,
# smaller than the kernel, odd, not square; channels that no vector width divides; windows that lie wholly in the
# padding; rows that the stride skips at the end.
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
    # Channels that fill vectors, several tiles of a matrix kernel, strides.
    Geometry(2, 2, 1, 9, 7, 16, 24, 3, 2, 1),
    Geometry(1, 2, 3, 7, 9, 72, 136, 1, 1, 0),
    Geometry(2, 1, 2, 5, 4, 24, 93, 1, 1, 0),  # short sums, a panel of weights that is not full
    # Tiles of a depthwise 3x3 kernel: several samples in one; several across, down and over the channels.
    Geometry(2, 1, 3, 7, 7, 24, 24, 3, 1, 1),
    Geometry(1, 2, 2, 9, 19, 64, 8, 3, 1, 1),
    Geometry(1, 1, 2, 13, 17, 72, 16, 3, 2, 1),
    Geometry(2, 1, 1, 6, 5, 16, 8, 3, 1, 2),
    # Images, with blocks of pixels that begin and end within a row.
    Geometry(2, 1, 3, 9, 17, 3, 17, 3, 1, 1),
    Geometry(1, 2, 2, 11, 31, 5, 5, 5, 2, 2),
]

# Enough tiles of 128 columns for every multiprocessor of a large GPU: of the result, and of the gradients of input and
# weight.
WIDE_GEOMETRIES = [
    Geometry(33, 1, 2, 13, 5, 72, 136, 1, 1, 0),
    Geometry(66, 2, 2, 3, 3, 136, 72, 1, 2, 0),
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
