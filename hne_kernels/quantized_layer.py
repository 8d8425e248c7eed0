"""An int8 layer with its weights (inference)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import PANEL

GROUP = 4  # channels of a group, csrc/cpu/microkernels/quantized_kernels.h
MOST_WEIGHT = 64  # so that two products of a weight and a feature fit into int16, as AVX2 adds them


class QuantizedLayer(NamedTuple):
    """A layer of integers, for features uint8 ``[G, B, H, W, C]``, where C is a whole number of groups of 4.

    A feature map has a scale and a zero point for each branch, which only the weights know: ``real = scale * (q -
    zero)``. A convolution sums products in int32, ``s = bias + sum of weight * q``; the bias holds what the zero points
    add. Its output is ``clamp(round(s * scale) + zero, 0, 255)``: one float32 product, rounded to the nearest even
    number. As activations the clamp suffices: 0 is the zero point, and 255 at most the activation's maximum.

    ``kind`` and the tensors (G' output branches, P panels of 16 output channels, bias int32 and scale float32
    ``[G', P * 16]``):

    - ``quantize``: images float32 to features: factor float32 ``[1]``, zero int32 ``[1]``.
    - ``conv``: weight int8 ``[G', P, k * k * C / 4, 16, 4]``, bias, scale, zeros int32 ``[G', 2]`` of the input, which
      is the padding, and of the output.
    - ``bottleneck``: weight, bias and scale of the first 1x1 convolution; weight ``[G', k, ceil(k / 4), M, 4]``, bias
      and scale ``[G', M]`` of the depthwise one; weight, bias and scale of the second 1x1 convolution; weight of the
      shortcut, or None; factor float32 ``[G', P * 16]``, or None without shortcut and identity; zeros int32 ``[G', 3]``
      of the features after each convolution. The bias of the sum is that of the shortcut, if there is one: its sums
      become those of the second convolution by ``round(s * factor)``. An identity begins with ``round(q * factor)``.
    - ``pool_linear``: scale float32 ``[G', 1]`` and int32 ``[G', 2]`` of the mean over a feature map of n pixels,
      ``clamp(round((sum of q + n * number 0) * (scale / n)) + number 1)``; then weight, bias, scale and zeros of a
      linear layer as of a ``conv``. As the last layer its output is ``s * scale``, float32 ``[G', B, C']``.

    Args:
        kind, tensors: as above.
        in_channels, middle, channels: of a branch; 0 without a middle.
        kernel_size, stride, padding, replicate: as in :func:`branch_conv2d`.
        identity: a bottleneck that adds its input.
    """

    kind: str
    tensors: tuple[Tensor | None, ...]
    branches: int
    in_channels: int
    channels: int
    middle: int = 0
    kernel_size: int = 1
    stride: int = 1
    padding: int = 0
    replicate: int = 1
    identity: bool = False

    @property
    def projected(self) -> bool:
        """Whether a bottleneck has a convolution as its shortcut."""
        return self.kind == "bottleneck" and self.tensors[9] is not None

    def select_branches(self, branches: slice, replicate: int) -> QuantizedLayer:
        """Some branches of the layer, with ``replicate`` output branches per branch of the input; views."""
        if self.kind == "quantize":
            return self
        tensors = tuple(None if tensor is None else tensor[branches] for tensor in self.tensors)
        return self._replace(tensors=tensors, branches=branches.stop - branches.start, replicate=replicate)


def padded(channels: int, multiple: int = GROUP) -> int:
    """The next whole number of groups, or of ``multiple``."""
    return -(-channels // multiple) * multiple


def pad_last(tensor: Tensor, multiple: int) -> Tensor:
    """Zeros behind the last dimension, up to a whole ``multiple``."""
    return torch.nn.functional.pad(tensor, (0, padded(tensor.shape[-1], multiple) - tensor.shape[-1]))


def pack_quantized(weight: Tensor) -> Tensor:
    """Filters int8 ``[G, C_out, C_in, k, k]`` in panels ``[G, P, k * k * C_in' / 4, 16, 4]``, C_in' whole groups."""
    rows = pad_last(weight.permute(0, 1, 3, 4, 2), GROUP).flatten(2)  # [G, C_out, k * k * C_in']
    rows = pad_last(rows.transpose(1, 2), PANEL).transpose(1, 2)
    return rows.unflatten(1, (-1, PANEL)).unflatten(3, (-1, GROUP)).transpose(2, 3).contiguous()


def unpack_quantized(packed: Tensor, channels: int, kernel_size: int) -> Tensor:
    """The inverse of :func:`pack_quantized`: ``[G, channels, C_in', k, k]``."""
    rows = packed.transpose(2, 3).flatten(3).flatten(1, 2)[:, :channels]
    return rows.unflatten(2, (kernel_size, kernel_size, -1)).permute(0, 1, 4, 2, 3)


def pack_quantized_depthwise(weight: Tensor) -> Tensor:
    """Filters int8 ``[G, C, k, k]``, C whole groups, as columns in groups of rows ``[G, k, ceil(k / 4), C, 4]``."""
    columns = pad_last(weight.permute(0, 3, 1, 2), GROUP)  # [G, kx, C, rows]
    return columns.unflatten(3, (-1, GROUP)).transpose(2, 3).contiguous()


def unpack_quantized_depthwise(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_quantized_depthwise`."""
    kernel_size = packed.shape[1]
    return packed.transpose(2, 3).flatten(3)[..., :kernel_size].permute(0, 2, 3, 1)
