"""Tokens: features whose pixels are the elements of a sequence, T rows of one column."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def to_tokens(maps: Tensor) -> Tensor:
    """Feature maps ``[branches, batch, channels, height, width]`` as tokens ``[branches, batch, T, channels]``; a view
    of channels-last memory."""
    return maps.flatten(3).transpose(2, 3)


def from_tokens(tokens: Tensor, size: Sequence[int] = (-1, 1)) -> Tensor:
    """The inverse of :func:`to_tokens`, a view; by default the feature maps have T rows of one column."""
    return tokens.transpose(2, 3).unflatten(3, tuple(size))
