"""What the blocks of a ResNet have in common: a shortcut, squeeze-and-excitation, and the sum of both ways."""

from __future__ import annotations

from typing import Any

from torch import nn

from .activations import ACTIVATIONS
from .executor import Executor, Features
from .parameters import ConvNorm, Size
from .spec import check_odd
from .squeeze_excitation import SqueezeExcitation

PROJECTIONS = ("shape", "branch")


def check_residual(spec: Any) -> None:
    """Raise unless kernel size and projection of a block with a shortcut are valid."""
    name = type(spec).__name__
    check_odd(f"{name}.kernel_size", spec.kernel_size)
    if spec.projection not in PROJECTIONS:
        raise ValueError(f"{name}.projection must be one of {', '.join(PROJECTIONS)}, got {spec.projection!r}")


class ResidualLayer(nn.Module):
    """Base class, beside :class:`Layer`, of blocks with a shortcut.

    Attributes:
        shortcut: The 1x1 convolution of the shortcut; None where the shortcut is the identity.
        squeeze: The squeeze-and-excitation before the sum, or None.
    """

    spec: Any
    shortcut: ConvNorm | None
    squeeze: SqueezeExcitation | None

    def add_shortcut(self, in_channels: int, branches: int, replicate: int) -> None:
        """Make the parameters of shortcut and squeeze-and-excitation."""
        spec = self.spec
        projected = spec.stride > 1 or in_channels != spec.channels or (spec.projection == "branch" and replicate > 1)
        self.shortcut = ConvNorm(branches, in_channels, spec.channels, 1, spec.stride) if projected else None
        self.squeeze = SqueezeExcitation(branches, spec.channels, spec.squeeze) if spec.squeeze else None

    def residual(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        """The summand of the shortcut."""
        if self.shortcut is None:
            return executor.replicate(x, branches, replicate, self.spec.channels)
        return executor.conv_norm(self.shortcut, x, branches, replicate)

    def finish(self, executor: Executor, last: ConvNorm, y: Features, branches: slice, residual: Features) -> Features:
        """``activation(squeeze(batch_norm(last(y))) + residual)``."""
        channels, activation = self.spec.channels, self.spec.activation
        if self.squeeze is None:
            return executor.conv_norm(last, y, branches, 1, activation, residual)
        y = self.squeeze(executor, executor.conv_norm(last, y, branches), branches)
        return executor.channelwise(lambda y, x: ACTIVATIONS[activation](y + x), channels, y, residual)

    def shortcut_macs(self, size: Size) -> int:
        """Multiply-adds of shortcut and squeeze-and-excitation for an input of ``size``."""
        shortcut = 0 if self.shortcut is None else self.shortcut.macs(size)
        return shortcut if self.squeeze is None else shortcut + self.squeeze.macs()
