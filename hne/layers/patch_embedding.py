"""The first layer of a vision transformer: patches of the image become tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .branch_parameters import BranchParameters
from .executor import Executor, Features
from .layer import Layer
from .parameters import BranchConv, Size, check_own_parameters
from .spec import LayerSpec, check_int
from .submodules import check_kind
from .tokens import from_tokens, to_tokens


@dataclass(frozen=True)
class PatchEmbedding(LayerSpec):
    """Patches of an image as tokens (Dosovitskiy et al. 2021, eq. 1): a convolution of the patch's size and stride with
    bias, a class token before the others, and the sum with an embedding of the position.

    The tokens, from left to right and top to bottom, are the rows of a feature map of one column.

    Args:
        channels: Channels of a token.
        patch_size: Height and width of a patch.
        image_size: Height and width of the input, a multiple of ``patch_size``: there is a position embedding for each
            patch.
        class_token: Whether there is a class token.
    """

    patch_size: int = 16
    image_size: int = 224
    class_token: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("PatchEmbedding.patch_size", self.patch_size, 1)
        check_int("PatchEmbedding.image_size", self.image_size, 1)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"PatchEmbedding.image_size must be a multiple of patch_size = {self.patch_size}, got {self.image_size}"
            )
        if not isinstance(self.class_token, bool):
            raise TypeError(f"PatchEmbedding.class_token must be a bool, got {self.class_token!r}")

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return (self.image_size // self.patch_size) ** 2 + int(self.class_token)

    def __str__(self) -> str:
        return f"patches {self.patch_size}x{self.patch_size} {self.channels}"


class PatchEmbeddingLayer(Layer, spec=PatchEmbedding):
    """Implements :class:`PatchEmbedding`: ``[class_token, conv(x)] + position``."""

    spec: PatchEmbedding

    def __init__(self, spec: PatchEmbedding, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        self.conv = PatchConv(branches, in_channels, spec.channels, spec.patch_size)
        self.class_token = BranchEmbedding(branches, 1, spec.channels) if spec.class_token else None
        self.position = BranchEmbedding(branches, spec.tokens, spec.channels)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        images = executor.to_maps(x, self.conv.in_channels)
        self._check_size(images.shape[3], images.shape[4])
        y = executor.conv(self.conv, executor.from_maps(images), branches, replicate)
        tokens = to_tokens(executor.to_maps(y, self.spec.channels))
        if self.class_token is not None:
            class_token = embedding(executor, self.class_token, branches).expand(-1, tokens.shape[1], -1, -1)
            tokens = torch.cat([class_token, tokens], 2)
        return executor.from_maps(from_tokens(tokens + embedding(executor, self.position, branches)))

    def macs(self, size: Size) -> int:
        self._check_size(*size)
        return self.conv.macs(size)

    def output_size(self, size: Size) -> Size:
        self._check_size(*size)
        return self.spec.tokens, 1

    def _check_size(self, height: int, width: int) -> None:
        side = self.spec.image_size
        if (height, width) != (side, side):
            raise ValueError(
                f"the position embedding is for an input of {side}x{side} pixels (PatchEmbedding.image_size), "
                f"got {height}x{width}"
            )


class PatchConv(BranchConv):
    """The convolution of each patch, initialised as in torchvision's ``VisionTransformer``: a normal distribution,
    cut off, with variance 1 / fan in; the bias is zero."""

    def __init__(self, branches: int, in_channels: int, channels: int, patch_size: int) -> None:
        super().__init__(branches, in_channels, channels, patch_size, patch_size)

    def reset_parameters(self) -> None:
        check_own_parameters(self.conv)
        nn.init.trunc_normal_(self.conv.weight, std=(self.in_channels * self.kernel_size**2) ** -0.5)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)


class BranchEmbedding(BranchParameters):
    """Learnt tokens of every branch: a class token, or an embedding of positions.

    Args:
        branches, channels: As in :class:`BranchModule`.
        tokens: Number of tokens.

    Attributes:
        weight: ``[branches, tokens, channels]``.
    """

    weight: nn.Parameter

    def __init__(self, branches: int, tokens: int, channels: int) -> None:
        super().__init__(branches, 1, tokens, channels)

    def _initialise(self) -> None:
        """As in DeiT (Touvron et al. 2021): a normal distribution of standard deviation 0.02, cut off."""
        nn.init.trunc_normal_(self.weight, std=0.02)


def embedding(executor: Executor, module: BranchEmbedding, branches: slice) -> Tensor:
    """The tokens of some branches, ``[len(branches), 1, tokens, channels]``.

    Raises:
        SkippedModuleError: The module was replaced by one of another kind, or has hooks.
    """
    check_kind(module, BranchEmbedding)
    return executor.read(module, branches)[0]
