"""Small vision transformers for the tests, and the same networks in plain PyTorch, one for each leaf."""

from __future__ import annotations

from typing import TypeVar

import torch
from networks import IN_CHANNELS, NUM_CLASSES
from torch import Tensor, nn
from torch.func import functional_call

from hne import HNE, Conv, Hierarchy, LayerNorm, PatchEmbedding, SelectToken, TransformerBlock
from hne.layers import (
    ACTIVATIONS,
    BranchEmbedding,
    BranchLayerNorm,
    BranchScale,
    Layer,
    LayerSpec,
)

Model = TypeVar("Model", bound=HNE)

SIZE = 9, 9  # height and width of the images
TRANSFORMERS: dict[str, list[list[LayerSpec]]] = {
    "class token": [
        [PatchEmbedding(12, patch_size=3, image_size=9), TransformerBlock(12, 3, 20)],
        [TransformerBlock(12, 2, 17, activation="relu6", layer_scale=True, eps=1e-3)],
        [TransformerBlock(12, 4, 9, layer_scale=True), SelectToken(), LayerNorm()],
    ],
    "mean of tokens": [
        [Conv(4, norm=False), PatchEmbedding(7, patch_size=1, image_size=9, class_token=False)],
        [LayerNorm(7, eps=1e-2), TransformerBlock(7, 1, 5, activation="silu")],
        [LayerNorm()],
    ],
    "one token": [
        [PatchEmbedding(10, patch_size=9, image_size=9)],
        [SelectToken(index=1), TransformerBlock(10, 5, 11)],
        [SelectToken(), LayerNorm(10)],
    ],
}


def build(
    kind: type[Model], name: str, tree: Hierarchy, rng: torch.Generator, dtype: torch.dtype = torch.float64
) -> Model:
    """A network in eval mode whose parameters are all random (new scales and shifts are ones and zeros)."""
    torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
    model = kind(tree, TRANSFORMERS[name], num_classes=NUM_CLASSES, in_channels=IN_CHANNELS)
    for module in model.modules():
        if isinstance(module, BranchLayerNorm | BranchScale):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        for suffix, parameter in module.named_parameters(recurse=False):
            if suffix == "bias":
                nn.init.normal_(parameter, std=0.3)
            elif isinstance(module, nn.Conv2d):
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            elif isinstance(module, BranchEmbedding):
                nn.init.normal_(parameter)
    return model.to(dtype).eval()


def plain_logits(model: HNE, x: Tensor) -> Tensor:
    """The logits ``[N, B, classes]`` from ``nn.MultiheadAttention``, ``nn.LayerNorm`` and so on, leaf by leaf.

    The parameters are slices of the model's, so that these get the gradients.
    """
    logits = []
    for leaf in range(model.num_models):
        features = x
        for block, layers in enumerate(model.layers_of_blocks()):
            for layer in layers:
                features = _plain_layer(layer, model.hierarchy.ancestor(leaf, block), features)
        pooled = features.mean(1)
        logits.append(pooled @ _part(model.head.conv.weight, model.num_models, leaf)[..., 0, 0].T)
        logits[-1] = logits[-1] + _part(model.head.conv.bias, model.num_models, leaf)
    return torch.stack(logits)


class _Patches(nn.Module):
    """The input of the encoder of torchvision's ``VisionTransformer``."""

    def __init__(self, spec: PatchEmbedding, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, spec.channels, spec.patch_size, spec.patch_size)
        tokens = (spec.image_size // spec.patch_size) ** 2
        self.class_token = nn.Parameter(torch.empty(1, 1, spec.channels)) if spec.class_token else None
        self.position = nn.Parameter(torch.empty(1, tokens + spec.class_token, spec.channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.repeat(len(x), 1, 1), tokens], 1)
        return tokens + self.position


class _Encoder(nn.Module):
    """``EncoderBlock`` of torchvision without dropout, with the layer scale of timm's ``Block``."""

    def __init__(self, spec: TransformerBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(spec.channels, spec.eps) for _ in range(2))
        self.attention = nn.MultiheadAttention(spec.channels, spec.heads, batch_first=True)
        self.up, self.down = nn.Linear(spec.channels, spec.hidden), nn.Linear(spec.hidden, spec.channels)
        self.activation = ACTIVATIONS[spec.activation]
        self.scale1, self.scale2 = (nn.Parameter(torch.ones(spec.channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + self.scale1 * y
        return x + self.scale2 * self.down(self.activation(self.up(self.norm2(x))))


def _plain_layer(layer: Layer, branch: int, x: Tensor) -> Tensor:
    """One branch of a layer; images ``[B, C, H, W]`` or tokens ``[B, T, C]``."""
    spec = layer.spec
    own = {name: _part(parameter, _branches(layer), branch) for name, parameter in layer.named_parameters()}
    if isinstance(spec, SelectToken):
        return x[:, spec.index : spec.index + 1]
    if isinstance(spec, Conv):
        conv = nn.Conv2d(x.shape[1], spec.channels, spec.kernel_size, spec.stride, spec.kernel_size // 2)
        return functional_call(conv, {"weight": own["unit.conv.weight"], "bias": own["unit.conv.bias"]}, x).relu()
    if isinstance(spec, LayerNorm):
        norm = nn.LayerNorm(x.shape[-1], spec.eps)
        return functional_call(norm, {"weight": own["norm.weight"], "bias": own["norm.bias"]}, x)
    if isinstance(spec, PatchEmbedding):
        values = {"conv.weight": own["conv.conv.weight"], "conv.bias": own["conv.conv.bias"]}
        values |= {name: own[f"{name}.weight"] for name in ("class_token", "position") if f"{name}.weight" in own}
        return functional_call(_Patches(spec, x.shape[1]), values, x)
    assert isinstance(spec, TransformerBlock)
    values = {name: value for name, value in own.items() if name.startswith("norm")}
    values |= {name: own[f"{name}.weight"] for name in ("scale1", "scale2") if spec.layer_scale}
    for ours, theirs in (
        ("qkv", "attention.in_proj_"),
        ("project", "attention.out_proj."),
        ("up", "up."),
        ("down", "down."),
    ):
        values |= {f"{theirs}weight": own[f"{ours}.conv.weight"][..., 0, 0], f"{theirs}bias": own[f"{ours}.conv.bias"]}
    return functional_call(_Encoder(spec).to(x.dtype), values, x)


def _branches(layer: Layer) -> int:
    """The number of branches of a layer."""
    return next((module.branches for module in layer.modules() if hasattr(module, "branches")), 1)


def _part(parameter: Tensor, branches: int, branch: int) -> Tensor:
    return parameter.chunk(branches)[branch]
