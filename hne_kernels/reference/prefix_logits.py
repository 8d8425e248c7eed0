"""A batched matrix product, then a mean per ensemble size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .prefix_mean import prefix_mean


def prefix_logits(features: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See :func:`hne_kernels.prefix_logits`."""
    member = torch.einsum("nbc,nlc->nbl", features, weight)
    if bias is not None:
        member = member + bias[:, None]
    return member, prefix_mean(member, sizes)
