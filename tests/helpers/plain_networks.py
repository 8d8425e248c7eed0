"""Networks of ``torch.nn``, one module for each branch, as the reference for all convolutional layers.

The modules are named as the parameters of :mod:`hne.layers`, so that a slice of a model's state is the state of a
branch. What the layers compute is written here a second time, from their documentation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hne import (
    HNE,
    AveragePool,
    BasicBlock,
    Bottleneck,
    Conv,
    DenseBottleneck,
    MaxPool,
    Norm,
    PoolLinear,
    PreActivation,
)
from hne.layers import LayerSpec

# For the tree (1, 3, 6), and images of at least 13x13 pixels.
CASES: dict[str, list[list[LayerSpec]]] = {
    "basic": [[Conv(5), BasicBlock(5)], [BasicBlock(7, stride=2), BasicBlock(7)], [BasicBlock(7), BasicBlock(9)]],
    "basic, branch": [[Conv(5)], [BasicBlock(5, projection="branch")], [BasicBlock(5, 5, projection="branch")]],
    "basic, others": [
        [Conv(6, activation="silu")],
        [BasicBlock(6, activation="gelu", squeeze=2), BasicBlock(7, 1, activation="relu6")],
        [BasicBlock(5, 3, 3, activation="hardswish", squeeze=1), BasicBlock(5, activation="none", squeeze=3)],
    ],
    "dense bottleneck": [
        [Conv(5), DenseBottleneck(12, 3)],
        [DenseBottleneck(12, 5), DenseBottleneck(15, 4, stride=2)],
        [DenseBottleneck(15, 20, projection="branch"), DenseBottleneck(15, 7, kernel_size=5)],
    ],
    "dense bottleneck, others": [
        [Conv(8), DenseBottleneck(12, 6, groups=3)],
        [DenseBottleneck(12, 8, groups=2, stride=2, activation="silu"), DenseBottleneck(12, 4, groups=4, squeeze=5)],
        [DenseBottleneck(10, 9, groups=3, activation="hardswish", squeeze=2)],
    ],
    "pre-activation": [
        [Conv(5, activation="none", norm=False, bias=False), PreActivation(8), PreActivation(8)],
        [PreActivation(8), PreActivation(9, stride=2)],
        [PreActivation(11, kernel_size=5), PreActivation(11, activation="silu"), Norm()],
    ],
    "pre-activation, first": [[PreActivation(4)], [Norm(activation="gelu")], [PreActivation(4, 1, 2), Norm(4)]],
    "after a convolution": [[Conv(6)], [PreActivation(6)], [Conv(5, 1), Norm(activation="relu6"), Conv(5, 1)]],
    "pooling": [
        [Conv(5, 7, 2), MaxPool()],
        [AveragePool(kernel_size=2, stride=1), Conv(6)],
        [MaxPool(6, 2, 1, 0), AveragePool(padding=1), MaxPool(kernel_size=1, stride=1)],
    ],
    "convolutions": [
        [Conv(6, 4, padding=0), Conv(8, 2, activation="gelu")],
        [Conv(8, 3, 2, padding=2, groups=2), Conv(8, groups=8)],
        [Conv(9, 2, 2, norm=False, activation="silu"), Conv(6, 1, groups=3, activation="hardswish")],
    ],
    "groups that branch": [[Conv(6)], [Conv(9, groups=3)], [Conv(9, groups=9, stride=2, activation="silu")]],
    "bottlenecks": [
        [Conv(6), Bottleneck(6, 9, activation="silu")],
        [Bottleneck(8, 4, stride=2, activation="hardswish", final_activation="none")],
        [Bottleneck(8, 12, 5, final_activation="gelu", projection=False), PoolLinear(7, activation="silu")],
    ],
}
_FUNCTIONS: dict[str, nn.Module] = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
}


class _Unit(nn.Module):
    """``conv``, ``bn`` or both, and an activation."""

    def __init__(self, *, conv: nn.Conv2d | None = None, norm: int = 0, activation: str = "none") -> None:
        super().__init__()
        if conv is not None:
            self.conv = conv
        if norm:
            self.bn = nn.BatchNorm2d(norm)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return _FUNCTIONS[self.activation](x)


def _conv_bn(
    in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, activation: str = "none"
) -> _Unit:
    conv = nn.Conv2d(in_channels, channels, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False)
    return _Unit(conv=conv, norm=channels, activation=activation)


class _Squeeze(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = _Unit(conv=nn.Conv2d(channels, hidden, 1), activation="relu")
        self.expand = _Unit(conv=nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(self.reduce(F.adaptive_avg_pool2d(x, 1))))


class _Block(nn.Module):
    """``activation(squeeze(convolutions(x)) + shortcut(x))``; the convolutions are named as in the layer."""

    def __init__(
        self, convolutions: dict[str, _Unit], activation: str, shortcut: _Unit | str, squeeze: _Squeeze | None = None
    ) -> None:
        super().__init__()
        for name, unit in convolutions.items():
            self.add_module(name, unit)
        self.names, self.activation, self.identity = list(convolutions), activation, shortcut == "identity"
        self.shortcut = shortcut if isinstance(shortcut, _Unit) else None
        self.squeeze = squeeze

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in self.names:
            y = self.get_submodule(name)(y)
        y = y if self.squeeze is None else self.squeeze(y)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        elif self.identity:
            y = y + x
        return _FUNCTIONS[self.activation](y)


class _PreActivation(nn.Module):
    def __init__(self, spec: PreActivation, channels: int) -> None:
        super().__init__()
        k, out, stride = spec.kernel_size, spec.channels, spec.stride
        self.norm = _Unit(norm=channels, activation=spec.activation)
        self.first = _conv_bn(channels, out, k, stride, activation=spec.activation)
        self.second = _Unit(conv=nn.Conv2d(out, out, k, 1, k // 2, bias=False))
        projected = stride > 1 or out != channels
        self.shortcut = _Unit(conv=nn.Conv2d(channels, out, 1, stride, bias=False)) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return self.second(self.first(z)) + (x if self.shortcut is None else self.shortcut(z))


class _Named(nn.Module):
    """One module under a name."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self.children()
        return module(x)


def _plain_layer(spec: Any, channels: int, replicate: int) -> nn.Module:
    """One branch of a layer, in ``torch.nn``."""
    match spec:
        case MaxPool():
            padding = spec.kernel_size // 2 if spec.padding is None else spec.padding
            return nn.MaxPool2d(spec.kernel_size, spec.stride, padding)
        case AveragePool():
            return nn.AvgPool2d(spec.kernel_size, spec.stride, spec.padding or 0)
        case Norm():
            return _Named("norm", _Unit(norm=channels, activation=spec.activation))
        case PoolLinear():
            linear = _Unit(conv=nn.Conv2d(channels, spec.channels, 1), activation=spec.activation)
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), _Named("linear", linear))
        case PreActivation():
            return _PreActivation(spec, channels)
        case Conv():
            padding = spec.kernel_size // 2 if spec.padding is None else spec.padding
            options = {"groups": spec.groups, "bias": spec.bias and not spec.norm}
            conv = nn.Conv2d(channels, spec.channels, spec.kernel_size, spec.stride, padding, **options)
            return _Named("unit", _Unit(conv=conv, norm=spec.channels * spec.norm, activation=spec.activation))
    out, k, stride, activation = spec.channels, spec.kernel_size, spec.stride, spec.activation
    changes = stride > 1 or out != channels
    shortcut: _Unit | str = "identity"
    if isinstance(spec, Bottleneck):
        if changes or replicate > 1:
            shortcut = _conv_bn(channels, out, 1, stride) if spec.projection else "none" if changes else "identity"
        convolutions = {
            "expand": _conv_bn(channels, spec.middle, activation=activation),
            "depthwise": _conv_bn(spec.middle, spec.middle, k, stride, spec.middle, activation),
            "project": _conv_bn(spec.middle, out),
        }
        return _Block(convolutions, spec.final_activation, shortcut)
    if changes or (spec.projection == "branch" and replicate > 1):
        shortcut = _conv_bn(channels, out, 1, stride)
    squeeze = _Squeeze(out, spec.squeeze) if spec.squeeze else None
    if isinstance(spec, DenseBottleneck):
        convolutions = {
            "expand": _conv_bn(channels, spec.middle, activation=activation),
            "spatial": _conv_bn(spec.middle, spec.middle, k, stride, spec.groups, activation),
            "project": _conv_bn(spec.middle, out),
        }
    else:
        assert isinstance(spec, BasicBlock)
        convolutions = {"first": _conv_bn(channels, out, k, stride, 1, activation), "second": _conv_bn(out, out, k)}
    return _Block(convolutions, activation, shortcut, squeeze)


class PlainTree(nn.Module):
    """The networks of a model, with the model's weights. Module ``blocks.B.G.L`` is layer L of branch G of block B."""

    def __init__(self, model: HNE) -> None:
        super().__init__()
        self.hierarchy = model.hierarchy
        self.blocks = nn.ModuleList()
        channels = model.in_channels
        for block, branches, replicate in zip(
            model.layers_of_blocks(), self.hierarchy.branches, self.hierarchy.replication, strict=False
        ):
            copies = nn.ModuleList(nn.ModuleList() for _ in range(branches))
            for index, layer in enumerate(block):
                for copy in copies:
                    copy.append(_plain_layer(layer.spec, channels, replicate if index == 0 else 1))
                channels = layer.channels
            self.blocks.append(copies)
        self.heads = nn.ModuleList(
            _Unit(conv=nn.Conv2d(channels, model.num_classes, 1)) for _ in range(model.num_models)
        )
        self.double().load_state_dict(self.names_in(model, dict(model.state_dict())))
        self.train(model.training)

    def forward(self, x: Tensor, num_models: int | None = None) -> Tensor:
        """Logits of the first leaves; other branches are not computed."""
        *needed, leaves = self.hierarchy.needed(num_models or self.hierarchy.num_models)
        *replication, heads_per_branch = self.hierarchy.replication
        outputs = [x]
        for block, branches, replicate in zip(self.blocks, needed, replication, strict=True):
            inputs = [outputs[g // replicate] for g in range(branches)]
            outputs = [nn.Sequential(*copy)(y) for copy, y in zip(block, inputs, strict=False)]
        pooled = [y.mean((2, 3), keepdim=True) for y in outputs]
        return torch.stack([self.heads[n](pooled[n // heads_per_branch]).flatten(1) for n in range(leaves)])

    def names_in(self, model: HNE, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """Tensors of a model's parameters or buffers, by the names that their slices have here."""
        sliced: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if name.startswith("head."):
                prefix, rest, count = "heads.", name.removeprefix("head."), self.hierarchy.num_models
                names = [f"{prefix}{n}.{rest}" for n in range(count)]
            else:
                _, block, layer, rest = name.split(".", 3)
                rest = f"1.{rest}" if rest.startswith("linear.") else rest  # after the pooling
                count = self.hierarchy.branches[int(block)]
                names = [f"blocks.{block}.{g}.{layer}.{rest}" for g in range(count)]
            parts = [tensor] * count if tensor.dim() == 0 else tensor.view(count, -1, *tensor.shape[1:])
            sliced |= dict(zip(names, parts, strict=True))
        return sliced

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of all parameters; zero where a branch was not computed."""
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.named_parameters()}


def plain_gradients(plain: PlainTree, model: HNE) -> dict[str, Tensor]:
    """The gradients of a model by the names of :class:`PlainTree`."""
    return plain.names_in(model, {name: p.grad for name, p in model.named_parameters()})
