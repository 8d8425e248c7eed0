"""The operations that the forward of a layer is written in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from .parameters import BranchLinear, ConvNorm

Features = Any  # what one operation hands to the next; each executor has its own types


class Executor(ABC):
    """Computes the operations of a layer.

    ``branches`` is the range of output branches (a slice with ``start`` and ``stop``). ``replicate`` is the number of
    output branches per input branch; the last may have fewer. The layout of features is up to the executor.
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
        """:meth:`conv_norm` at the entry of a layer that reads ``x`` again: ``x`` in the form for further readers, and
        the result."""
        return x, self.conv_norm(module, x, branches, replicate, activation)

    @abstractmethod
    def linear(
        self, module: BranchLinear, x: Tensor, branches: slice, replicate: int = 1, activation: str = "none"
    ) -> Tensor:
        """``activation(linear(x))`` of features of one pixel."""

    @abstractmethod
    def pool(self, x: Features) -> Tensor:
        """Global average pooling: features of one pixel."""

    @abstractmethod
    def replicate(self, x: Features, branches: slice, replicate: int, channels: int) -> Features:
        """Copy the branches of ``x`` (``channels`` each) to the output ``branches``."""
