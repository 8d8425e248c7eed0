"""Residual and encoder blocks as layer specs, with their weights.

A block is recognised by its class name and its attributes. Every function here returns the spec and the tensors of one
branch, or raises :class:`Unconvertible` with the reason; the caller then takes the module as it is. A block that only
looks alike is noticed by its numbers (:func:`hne.models.backbone.verify.computes_the_same`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ...layers import (
    BasicBlock,
    Bottleneck,
    DenseBottleneck,
    LayerSpec,
    PatchEmbedding,
    PreActivation,
    TransformerBlock,
)
from .functions import ImageTokens
from .primitives import (
    Unconvertible,
    activation_name,
    batch_norm_tensors,
    conv_settings,
    conv_tensors,
    is_nothing,
    layer_norm_tensors,
    linear_tensors,
    norm_with_activation,
    plain,
    require,
    unit_tensors,
)

Tensors = dict[str, Tensor]
Converter = Callable[[Any, tuple[int, ...]], tuple[LayerSpec, Tensors]]


def two_convolutions(module: Any, shape: tuple[int, ...]) -> tuple[LayerSpec, Tensors]:
    """``BasicBlock``, of a ResNet or of the WideResNet for CIFAR, whose first module is a norm."""
    return (pre_activation if next(iter(module._modules), "") == "bn1" else basic_block)(module, shape)


def basic_block(module: Any, shape: tuple[int, ...]) -> tuple[LayerSpec, Tensors]:
    """``BasicBlock`` of ResNet."""
    parts = children(module, "conv1", "bn1", "conv2", "bn2", optional=(*_RESIDUAL, "se"))
    first, bn1, act1 = conv_norm(parts["conv1"], parts["bn1"])
    second, bn2, _ = conv_norm(parts["conv2"], parts["bn2"])
    activation = block_activation(parts, act1)
    size, stride, padding, groups = conv_settings(first)
    require(size % 2 == 1 and padding == size // 2 and groups == 1, "a first convolution of another kind")
    require(conv_settings(second) == (size, 1, padding, 1), "a second convolution of another kind")
    tensors = unit_tensors("first", first, bn1) | unit_tensors("second", second, bn2)
    tensors |= shortcut(parts, first.in_channels, second.out_channels, stride)
    squeeze, more = squeeze_excitation(parts)
    return BasicBlock(second.out_channels, size, stride, activation, squeeze=squeeze), tensors | more


def bottleneck(module: Any, shape: tuple[int, ...]) -> tuple[LayerSpec, Tensors]:
    """``Bottleneck`` of ResNet, WideResNet and ResNeXt."""
    parts = children(module, "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", optional=(*_RESIDUAL, "act3", "se"))
    expand, bn1, act1 = conv_norm(parts["conv1"], parts["bn1"])
    spatial, bn2, act2 = conv_norm(parts["conv2"], parts["bn2"])
    project, bn3, _ = conv_norm(parts["conv3"], parts["bn3"])
    activation = block_activation(parts, act1, act2)
    size, stride, padding, groups = conv_settings(spatial)
    for conv in (expand, project):
        require(conv_settings(conv) == (1, 1, 0, 1), "a 1x1 convolution with stride or groups")
    require(size % 2 == 1 and padding == size // 2, f"a {size}x{size} convolution with padding {padding}")
    require(expand.out_channels == spatial.out_channels, "a spatial convolution that changes the channels")
    tensors = unit_tensors("expand", expand, bn1) | unit_tensors("spatial", spatial, bn2)
    tensors |= unit_tensors("project", project, bn3)
    tensors |= shortcut(parts, expand.in_channels, project.out_channels, stride)
    squeeze, more = squeeze_excitation(parts)
    spec = DenseBottleneck(
        project.out_channels, expand.out_channels, size, stride, groups=groups, activation=activation, squeeze=squeeze
    )
    return spec, tensors | more


def pre_activation(module: Any, shape: tuple[int, ...]) -> tuple[LayerSpec, Tensors]:
    """``BasicBlock`` of the WideResNet for CIFAR: norm and activation before each convolution."""
    names = ("relu1", "relu2", "convShortcut", "shortcut", "dropout")
    parts = children(module, "bn1", "conv1", "bn2", "conv2", optional=names)
    rate = getattr(module, "droprate", getattr(module, "drop_rate", 0.0))
    require(not rate, f"dropout {rate}")
    first, second = parts["conv1"], parts["conv2"]
    size, stride, padding, groups = conv_settings(first)
    require(size % 2 == 1 and padding == size // 2 and groups == 1, "a first convolution of another kind")
    require(conv_settings(second) == (size, 1, padding, 1), "a second convolution of another kind")
    require(second.bias is None, "a second convolution with bias")
    bn1, before = norm_with_activation(parts["bn1"])
    require(before == "none", "an activation within a norm")
    tensors = batch_norm_tensors("norm.bn", bn1)
    tensors |= unit_tensors("first", first, _bare_norm(parts["bn2"])) | {"second.conv.weight": second.weight}
    other = parts.get("convShortcut") or parts.get("shortcut")
    if isinstance(other, nn.Sequential) and len(other) == 1:
        other = other[0]
    if other is not None:
        require(conv_settings(other) == (1, stride, 0, 1) and other.bias is None, "a shortcut of another kind")
        tensors["shortcut.conv.weight"] = other.weight
    require(
        (other is not None) == (stride > 1 or first.in_channels != second.out_channels),
        "a shortcut that does not follow from the shape",
    )
    activation = activation_name(parts["relu1"]) if "relu1" in parts else "relu"
    return PreActivation(second.out_channels, size, stride, activation=activation or "relu"), tensors


def inverted_residual(module: Any, shape: tuple[int, ...]) -> tuple[LayerSpec, Tensors]:
    """``InvertedResidual`` of MobileNetV2, of torchvision (a Sequential ``conv``) and timm."""
    if "conv_pw" in module._modules:
        parts = children(module, "conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3", optional=("act1", "act2"))
        steps = [parts["conv_pw"], parts["bn1"], parts.get("act1"), parts["conv_dw"], parts["bn2"], parts.get("act2")]
        steps += [parts["conv_pwl"], parts["bn3"]]
        residual = bool(getattr(module, "has_skip", getattr(module, "has_residual", False)))
    else:
        steps = sequence(children(module, "conv")["conv"])
        residual = bool(getattr(module, "use_res_connect", False))
    steps = [step for step in steps if step is not None]
    (expand, bn1, first), (depthwise, bn2, second), (project, bn3, last) = conv_norm_runs(steps, 3)
    size, stride, padding, groups = conv_settings(depthwise)
    for conv in (expand, project):
        require(conv_settings(conv) == (1, 1, 0, 1), "a 1x1 convolution with stride or groups")
    require(size % 2 == 1 and padding == size // 2, f"a {size}x{size} convolution with padding {padding}")
    require(groups == depthwise.in_channels == depthwise.out_channels, "a convolution that is not depthwise")
    require(first == second and last == "none", f"activations {first}, {second}, {last}")
    require(
        residual == (stride == 1 and expand.in_channels == project.out_channels),
        "a shortcut that does not follow from the shape",
    )
    spec = Bottleneck(
        project.out_channels,
        middle=expand.out_channels,
        kernel_size=size,
        stride=stride,
        activation=first,
        final_activation="none",
        projection=False,
    )
    tensors = unit_tensors("expand", expand, bn1) | unit_tensors("depthwise", depthwise, bn2)
    return spec, tensors | unit_tensors("project", project, bn3)


def image_tokens(module: ImageTokens, shape: tuple[int, ...]) -> tuple[LayerSpec, Tensors]:
    """The first operations of a vision transformer."""
    conv: Any = module.conv
    require(plain(conv, nn.Conv2d), "a convolution of another kind")
    size, stride, padding, groups = conv_settings(conv)
    require(size == stride and padding == 0 and groups == 1, "patches that overlap or have padding")
    require(conv.bias is not None, "patches without bias")
    require(shape[2] == shape[3] and shape[2] % size == 0, f"images of {shape[2]}x{shape[3]} pixels")
    require(module.registers is None, "registers")
    prefix = int(module.class_token is not None)
    require(module.position.shape[1] == (shape[2] // size) ** 2 + prefix, "no position of the class token")
    spec = PatchEmbedding(conv.out_channels, size, shape[2], class_token=module.class_token is not None)
    tensors = conv_tensors("conv", conv) | {"position.weight": module.position}
    return spec, tensors | ({} if module.class_token is None else {"class_token.weight": module.class_token})


def encoder_block(module: Any, shape: tuple[int, ...]) -> tuple[LayerSpec, Tensors]:
    """``EncoderBlock`` of torchvision."""
    parts = children(module, "ln_1", "self_attention", "ln_2", "mlp")
    attention: Any = parts["self_attention"]
    require(plain(attention, nn.MultiheadAttention), "attention of another kind")
    require(attention.dropout == 0, f"dropout {attention.dropout}")
    usual = attention._qkv_same_embed_dim and attention.in_proj_bias is not None
    require(usual and attention.bias_k is None and not attention.add_zero_attn, "attention of another kind")
    up, activation, down = _mlp(sequence(parts["mlp"]))
    tensors = {"qkv.conv.weight": attention.in_proj_weight, "qkv.conv.bias": attention.in_proj_bias}
    tensors |= linear_tensors("project", attention.out_proj)
    return _encoder(parts["ln_1"], parts["ln_2"], attention.num_heads, up, activation, down, tensors)


def timm_block(module: Any, shape: tuple[int, ...]) -> tuple[LayerSpec, Tensors]:
    """``Block`` of timm's VisionTransformer."""
    parts = children(module, "norm1", "attn", "norm2", "mlp", optional=("ls1", "ls2"))
    inner = children(parts["attn"], "qkv", "proj")
    mlp = children(parts["mlp"], "fc1", "act", "fc2")
    heads = getattr(parts["attn"], "num_heads", 0)
    require(isinstance(heads, int) and heads > 0, "attention of another kind")
    require(plain(inner["qkv"], nn.Linear) and inner["qkv"].bias is not None, "queries, keys and values without bias")
    up, activation, down = _mlp([mlp["fc1"], mlp["act"], mlp["fc2"]])
    tensors = linear_tensors("qkv", inner["qkv"]) | linear_tensors("project", inner["proj"])
    scales: list[Any] = [parts.get("ls1"), parts.get("ls2")]
    require((scales[0] is None) == (scales[1] is None), "one layer scale of two")
    if scales[0] is not None:
        for index, scale in enumerate(scales, 1):
            require(isinstance(getattr(scale, "gamma", None), nn.Parameter), "a layer scale of another kind")
            tensors[f"scale{index}.weight"] = scale.gamma
    return _encoder(parts["norm1"], parts["norm2"], heads, up, activation, down, tensors)


CONVERTERS: Mapping[str, Converter] = {
    "BasicBlock": two_convolutions,
    "PreActBlock": pre_activation,
    "Bottleneck": bottleneck,
    "InvertedResidual": inverted_residual,
    "ImageTokens": image_tokens,
    "EncoderBlock": encoder_block,
    "Block": timm_block,
}

_RESIDUAL = ("relu", "act1", "act2", "downsample", "shortcut")


def children(module: nn.Module, *required: str, optional: Iterable[str] = ()) -> dict[str, Any]:
    """The children of a block by name, without those that compute nothing.

    Raises:
        Unconvertible: One is missing, or there is one that the caller does not know.
    """
    found = {name: child for name, child in module._modules.items() if child is not None}
    if missing := [name for name in required if name not in found]:
        raise Unconvertible(f"no {missing[0]}")
    found = {name: child for name, child in found.items() if name in required or not is_nothing(child)}
    for name, child in found.items():
        if name not in (*required, *optional):
            raise Unconvertible(f"has {name} ({describe(child)})")
    return found


def describe(module: nn.Module) -> str:
    """A module in a few words, for reasons."""
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return type(module).__name__ + (f" {rate:g}" if isinstance(rate, float) else "")


def sequence(module: nn.Module) -> list[Any]:
    """The modules of a Sequential at any depth, without those that compute nothing."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return [step for child in module for step in sequence(child)]
    return [] if is_nothing(module) else [module]


def conv_norm(conv: Any, norm: Any) -> tuple[Any, Any, str]:
    """A convolution, the batch norm that follows, and the activation within the norm."""
    require(plain(conv, nn.Conv2d), f"{type(conv).__name__} in place of a convolution")
    return conv, *norm_with_activation(norm)


def conv_norm_runs(steps: list[Any], count: int) -> list[tuple[Any, Any, str]]:
    """``count`` runs of convolution, batch norm and activation."""
    runs: list[tuple[Any, Any, str]] = []
    while steps:
        require(len(steps) > 1, "a convolution without norm")
        conv, norm, activation = conv_norm(steps[0], steps[1])
        steps = steps[2:]
        if steps and (name := activation_name(steps[0])) is not None:
            require(activation == "none", "two activations")
            activation, steps = name, steps[1:]
        runs.append((conv, norm, activation))
    require(len(runs) == count, f"{len(runs)} convolutions, expected {count}")
    return runs


def block_activation(parts: Mapping[str, Any], *within: str) -> str:
    """The activation of a block; ReLU if it is written as a function, as the numbers will tell."""
    modules = [parts[name] for name in ("relu", "act1", "act2", "act3") if name in parts]
    names = {activation_name(module) for module in modules} | {name for name in within if name != "none"}
    require(len(names) <= 1 and None not in names, "activations that differ, or an unknown one")
    return names.pop() or "relu" if names else "relu"


def shortcut(parts: Mapping[str, Any], in_channels: int, channels: int, stride: int) -> Tensors:
    """The tensors of the shortcut: a 1x1 convolution with norm exactly where size or channels change."""
    steps = (
        sequence(parts["downsample" if "downsample" in parts else "shortcut"])
        if ("downsample" in parts or "shortcut" in parts)
        else []
    )
    needed = stride > 1 or in_channels != channels
    require(bool(steps) == needed, "a shortcut that does not follow from the shape")
    if not steps:
        return {}
    require(len(steps) == 2, "a shortcut of another kind")
    conv, norm, activation = conv_norm(steps[0], steps[1])
    require(conv_settings(conv) == (1, stride, 0, 1) and activation == "none", "a shortcut of another kind")
    return unit_tensors("shortcut", conv, norm)


def squeeze_excitation(parts: Mapping[str, Any]) -> tuple[int, Tensors]:
    """Hidden channels and tensors of squeeze-and-excitation (``fc1, act, fc2, gate`` of timm); 0 for none."""
    module = parts.get("se")
    if module is None:
        return 0, {}
    inner = children(module, "fc1", "fc2", optional=("act", "gate"))
    require(activation_name(inner.get("act", nn.ReLU())) == "relu", "squeeze-and-excitation with another activation")
    gate = type(inner["gate"]).__name__ if "gate" in inner else "Sigmoid"  # timm has a class of its own
    require(gate == "Sigmoid", f"squeeze-and-excitation with the gate {gate}")
    for name in ("fc1", "fc2"):
        require(plain(inner[name], nn.Conv2d) and inner[name].bias is not None, "squeeze-and-excitation without bias")
    tensors = conv_tensors("squeeze.reduce", inner["fc1"]) | conv_tensors("squeeze.expand", inner["fc2"])
    return inner["fc1"].out_channels, tensors


def _bare_norm(module: Any) -> Any:
    bn, activation = norm_with_activation(module)
    require(activation == "none", "an activation within a norm")
    return bn


def _mlp(steps: list[Any]) -> tuple[Any, str, Any]:
    require(len(steps) == 3 and plain(steps[0], nn.Linear) and plain(steps[2], nn.Linear), "an MLP of another kind")
    activation = activation_name(steps[1])
    require(activation is not None, f"the activation {type(steps[1]).__name__}")
    return steps[0], activation or "none", steps[2]


def _encoder(
    norm1: Any, norm2: Any, heads: int, up: Any, activation: str, down: Any, tensors: Tensors
) -> tuple[LayerSpec, Tensors]:
    for norm in (norm1, norm2):
        require(isinstance(norm, nn.LayerNorm), f"{type(norm).__name__} in place of a layer norm")
        require(norm.weight is not None and norm.bias is not None, "a layer norm without scale or shift")
    require(norm1.eps == norm2.eps, "norms of different eps")
    tensors = tensors | layer_norm_tensors("norm1", norm1) | layer_norm_tensors("norm2", norm2)
    tensors |= linear_tensors("up", up) | linear_tensors("down", down)
    layer_scale = "scale1.weight" in tensors
    spec = TransformerBlock(
        up.in_features, heads, up.out_features, activation=activation, layer_scale=layer_scale, eps=norm1.eps
    )
    return spec, tensors
