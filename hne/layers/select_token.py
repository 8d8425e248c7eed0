"""One token of a sequence, as the class token of a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

from .executor import Executor, Features
from .layer import Layer, check_same_channels
from .parameters import Size
from .spec import LayerSpec, check_int
from .tokens import from_tokens, to_tokens


@dataclass(frozen=True)
class SelectToken(LayerSpec):
    """One of the tokens, as features with one pixel; the head reads it.

    Args:
        channels: Channels of the input; by default those of the layer before.
        index: Number of the token, from 0; the class token is the first.
    """

    channels: int | None = None  # type: ignore[assignment]
    index: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("SelectToken.index", self.index, 0)

    def __str__(self) -> str:
        return f"token {self.index}"


class SelectTokenLayer(Layer, spec=SelectToken):
    """Implements :class:`SelectToken`."""

    spec: SelectToken

    def __init__(self, spec: SelectToken, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        check_same_channels(spec, in_channels)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        tokens = to_tokens(executor.to_maps(x, self.channels))
        index = self.spec.index
        self._check_tokens(tokens.shape[2])
        token = executor.from_maps(from_tokens(tokens[:, :, index : index + 1]))
        return executor.replicate(token, branches, replicate, self.channels)

    def macs(self, size: Size) -> int:
        return 0

    def output_size(self, size: Size) -> Size:
        height, width = size
        self._check_tokens(height * width)
        return (1, 1)

    def _check_tokens(self, tokens: int) -> None:
        if self.spec.index >= tokens:
            raise ValueError(f"SelectToken.index must be below the number of tokens, {tokens}, got {self.spec.index}")
