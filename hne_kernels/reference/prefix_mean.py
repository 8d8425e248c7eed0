"""A mean per ensemble size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def prefix_mean(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """See :func:`hne_kernels.prefix_mean`."""
    return torch.stack([logits[:size].mean(0) for size in sizes])
