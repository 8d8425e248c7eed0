"""The heads as a grouped matrix product, then the running mean.

Two kernels: a tile that held all members of some samples would leave most of the GPU idle (128 samples and 100 classes
are four such tiles), and the members' logits are written in any case.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .branch_conv2d import branch_conv2d
from .prefix_mean import prefix_mean


def prefix_logits(features: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See :func:`hne_kernels.prefix_logits`; made of two ops, whose gradients it has."""
    member = branch_conv2d(features[:, :, None, None], weight[..., None, None], bias, 1, 0, 1).flatten(2)
    return member, prefix_mean(member, sizes)
