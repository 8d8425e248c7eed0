"""Naive as strong as plain PyTorch allows without other kernels: channels-last memory, and no features are copied.

The children of a parent are one convolution with the outputs of all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hne import HNE
from hne.executors.naive import Naive
from hne.layers.modules import Execution


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, branches: int, replicate: int
) -> Tensor:
    """Convolution of ``[batch, parents * channels, H, W]`` by ``weight`` ``[branches * out_channels, channels, k, k]``.

    Each parent has ``replicate`` children; the last one may have fewer, and is then a convolution of its own.
    """
    parents = -(-branches // replicate)
    channels, outputs = x.shape[1] // parents, len(weight) // branches

    def part(first: int, last: int) -> Tensor:
        ours = slice(first * replicate * outputs, min(last * replicate, branches) * outputs)
        images = x[:, first * channels : last * channels]
        filters, offsets = weight[ours], None if bias is None else bias[ours]
        return F.conv2d(images, filters, offsets, stride, padding, groups=last - first)

    complete = branches // replicate
    if complete in (0, parents):
        return part(0, parents)
    return torch.cat([part(0, complete), part(complete, parents)], 1)


class ChannelsLast(Naive):
    """Execution as in :class:`Naive`, but for the copies. Images and parameters are to be in channels-last memory."""

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, branches: int, replicate: int
    ) -> Tensor:
        return convolve(x, weight, bias, stride, padding, branches, replicate)


class ChannelsLastHNE(HNE):
    """The ensemble so computed."""

    _EXECUTION = ChannelsLast()

    def execution(self) -> Execution:
        return self._EXECUTION


def of(model: HNE) -> ChannelsLastHNE:
    """A copy of a model: same parameters, mode, dtype and device."""
    parameter = next(model.parameters())
    copy = ChannelsLastHNE.from_config(model.config()).to(parameter.device, parameter.dtype)
    copy.load_state_dict(model.state_dict())
    return copy.to(memory_format=torch.channels_last).train(model.training)


# --- the ops -------------------------------------------------------------------------------------------------------
# Features [G, B, H, W, C] lie in memory as [B, H, W, G * C]; all families are complete.


def in_memory(x: Tensor) -> Tensor:
    """The same values of ``[G, B, H, W, C]``, in memory as ``[B, H, W, G * C]``."""
    return x.permute(1, 2, 3, 0, 4).contiguous().permute(3, 0, 1, 2, 4)


def branch_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0, replicate: int = 1
) -> Tensor:
    """As :func:`hne_kernels.branch_conv2d`."""
    filters, offsets = weight.flatten(0, 1), None if bias is None else bias.flatten()
    return _branches(convolve(_side_by_side(x), filters, offsets, stride, padding, len(weight), replicate), len(weight))


def branch_depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """As :func:`hne_kernels.branch_depthwise_conv2d`, without branching."""
    filters, offsets = weight.flatten(0, 1)[:, None], None if bias is None else bias.flatten()
    return _branches(F.conv2d(_side_by_side(x), filters, offsets, stride, padding, groups=len(filters)), len(weight))


def fused_conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, padding: int, activation: str) -> Tensor:
    """As :func:`hne_kernels.fused_conv2d`, with the weights as they were before they were packed."""
    return _activate(branch_conv2d(x, weight, bias, padding=padding), activation)


def fused_bottleneck(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    project_bias: Tensor,
    shortcut: Tensor | None = None,
    shortcut_bias: Tensor | None = None,
    *,
    stride: int,
    replicate: int,
    activation: str,
    identity: bool,
    final_activation: str,
) -> Tensor:
    """As :func:`hne_kernels.fused_bottleneck`, with the weights as they were before they were packed."""
    y = _activate(branch_conv2d(x, expand, expand_bias, replicate=replicate), activation)
    filters = depthwise.permute(0, 3, 1, 2)
    y = branch_depthwise_conv2d(y, filters, depthwise_bias, stride=stride, padding=depthwise.shape[1] // 2)
    y = branch_conv2d(_activate(y, activation), project, project_bias)
    if shortcut is not None:
        y = y + branch_conv2d(x, shortcut, shortcut_bias, stride=stride, replicate=replicate)
    if identity:
        y = y + x
    return _activate(y, final_activation)


def _side_by_side(x: Tensor) -> Tensor:
    return x.permute(1, 0, 4, 2, 3).flatten(1, 2)


def _branches(y: Tensor, branches: int) -> Tensor:
    return y.unflatten(1, (branches, -1)).permute(1, 0, 3, 4, 2)


def _activate(x: Tensor, activation: str) -> Tensor:
    return x if activation == "none" else getattr(F, activation)(x)
