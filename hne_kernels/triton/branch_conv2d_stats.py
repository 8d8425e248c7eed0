"""The matrix product of branch_conv2d that normalises what it reads and leaves statistics of what it writes."""

from __future__ import annotations

from torch import Tensor

from . import unit
from .branch_conv2d import launch, strides, weigh
from .training import Training


def _convolve(
    source: Tensor, weight: Tensor, out: Tensor, parents: int, replicate: int, stride: int, padding: int, *,
    transposed: bool, training: Training,
) -> None:  # fmt: skip
    launch(
        source, weight, strides(weight, transposed=transposed), out, parents, weight.shape[0], replicate,
        weight.shape[4], stride, padding, transposed=transposed, training=training,
    )  # fmt: skip


branch_conv2d_stats = unit.define("branch_conv2d_stats", _convolve, weigh, depthwise=False)
