"""Operations that backbones write as functions in their ``forward``, as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FirstToken(nn.Module):
    """The first token of ``[batch, tokens, channels]``, as ``[batch, channels]``: the class token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class TokenMean(nn.Module):
    """The mean of the tokens ``[batch, tokens, channels]`` from number ``first`` on, as ``[batch, channels]``."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.first :].mean(1)


class KeepInput(nn.Module):
    """A module that writes into its input, applied to a copy of it: other branches read the same input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x.clone())
        return result


class ImageTokens(nn.Module):
    """The first operations of a vision transformer: patches as tokens, class token and registers before them, and the
    sum with the position embedding; ``[batch, channels, height, width]`` to ``[batch, tokens, channels]``.

    Args:
        conv: The convolution of the patches.
        class_token: The class token ``[1, 1, channels]``, or None.
        registers: Further tokens ``[1, registers, channels]``, or None.
        position: The position embedding ``[1, tokens, channels]``, of all tokens or of the patches alone.
    """

    def __init__(
        self,
        conv: nn.Module,
        class_token: nn.Parameter | None,
        registers: nn.Parameter | None,
        position: nn.Parameter,
    ) -> None:
        super().__init__()
        self.conv = conv
        self.class_token = class_token
        self.registers = registers
        self.position = position

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.conv(x).flatten(2).transpose(1, 2)
        patches_alone = self.position.shape[1] == tokens.shape[1]
        tokens = tokens + self.position if patches_alone else tokens
        first = [t.expand(len(x), -1, -1) for t in (self.class_token, self.registers) if t is not None]
        tokens = torch.cat([*first, tokens], 1)
        return tokens if patches_alone else tokens + self.position
