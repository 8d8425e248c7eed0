"""The layout of packed weights for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .checks import PANEL


def pack_weight(weight: Tensor) -> Tensor:
    """Pack filters into panels of 16 output channels, which a matrix kernel reads front to back.

    Args:
        weight: ``[G, C_out, C_in, k, k]``, any dtype.

    Returns:
        ``[G, ceil(C_out / 16), k, k, C_in, 16]``; channels beyond ``C_out`` are zero.
    """
    checks.rank("weight", weight, 5, "[branches, out_channels, in_channels, k, k]")
    branches, out_channels, in_channels, *kernel = weight.shape
    panels = -(-out_channels // PANEL)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, panels * PANEL - out_channels))
    split = padded.view(branches, panels, PANEL, in_channels, *kernel)
    return split.permute(0, 1, 4, 5, 3, 2).contiguous()


def unpack_weight(packed: Tensor, out_channels: int) -> Tensor:
    """The inverse of :func:`pack_weight`: ``[G, P, k, k, C_in, 16]`` to ``[G, C_out, C_in, k, k]``."""
    return packed.permute(0, 1, 5, 4, 2, 3).flatten(1, 2)[:, :out_channels]
