"""Copy the features of replicated branches, interleave the channels of all branches, and run one grouped convolution
(the paper's Figure 2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def branch_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, replicate: int) -> Tensor:
    """See :func:`hne_kernels.branch_conv2d`."""
    return grouped_conv2d(x, weight, bias, stride, padding, replicate, weight.shape[0])


def grouped_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, replicate: int, groups: int
) -> Tensor:
    """``F.conv2d`` on ``[B, branch * channel, H, W]``; ``weight`` is [branches, out, in / groups..., k, k]."""
    branches = weight.shape[0]
    interleaved = replicated(x.permute(1, 0, 4, 2, 3), replicate, branches, dim=1).flatten(1, 2).contiguous()
    if interleaved.shape[2:] == (1, 1):  # its strides are ambiguous: torch may treat it as channels-last
        interleaved = interleaved.clone(memory_format=torch.contiguous_format)
    flat_bias = None if bias is None else bias.flatten()
    y = F.conv2d(interleaved, weight.flatten(0, 1), flat_bias, stride, padding, groups=groups)
    return y.unflatten(1, (branches, -1)).permute(1, 0, 3, 4, 2)


def replicated(x: Tensor, replicate: int, branches: int, dim: int = 0) -> Tensor:
    """``x`` with the features of each parent copied for its children along ``dim``, ``branches`` children in all."""
    return x if replicate == 1 else x.repeat_interleave(replicate, dim).narrow(dim, 0, branches)
