"""The heads as a grouped matrix product, then the running mean.

Two kernels, as tiles with all members of some samples would leave most of the GPU idle (128 samples and 100 classes are
four such tiles), and the logits of the members are results anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .branch_conv2d import branch_conv2d
from .prefix_mean import prefix_mean


def prefix_logits(features: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See :func:`hne_kernels.prefix_logits`; composed of two ops, which define its gradients."""
    member = branch_conv2d(features[:, :, None, None], weight[..., None, None], bias, 1, 0, 1).flatten(2)
    return member, prefix_mean(member, sizes)
