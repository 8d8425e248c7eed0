"""The strongest peer in plain PyTorch: channels-last memory, and no replicated features.

The children of a parent are computed as one convolution, whose output channels are those of all children.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hne import HNE
from hne.executors import NaiveExecutor


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, branches: int, replicate: int
) -> Tensor:
    """Convolve ``[batch, parents * channels, H, W]`` with ``weight`` ``[branches * out_channels, channels, k, k]``.

    Each parent has ``replicate`` children. The last parent may have fewer; it is then a separate convolution.
    """
    parents = -(-branches // replicate)
    channels, outputs = x.shape[1] // parents, len(weight) // branches

    def convolve_parents(first: int, last: int) -> Tensor:
        rows = slice(first * replicate * outputs, min(last * replicate, branches) * outputs)
        images = x[:, first * channels : last * channels]
        return F.conv2d(
            images, weight[rows], None if bias is None else bias[rows], stride, padding, groups=last - first
        )

    complete = branches // replicate
    if complete in (0, parents):
        return convolve_parents(0, parents)
    return torch.cat([convolve_parents(0, complete), convolve_parents(complete, parents)], 1)


class ChannelsLastExecutor(NaiveExecutor):
    """:class:`NaiveExecutor` without replication of features. Images and parameters must be in channels-last memory."""

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, branches: int, replicate: int
    ) -> Tensor:
        return convolve(x, weight, bias, stride, padding, branches, replicate)


class ChannelsLastHNE(HNE):
    """A hierarchical ensemble computed by :class:`ChannelsLastExecutor`."""

    _EXECUTOR = ChannelsLastExecutor()

    def executor(self) -> ChannelsLastExecutor:
        return self._EXECUTOR


def convert(model: HNE) -> ChannelsLastHNE:
    """Copy a model, with the same parameters, mode, dtype and device."""
    parameter = next(model.parameters())
    copy = ChannelsLastHNE.from_config(model.config()).to(parameter.device, parameter.dtype)
    copy.load_state_dict(model.state_dict())
    return copy.to(memory_format=torch.channels_last).train(model.training)


# --- the ops -------------------------------------------------------------------------------------------------------
# Features [G, B, H, W, C] lie in memory as [B, H, W, G * C]. Every parent has all its children.


def in_memory(x: Tensor) -> Tensor:
    """Copy ``[G, B, H, W, C]`` so that its memory is ``[B, H, W, G * C]``."""
    return x.permute(1, 2, 3, 0, 4).contiguous().permute(3, 0, 1, 2, 4)


def branch_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, replicate: int = 1
) -> Tensor:
    """See :func:`hne_kernels.branch_conv2d`."""
    filters, offsets = weight.flatten(0, 1), None if bias is None else bias.flatten()
    y = convolve(_interleave(x), filters, offsets, stride, padding, len(weight), replicate)
    return _split_branches(y, len(weight))


def branch_depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """See :func:`hne_kernels.branch_depthwise_conv2d`; without replication."""
    filters, offsets = weight.flatten(0, 1)[:, None], None if bias is None else bias.flatten()
    y = F.conv2d(_interleave(x), filters, offsets, stride, padding, groups=len(filters))
    return _split_branches(y, len(weight))


def fused_conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, padding: int, activation: str) -> Tensor:
    """See :func:`hne_kernels.fused_conv2d`; the weights are not packed here."""
    return _activate(branch_conv2d(x, weight, bias, padding=padding), activation)


def fused_bottleneck(
    x: Tensor, *, stride: int, replicate: int, activation: str, identity: bool, final_activation: str, **weights: Tensor
) -> Tensor:
    """See :func:`hne_kernels.fused_bottleneck`, whose names ``weights`` have; they are not packed here."""
    y = _activate(branch_conv2d(x, weights["expand"], weights["expand_bias"], replicate=replicate), activation)
    depthwise = weights["depthwise"].permute(0, 3, 1, 2)
    y = branch_depthwise_conv2d(
        y, depthwise, weights["depthwise_bias"], stride=stride, padding=depthwise.shape[-1] // 2
    )
    y = branch_conv2d(_activate(y, activation), weights["project"], weights["project_bias"])
    if "shortcut" in weights:
        y = y + branch_conv2d(x, weights["shortcut"], weights["shortcut_bias"], stride=stride, replicate=replicate)
    if identity:
        y = y + x
    return _activate(y, final_activation)


def _interleave(x: Tensor) -> Tensor:
    """``[G, B, H, W, C]`` to ``[B, G * C, H, W]``."""
    return x.permute(1, 0, 4, 2, 3).flatten(1, 2)


def _split_branches(y: Tensor, branches: int) -> Tensor:
    """``[B, G * C, H, W]`` to ``[G, B, H, W, C]``."""
    return y.unflatten(1, (branches, -1)).permute(1, 0, 3, 4, 2)


def _activate(x: Tensor, activation: str) -> Tensor:
    return x if activation == "none" else getattr(F, activation)(x)
