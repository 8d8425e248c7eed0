"""Layer norm, over the channels of each pixel or token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .branch_parameters import BranchParameters
from .executor import Executor, Features
from .layer import Layer, check_same_channels
from .parameters import Size
from .spec import LayerSpec, check_positive
from .submodules import check_kind
from .tokens import from_tokens, to_tokens


@dataclass(frozen=True)
class LayerNorm(LayerSpec):
    """Layer norm over the channels of each pixel or token (Ba et al. 2016), with scale and shift.

    Args:
        channels: Channels of the input; by default those of the layer before.
        eps: As in ``nn.LayerNorm``.
    """

    channels: int | None = None  # type: ignore[assignment]
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("LayerNorm.eps", self.eps)

    def __str__(self) -> str:
        return "layer norm"


class LayerNormLayer(Layer, spec=LayerNorm):
    """Implements :class:`LayerNorm`."""

    spec: LayerNorm

    def __init__(self, spec: LayerNorm, in_channels: int, branches: int, replicate: int) -> None:
        super().__init__(spec, in_channels, branches, replicate)
        check_same_channels(spec, in_channels)
        self.norm = BranchLayerNorm(branches, in_channels, spec.eps)

    def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
        maps = executor.to_maps(executor.replicate(x, branches, replicate, self.channels), self.channels)
        tokens = layer_norm(executor, self.norm, to_tokens(maps), branches)
        return executor.from_maps(from_tokens(tokens, maps.shape[3:]))

    def macs(self, size: Size) -> int:
        return 0

    def output_size(self, size: Size) -> Size:
        return size


class BranchLayerNorm(BranchParameters):
    """Scale and shift of a layer norm.

    Args:
        branches, channels: As in :class:`BranchModule`.
        eps: As in ``nn.LayerNorm``.

    Attributes:
        weight, bias: Scale and shift, ``[branches * channels]``.
    """

    names = ("weight", "bias")
    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, branches: int, channels: int, eps: float = 1e-6) -> None:
        super().__init__(branches, channels)
        self.eps = eps

    def _initialise(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


def layer_norm(executor: Executor, module: BranchLayerNorm, tokens: Tensor, branches: slice) -> Tensor:
    """The layer norm of tokens ``[len(branches), batch, T, channels]``.

    Raises:
        SkippedModuleError: The module was replaced by one of another kind, or has hooks.
    """
    check_kind(module, BranchLayerNorm)
    shape, parameters = (module.channels,), executor.read(module, branches)
    if not parameters:
        return F.layer_norm(tokens, shape, eps=module.eps)
    weight, bias = parameters
    if len(tokens) == 1:
        return F.layer_norm(tokens, shape, weight[0], bias[0], module.eps)
    # PyTorch's kernel scales and shifts while it normalises, but has one scale for all: it is called for each branch.
    parts = zip(tokens.unbind(), weight.unbind(), bias.unbind(), strict=True)
    return torch.stack([F.layer_norm(part, shape, scale, shift, module.eps) for part, scale, shift in parts])
