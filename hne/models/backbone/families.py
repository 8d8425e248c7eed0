"""Known families of networks: their units in the order of computation, and where stages may begin.

A family is recognised by the names of its attributes, so neither torchvision nor timm is imported. A network that only
looks like one of them is noticed later, because the stages are compared with its ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ...errors import BackboneError
from .functions import FirstToken, ImageTokens, TokenMean
from .units import Unit, expand, find, units_at


class Cut(NamedTuple):
    """A network in parts.

    Attributes:
        family: Its name, for messages.
        units: All units before the head, in the order of computation.
        head: The path of the last linear layer.
        starts: Indices of the units with which a stage begins, from 0 on; None if stages follow the resolution.
        resized: With ``starts`` None: number of leading units that are considered. A stage begins with each unit that
            lowers the resolution, or after it if the unit has no parameters.
    """

    family: str
    units: list[Unit]
    head: str
    starts: list[int] | None
    resized: int = 0


def recognise(net: nn.Module) -> Cut | None:
    """The parts of a network of a known family; None for another network."""
    for family in _FAMILIES:
        if (cut := family(net)) is not None:
            return cut
    return None


FAMILY_NAMES = (
    "ResNet and WideResNet, MobileNetV2, VGG and VisionTransformer of torchvision and timm, WideResNet of the CIFAR "
    "benchmarks, any nn.Sequential"
)


def in_order(net: nn.Module) -> Cut:
    """The parts of a network of no known family: its modules in the order of their definition, up to the last linear
    layer. The comparison with its ``forward`` decides whether that is the order of computation."""
    head = last_linear(net)
    units: list[Unit] = []
    outside = 0  # units before the module that contains the head
    for name, child in net.named_children():
        if name == head or head.startswith(f"{name}."):
            outside = len(units)
            units += _up_to(Unit(name, child), head)
            break
        units += expand(Unit(name, child))
    learnt = [index for index, unit in enumerate(units[:outside]) if any(True for _ in unit.module.parameters())]
    return Cut(type(net).__name__, units, head, None, learnt[-1] + 1 if learnt else 1)


def unknown_family(net: nn.Module, error: BackboneError) -> BackboneError:
    """The error for a network whose modules are not computed in the order of their definition."""
    children = ", ".join(name for name, _ in net.named_children()) or "none"
    return BackboneError(
        f"backbone: {type(net).__name__} is of no known family ({FAMILY_NAMES}). Its modules ({children}) in this "
        f"order do not serve: {error}. Name the modules of each block, stages=[['conv1', ...], ...]"
    )


def last_linear(net: nn.Module) -> str:
    """The path of the last linear layer of a network.

    Raises:
        BackboneError: It has none.
    """
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise BackboneError(f"head: expected a network that ends in an nn.Linear, {type(net).__name__} has none")
    return paths[-1]


def _resnet(net: nn.Module) -> Cut | None:
    """``conv1, bn1, act, maxpool | layer1 | layer2 | ...`` of torchvision and timm, also of other depths."""
    layers = [name for name in (f"layer{index}" for index in range(1, 10)) if _has(net, name)]
    head = _first(net, "fc", "linear", "classifier")
    if not _has(net, "conv1", "bn1") or not layers or head is None:
        return None
    written = [] if _has(net, "relu") or _has(net, "act1") else [Unit("(relu)", nn.ReLU())]
    stem = [*_stem(net, "conv1", "bn1", "relu", "act1"), *written, *_stem(net, "maxpool")]
    stages = [stem, *(units_at(net, name) for name in layers)]
    stages[-1] += _stem(net, "avgpool", "global_pool") + _dropout(net)
    return _by_stages("ResNet", stages, _linear_path(net, head))


def _wide_resnet(net: nn.Module) -> Cut | None:
    """``conv1 | block1 | block2 | block3, bn1, relu`` of the networks for CIFAR (Zagoruyko & Komodakis 2016)."""
    if not _has(net, "conv1", "block1", "block2", "block3", "bn1", "fc"):
        return None
    groups = []
    for name in ("block1", "block2", "block3"):
        block = find(net, name)
        groups.append(units_at(net, f"{name}.layer" if _has(block, "layer") else name))
    groups[-1] += _stem(net, "bn1", "relu")
    return _by_stages("WideResNet", [_stem(net, "conv1"), *groups], _linear_path(net, "fc"))


def _features(net: nn.Module) -> Cut | None:
    """``features``, pooling and ``classifier`` of torchvision: MobileNetV2, VGG and others."""
    if not _has(net, "features", "classifier"):
        return None
    head = _linear_path(net, "classifier")
    features = units_at(net, "features")
    if _has(net, "avgpool"):
        pool = units_at(net, "avgpool")
    else:
        pool = [Unit("(adaptive_avg_pool2d)", nn.AdaptiveAvgPool2d(1))]
    classifier = _before(units_at(net, "classifier"), head)
    flatten = [] if any(type(unit.module) is nn.Flatten for unit in classifier) else [_FLATTEN]
    units = [*features, *pool, *flatten, *classifier]
    return Cut(type(net).__name__, units, head, None, len(features))


def _timm_vgg(net: nn.Module) -> Cut | None:
    """``features, pre_logits, head`` of timm's VGG. The input has at least 224 pixels, as ``pre_logits`` has a kernel
    of the size of the last feature map."""
    if not _has(net, "features", "pre_logits", "head") or not _has(find(net, "head"), "global_pool", "fc"):
        return None
    features = units_at(net, "features")
    parts = [f"pre_logits.{name}" for name in ("fc1", "act1", "drop", "fc2", "act2")]
    if not all(_has(net, part) for part in parts):
        return None
    rest = [
        unit for part in (*parts, "head.global_pool", "head.drop") if _has(net, part) for unit in units_at(net, part)
    ]
    return Cut("VGG", features + rest, _linear_path(net, "head.fc"), None, len(features))


def _timm_mobilenet(net: nn.Module) -> Cut | None:
    """``conv_stem, bn1, blocks, conv_head, bn2, global_pool, classifier`` of timm's MobileNetV2 and EfficientNets."""
    if not _has(net, "conv_stem", "bn1", "blocks", "conv_head", "bn2", "global_pool", "classifier"):
        return None
    body = _stem(net, "conv_stem", "bn1", "act1") + units_at(net, "blocks") + _stem(net, "conv_head", "bn2", "act2")
    units = [*body, *_stem(net, "global_pool"), *_dropout(net)]
    return Cut(type(net).__name__, units, _linear_path(net, "classifier"), None, len(body))


def _vision_transformer(net: nn.Module) -> Cut | None:
    """VisionTransformer of torchvision; a stage may begin with each encoder layer."""
    if not _has(net, "conv_proj", "encoder.layers", "encoder.ln", "heads") or not hasattr(net, "class_token"):
        return None
    encoder: Any = find(net, "encoder")
    module: Any = net
    tokens = ImageTokens(module.conv_proj, module.class_token, None, encoder.pos_embedding)
    entry = [Unit("conv_proj, class_token, encoder.pos_embedding", tokens), *units_at(net, "encoder.dropout")]
    layers = units_at(net, "encoder.layers")
    # Each token is normalised by itself, so that the others need not be.
    exit_ = [Unit("(class token)", FirstToken()), *units_at(net, "encoder.ln")]
    head = _linear_path(net, "heads")
    return _by_layers("VisionTransformer", entry, layers, exit_ + _before(units_at(net, "heads"), head), head)


def _timm_vision_transformer(net: nn.Module) -> Cut | None:
    """VisionTransformer of timm; a stage may begin with each block."""
    if not _has(net, "patch_embed.proj", "blocks", "norm", "head") or not hasattr(net, "pos_embed"):
        return None
    module: Any = net
    class_token, registers = getattr(net, "cls_token", None), getattr(net, "reg_token", None)
    pool, first = getattr(net, "global_pool", "token"), getattr(net, "num_prefix_tokens", int(class_token is not None))
    if not isinstance(module.pos_embed, nn.Parameter) or getattr(net, "dynamic_img_size", False):
        raise BackboneError("backbone: expected a VisionTransformer with positions of a fixed image size")
    if type(getattr(module.patch_embed, "norm", nn.Identity())) is not nn.Identity:
        raise BackboneError("backbone: expected a VisionTransformer without a norm in patch_embed")
    if pool not in ("token", "avg") or (pool == "token" and class_token is None):
        raise BackboneError(
            f"backbone: expected a VisionTransformer with global_pool 'token' or 'avg', got {pool!r}"
            + ("" if class_token is not None else " without a class token")
        )
    tokens = ImageTokens(find(net, "patch_embed.proj"), class_token, registers, module.pos_embed)
    names = ["patch_embed.proj", *(n for n in ("cls_token", "reg_token") if getattr(net, n, None) is not None)]
    entry = [Unit(", ".join([*names, "pos_embed"]), tokens), *_stem(net, "pos_drop", "patch_drop", "norm_pre")]
    if pool == "token":  # each token is normalised by itself, so that the others need not be
        exit_ = [Unit("(class token)", FirstToken()), *_stem(net, "norm")]
    else:
        exit_ = [*_stem(net, "norm"), Unit("(mean of tokens)", TokenMean(first))]
    exit_ += _stem(net, "fc_norm", "head_drop")
    return _by_layers("VisionTransformer", entry, units_at(net, "blocks"), exit_, _linear_path(net, "head"))


def _sequential(net: nn.Module) -> Cut | None:
    """Any ``nn.Sequential``: a stage may begin with each module that has parameters and is no norm."""
    units = expand(Unit("", net))
    if len(units) == 1 and units[0].module is net:
        return None
    linear = [unit.path for unit in units if isinstance(unit.module, nn.Linear)]
    if not linear:
        raise BackboneError("backbone: expected an nn.Sequential that ends in an nn.Linear, the head; it has none")
    before = _before(units, linear[-1])
    starts = [index for index, unit in enumerate(before) if _begins(unit.module)]
    return Cut("nn.Sequential", before, linear[-1], [0, *starts[1:]])


_FAMILIES: tuple[Callable[[nn.Module], Cut | None], ...] = (
    _sequential,
    _resnet,
    _wide_resnet,
    _timm_mobilenet,
    _timm_vgg,
    _vision_transformer,
    _timm_vision_transformer,
    _features,
)

_FLATTEN = Unit("(flatten)", nn.Flatten(1))


def _has(net: nn.Module, *paths: str) -> bool:
    """Whether a network has submodules at all these paths."""
    modules = dict(net.named_modules(remove_duplicate=False))
    return all(path in modules for path in paths)


def _first(net: nn.Module, *paths: str) -> str | None:
    return next((path for path in paths if _has(net, path)), None)


def _stem(net: nn.Module, *paths: str) -> list[Unit]:
    """The units at those of the paths that the network has."""
    return [unit for path in paths if _has(net, path) for unit in units_at(net, path)]


def _dropout(net: nn.Module) -> list[Unit]:
    """The dropout before the head, which timm writes as a function."""
    rate = getattr(net, "drop_rate", 0.0)
    return [Unit("(drop_rate)", nn.Dropout(rate))] if isinstance(rate, float) and rate > 0 else []


def _linear_path(net: nn.Module, path: str) -> str:
    """The path of the last linear layer at or below a path."""
    module = find(net, path)
    if isinstance(module, nn.Linear):
        return path
    try:
        return f"{path}.{last_linear(module)}"
    except BackboneError:
        raise BackboneError(f"head: expected an nn.Linear at or below {path}, got {type(module).__name__}") from None


def _before(units: list[Unit], head: str) -> list[Unit]:
    """The units before the head.

    Raises:
        BackboneError: The head is a part of a unit, or a module that computes something follows it.
    """
    paths = [unit.path for unit in units]
    if head not in paths:
        raise BackboneError(
            f"head: {head} is a part of another module; name it by head= and the modules before by stages="
        )
    index = paths.index(head)
    for unit in units[index + 1 :]:
        if type(unit.module) is not nn.Identity:
            raise BackboneError(
                f"head: {unit} follows the last linear layer {head}: take it off, so that logits come out"
            )
    return units[:index]


def _up_to(unit: Unit, head: str) -> list[Unit]:
    """The units of a module before the head, which it is or contains."""
    if unit.path == head:
        return []
    units: list[Unit] = []
    for name, child in unit.module.named_children():
        path = f"{unit.path}.{name}"
        if path == head or head.startswith(f"{path}."):
            return units + _up_to(Unit(path, child), head)
        units += expand(Unit(path, child))
    return units


def _begins(module: nn.Module) -> bool:
    """Whether a module has parameters and is no norm."""
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
    return not isinstance(module, norms) and any(True for _ in module.parameters())


def _by_stages(family: str, stages: list[list[Unit]], head: str) -> Cut:
    starts = [sum(map(len, stages[:index])) for index in range(len(stages))]
    return Cut(family, [unit for stage in stages for unit in stage], head, starts)


def _by_layers(family: str, entry: list[Unit], layers: list[Unit], exit_: list[Unit], head: str) -> Cut:
    starts = [0, *range(len(entry) + 1, len(entry) + len(layers))]
    return Cut(family, [*entry, *layers, *exit_], head, starts)
