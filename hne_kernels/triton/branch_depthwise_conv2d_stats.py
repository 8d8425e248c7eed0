"""The depthwise convolution that normalises what it reads and leaves statistics of what it writes."""

from __future__ import annotations

from . import unit
from .branch_depthwise_conv2d import launch, weigh

branch_depthwise_conv2d_stats = unit.define("branch_depthwise_conv2d_stats", launch, weigh, depthwise=True)
