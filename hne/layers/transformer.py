"""The encoder block of a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from .branch_parameters import BranchParameters
from .executor import Executor, Features
from .layer import Layer, check_same_channels
from .layer_norm import BranchLayerNorm, layer_norm
from .parameters import BranchLinear, Size, check_own_parameters
from .spec import LayerSpec, check_int, check_positive
from .submodules import check_kind
from .tokens import from_tokens, to_tokens


@dataclass(frozen=True)
class TransformerBlock(LayerSpec):
    """An encoder block with the norm before each part (Dosovitskiy et al. 2021, eq. 2 and 3)::

        x = x + scale1 * project(attention(qkv(norm1(x))))
        x = x + scale2 * down(activation(up(norm2(x))))

    It is ``EncoderBlock`` of torchvision and ``Block`` of timm without dropout. Every pixel of the input is a token.
    PyTorch's fused attention has no second derivatives and no forward-mode ones; they are there within
    ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        channels: Channels of a token, those of the input.
        heads: Number of attention heads, a divisor of ``channels``.
        hidden: Channels between ``up`` and ``down``.
        activation: A name of :data:`hne.layers.ACTIVATIONS`.
        layer_scale: Whether a factor per channel scales both parts (Touvron et al. 2021, CaiT); initially 1e-5.
        eps: Of the layer norms, as in ``nn.LayerNorm``.
    """

    heads: int
    hidden: int
    activation: str = "gelu"
    layer_scale: bool = False
    eps: float = 1e-6

    scaled_fields: ClassVar[tuple[str, ...]] = ("channels", "hidden")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("TransformerBlock.heads", self.heads, 1)
        if self.channels % self.heads:
            raise ValueError(
                f"TransformerBlock.heads must divide TransformerBlock.channels, got {self.heads} and {self.channels}"
            )
        if not isinstance(self.layer_scale, bool):
            raise TypeError(f"TransformerBlock.layer_scale must be a bool, got {self.layer_scale!r}")
        check_positive("TransformerBlock.eps", self.eps)

    def __str__(self) -> str:
        return f"transformer {self.channels}-{self.hidden} ({self.heads} heads)"


class TransformerBlockLayer(Layer, spec=TransformerBlock):
    """Implements :class:`TransformerBlock`. Linear layers are 1x1 convolutions of the tokens, on the kernels."""

    spec: TransformerBlock

    def __init__(self, spec: TransformerBlock, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        check_same_channels(spec, in_channels)
        channels, hidden = spec.channels, spec.hidden
        self.norm1 = BranchLayerNorm(branches, channels, spec.eps)
        self.qkv = TokenLinear(branches, channels, 3 * channels)
        self.project = TokenLinear(branches, channels, channels)
        self.scale1 = BranchScale(branches, channels) if spec.layer_scale else None
        self.norm2 = BranchLayerNorm(branches, channels, spec.eps)
        self.up = TokenLinear(branches, channels, hidden)
        self.down = TokenLinear(branches, hidden, channels)
        self.scale2 = BranchScale(branches, channels) if spec.layer_scale else None

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        channels = self.spec.channels

        def linear(module: TokenLinear, tokens: Tensor, activation: str = "none") -> Tensor:
            y = executor.conv(module, executor.from_maps(from_tokens(tokens)), branches, 1, activation)
            return to_tokens(executor.to_maps(y, module.channels))

        maps = executor.to_maps(executor.replicate(x, branches, replicate, channels), channels)
        tokens = to_tokens(maps)
        y = linear(self.qkv, layer_norm(executor, self.norm1, tokens, branches))
        y = linear(self.project, attention(y, self.spec.heads))
        tokens = tokens + scaled(executor, self.scale1, y, branches)
        y = linear(self.up, layer_norm(executor, self.norm2, tokens, branches), self.spec.activation)
        tokens = tokens + scaled(executor, self.scale2, linear(self.down, y), branches)
        return executor.from_maps(from_tokens(tokens, maps.shape[3:]))

    def macs(self, size: Size) -> int:
        tokens = size[0] * size[1]
        linears = sum(module.macs(size) for module in (self.qkv, self.project, self.up, self.down))
        return linears + 2 * tokens**2 * self.spec.channels  # products of queries and keys, and with the values

    def output_size(self, size: Size) -> Size:
        return size


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention within each sample of each branch (Vaswani et al. 2017, eq. 1).

    Args:
        qkv: Queries, keys and values, ``[branches, batch, T, 3 * channels]``.
        heads: Number of heads, among which the channels are divided.

    Returns:
        ``[branches, batch, T, channels]``.
    """
    # PyTorch's fused attention asks for adjacent channels, which NaiveExecutor's layout does not have.
    samples = qkv.flatten(0, 1).contiguous()
    samples = samples.unflatten(2, (3, heads, -1))  # [samples, T, 3, heads, channels // heads]
    query, key, value = samples.transpose(1, 3).unbind(2)
    y = F.scaled_dot_product_attention(query, key, value)
    return y.transpose(1, 2).flatten(2).unflatten(0, qkv.shape[:2])


class TokenLinear(BranchLinear):
    """A linear layer of each token, initialised as in timm's ``VisionTransformer``: a normal distribution of standard
    deviation 0.02, cut off; the bias is zero."""

    def reset_parameters(self) -> None:
        check_own_parameters(self.conv)
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)


class BranchScale(BranchParameters):
    """A factor for each channel of every branch.

    Args:
        branches, channels: As in :class:`BranchModule`.

    Attributes:
        weight: ``[branches * channels]``.
    """

    weight: nn.Parameter

    def __init__(self, branches: int, channels: int) -> None:
        super().__init__(branches, channels)

    def _initialise(self) -> None:
        nn.init.constant_(self.weight, 1e-5)


def scaled(executor: Executor, module: BranchScale | None, tokens: Tensor, branches: slice) -> Tensor:
    """Tokens ``[len(branches), batch, T, channels]`` times the factors of some branches, if there are factors.

    Raises:
        SkippedModuleError: The module was replaced by one of another kind, or has hooks.
    """
    if module is None:
        return tokens
    check_kind(module, BranchScale)
    parameters = executor.read(module, branches)
    return tokens * parameters[0][:, None, None] if parameters else tokens
