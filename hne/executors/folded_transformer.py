"""The kernel path of encoder blocks: their linear layers with folded weights."""

from __future__ import annotations

import torch
from torch import Tensor

import hne_kernels as K

from ..layers import (
    BranchLayerNorm,
    BranchLinear,
    BranchModule,
    BranchScale,
    TransformerBlockLayer,
    check_kind,
)
from .folded_step import Folded, FoldedConv, FoldedParameters, FoldedStep
from .folding import kernel_path


@kernel_path(TransformerBlockLayer)
def _transformer_block(layer: TransformerBlockLayer) -> FoldedStep:
    folded: dict[BranchModule, Folded] = {}
    for module, weights in fold_transformer_block(layer).items():
        if isinstance(module, BranchLinear):
            weight, bias = weights
            folded[module] = FoldedConv(K.pack_weight(weight), bias, module.stride, module.padding)
        else:
            folded[module] = FoldedParameters(weights)
    return FoldedStep(layer, folded)


def fold_transformer_block(layer: TransformerBlockLayer) -> dict[BranchModule, tuple[Tensor, ...]]:
    """The weights of each module, with all branches. The linear layers contain scale and shift of the layer norms
    before them, and the layer scales after them; these have no weights of their own then."""
    folded: dict[BranchModule, tuple[Tensor, ...]] = {
        layer.qkv: _fold_linear(layer.qkv, norm=layer.norm1),
        layer.project: _fold_linear(layer.project, scale=layer.scale1),
        layer.up: _fold_linear(layer.up, norm=layer.norm2),
        layer.down: _fold_linear(layer.down, scale=layer.scale2),
    }
    contained = (layer.norm1, layer.scale1, layer.norm2, layer.scale2)
    return folded | {module: () for module in contained if module is not None}


def _fold_linear(
    linear: BranchLinear, norm: BranchLayerNorm | None = None, scale: BranchScale | None = None
) -> tuple[Tensor, Tensor]:
    """A linear layer with all branches: ``scale * (weight @ (norm.weight * x + norm.bias) + bias)``."""
    check_kind(linear, BranchLinear)
    everything = slice(0, linear.branches)
    weight, bias = linear.weight_and_bias(everything)
    assert bias is not None
    dtype, wide = weight.dtype, torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(wide), bias.to(wide)
    if norm is not None:
        check_kind(norm, BranchLayerNorm)
        norm_weight, norm_bias = norm.read(everything)
        bias = bias + (weight[..., 0, 0] * norm_bias[:, None]).sum(2)  # a matrix product would be autocast
        weight = weight * norm_weight[:, None, :, None, None]
    if scale is not None:
        check_kind(scale, BranchScale)
        (factors,) = scale.read(everything)
        weight, bias = weight * factors[..., None, None, None], bias * factors
    return weight.to(dtype), bias.to(dtype)
