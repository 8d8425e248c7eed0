"""The interface of an executor: the operations from which the forward of a layer is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .branch_parameters import BranchParameters
from .parameters import BranchConv, BranchNorm, ConvNorm

Features = Any  # the result of an operation; each executor has its own types


class Executor(ABC):
    """Computes the operations of a layer.

    ``branches`` is the range of output branches to compute (a slice with ``start`` and ``stop``). ``replicate`` is the
    number of output branches per input branch; the last input branch may have fewer. Each executor has its own layout
    of features.
    """

    @abstractmethod
    def conv_norm(
        self,
        module: ConvNorm,
        x: Features,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Features | None = None,
    ) -> Features:
        """``activation(batch_norm(conv(x)) + residual)``."""

    def entry_conv(
        self, module: ConvNorm, x: Features, branches: slice, replicate: int, activation: str
    ) -> tuple[Features, Features]:
        """:meth:`conv_norm` as the first operation of a layer that also reads ``x`` elsewhere, for its shortcut.

        Returns:
            ``x``, converted for the other readers where the executor needs that, and the result of the convolution.
        """
        return x, self.conv_norm(module, x, branches, replicate, activation)

    @abstractmethod
    def norm(self, module: BranchNorm, x: Features, branches: slice, activation: str = "none") -> Features:
        """``activation(batch_norm(x))``; ``x`` has one branch for each of ``branches``."""

    @abstractmethod
    def conv(
        self,
        module: BranchConv,
        x: Features,
        branches: slice,
        replicate: int = 1,
        activation: str = "none",
        residual: Features | None = None,
    ) -> Tensor:
        """``activation(conv(x) + bias + residual)``; a linear layer of every pixel where the kernel is 1x1."""

    @abstractmethod
    def pool(self, x: Features) -> Tensor:
        """Global average pooling: the mean over all pixels, as features with one pixel."""

    @abstractmethod
    def replicate(self, x: Features, branches: slice, replicate: int, channels: int) -> Features:
        """Copy each branch of ``x`` (of ``channels`` channels) to its output branches."""

    def read(self, module: BranchParameters, branches: slice) -> tuple[Tensor, ...]:
        """The parameters of some branches, each ``[len(branches), ...]``; none if a neighbouring convolution contains
        them, as after folding."""
        return module.read(branches)

    @abstractmethod
    def to_maps(self, x: Features, channels: int) -> Tensor:
        """``x`` (of ``channels`` channels) as ``[branches, batch, channels, height, width]``, for plain PyTorch.

        A view where memory allows; :meth:`from_maps` goes back. What lies between serves every executor.
        """

    @abstractmethod
    def from_maps(self, maps: Tensor) -> Features:
        """Features of ``[branches, batch, channels, height, width]``."""

    def channelwise(self, function: Callable[..., Tensor], channels: int, *features: Features) -> Features:
        """A function that treats all channels and samples alike, such as pooling or a sum.

        Args:
            function: Its arguments and its result are feature maps ``[..., channels, height, width]``, where the
                channels may be those of one branch or of all.
            channels: Channels of each of ``features``.
            features: The arguments.
        """
        return self.from_maps(function(*(self.to_maps(x, channels) for x in features)))

    def to_branches(self, x: Features, channels: int) -> Sequence[Tensor]:
        """The feature maps ``[batch, channels, height, width]`` of each branch of ``x`` (of ``channels`` channels)."""
        return self.to_maps(x, channels).unbind()

    def from_branches(self, maps: Sequence[Tensor]) -> Features:
        """The inverse of :meth:`to_branches`."""
        if len(maps) == 1:
            return self.from_maps(maps[0].unsqueeze(0))
        rows = torch.stack([x.permute(0, 2, 3, 1) for x in maps])  # channels last, as the kernels read it
        return self.from_maps(rows.permute(0, 1, 4, 2, 3))
