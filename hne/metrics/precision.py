"""The precision in which metrics are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half-precision values to float32; float32 and float64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
