"""Converts the units of a block to layer specs with their weights; a unit that is no known layer becomes a Module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...layers import AveragePool, Conv, LayerNorm, LayerSpec, MaxPool, Module, Norm, PoolLinear, SelectToken
from .blocks import CONVERTERS
from .cut import Shape, TracedUnit, copied
from .functions import FirstToken, ImageTokens, KeepInput, TokenMean
from .primitives import (
    Tensors,
    Unconvertible,
    activation_name,
    batch_norm_tensors,
    conv_settings,
    conv_tensors,
    detached,
    is_nothing,
    layer_norm_tensors,
    norm_with_activation,
    plain,
    require,
    unit_tensors,
)
from .verify import computes_the_same

Rest = Sequence[TracedUnit]  # the units of a block that are not converted yet


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer of a block, and the units that it computes.

    Attributes:
        units: The units, one after the other.
        spec: The layer; None if there is nothing to compute.
        tensors: The state of one branch by its names in the layer's ``state_dict``; empty for a Module.
        note: Why the units became a Module, or what differs in the stored parameters.
    """

    units: Rest
    spec: LayerSpec | None
    tensors: Tensors = field(default_factory=dict)
    note: str = ""


def convert_block(units: Rest, *, last: bool) -> list[ConvertedLayer]:
    """The layers of a block. ``last``: the head follows, which pools all pixels."""
    layers: list[ConvertedLayer] = []
    while units:
        layer = _next_layer(units, last)
        units = units[len(layer.units) :]
        if layers and isinstance(layers[-1].spec, Module) and _has_no_parameters(layer.spec):  # one call for both
            before = layers.pop()
            layer = as_module([*before.units, *layer.units], before.note)
        layers.append(layer)
    return layers


def _next_layer(rest: Rest, last: bool) -> ConvertedLayer:
    """The layer that computes the first unit, or the first ones."""
    reason = ""
    for rule in _RULES:
        try:
            if (layer := rule(rest, last)) is not None:
                return layer
        except Unconvertible as error:
            reason = reason or str(error)
    return as_module(rest[:1], reason or "no such layer")


def _has_no_parameters(spec: LayerSpec | None) -> bool:
    return isinstance(spec, Module) and not any(True for _ in spec.template.parameters())


def as_module(units: Rest, note: str = "") -> ConvertedLayer:
    """Units as they are, in plain PyTorch, copied for each branch."""
    parts = []
    for step in units:
        part = copied(step.unit.module)
        if getattr(part, "inplace", False):  # dropout and activations
            part.inplace = False  # type: ignore[assignment]
        elif step.writes_input:
            part = KeepInput(part)
        parts.append(part)
    template = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    shape = units[0].input
    if len(shape) == 2:  # a layer passes a vector as a feature map of one pixel
        template = nn.Sequential(nn.Flatten(1), template)
    spec = Module(template, input_size=_input_size(shape), tokens=len(shape) == 3)
    return ConvertedLayer(units, spec, note=note)


def _nothing(rest: Rest, last: bool) -> ConvertedLayer | None:
    """An identity; a flattening of what is a vector already; pooling that the head does itself."""
    module, shape = rest[0].unit.module, rest[0].input
    if is_nothing(module):
        return ConvertedLayer(rest[:1], None)
    if plain(module, nn.Flatten) and (len(shape) == 2 or shape[2:] == (1, 1)):
        return ConvertedLayer(rest[:1], None)
    if last and _pools_all(rest[0]):
        end = _end_of_pooling(rest)
        if end == len(rest):
            return ConvertedLayer(rest, None, note="pooling of the head")
        if all(type(step.unit.module) is nn.Dropout for step in rest[end:]):  # one call for both
            return as_module(rest, "dropout before the head")
    return None


def _pool_linear(rest: Rest, last: bool) -> ConvertedLayer | None:
    """Global average pooling and a linear layer."""
    if not _pools_all(rest[0]):
        return None
    end = _end_of_pooling(rest)
    if end == len(rest) or not plain(rest[end].unit.module, nn.Linear) or len(rest[end].input) != 2:
        return None
    linear: Any = rest[end].unit.module
    if linear.bias is None:
        return None
    activation, used = _activation(rest[end + 1 :])
    spec = PoolLinear(linear.out_features, activation)
    return ConvertedLayer(rest[: end + 1 + used], spec, detached(conv_tensors("linear", linear)))


def _flat_linear(rest: Rest, last: bool) -> ConvertedLayer | None:
    """A linear layer of all pixels of a square feature map: a convolution with a kernel of that size."""
    shape = rest[0].input
    if not plain(rest[0].unit.module, nn.Flatten) or rest[0].output != (shape[0], _product(shape[1:])):
        return None
    if len(shape) != 4 or shape[2] != shape[3]:
        return None
    end = 1
    while end < len(rest) and is_nothing(rest[end].unit.module):
        end += 1
    if end == len(rest) or not plain(rest[end].unit.module, nn.Linear):
        return None
    linear: Any = rest[end].unit.module
    return _linear_layer(rest, end + 1, linear, shape[2])


def _linear(rest: Rest, last: bool) -> ConvertedLayer | None:
    """A linear layer of a vector or of each token, with batch norm and activation if they follow."""
    linear: Any = rest[0].unit.module
    return _linear_layer(rest, 1, linear, 1) if plain(linear, nn.Linear) and len(rest[0].input) < 4 else None


def _linear_layer(rest: Rest, used: int, linear: Any, size: int) -> ConvertedLayer:
    """A linear layer as a convolution; ``used`` units are a part of it, and those that follow may be."""
    following = rest[used].unit.module if used < len(rest) else None
    tensors, norm = conv_tensors("unit", linear), plain(following, nn.BatchNorm1d) and len(rest[used].input) == 2
    if norm:
        tensors = unit_tensors("unit", linear, norm_with_activation(following)[0])
        used += 1
    activation, more = _activation(rest[used:])
    bias = linear.bias is not None
    spec = Conv(linear.out_features, size, activation=activation, padding=0, norm=norm, bias=norm or bias)
    return ConvertedLayer(rest[: used + more], spec, detached(tensors))


def _conv(rest: Rest, last: bool) -> ConvertedLayer | None:
    """A convolution, with batch norm and activation if they follow."""
    conv: Any = rest[0].unit.module
    if not isinstance(conv, nn.Conv2d):
        return None
    size, stride, padding, groups = conv_settings(conv)
    following = rest[1].unit.module if len(rest) > 1 else None
    if isinstance(following, nn.modules.batchnorm._BatchNorm):
        bn, activation = norm_with_activation(following)
        tensors, norm = unit_tensors("unit", conv, bn), True
    else:
        require(groups == 1, f"{groups} groups without batch norm")
        tensors, norm, activation = conv_tensors("unit", conv), False, "none"
    used = 1 + norm
    if activation == "none":
        activation, more = _activation(rest[used:])
        used += more
    bias = norm or conv.bias is not None
    spec = Conv(conv.out_channels, size, stride, activation, padding, groups, norm=norm, bias=bias)
    return ConvertedLayer(rest[:used], spec, detached(tensors))


def _norm(rest: Rest, last: bool) -> ConvertedLayer | None:
    """A batch norm without a convolution before it, with the activation that follows; or a layer norm."""
    module: Any = rest[0].unit.module
    if isinstance(module, nn.LayerNorm):
        require(plain(module, nn.LayerNorm) or type(module).__name__ == "LayerNorm", "a layer norm of another kind")
        require(len(rest[0].input) != 4 and len(module.normalized_shape) == 1, "a layer norm of feature maps")
        require(module.weight is not None and module.bias is not None, "a layer norm without scale or shift")
        tensors = layer_norm_tensors("norm", module)
        return _same(ConvertedLayer(rest[:1], LayerNorm(eps=module.eps), detached(tensors)))
    if not isinstance(module, nn.BatchNorm2d) and not plain(module, nn.BatchNorm1d):
        return None
    require(len(rest[0].input) != 3, "a batch norm of tokens")
    bn, activation = norm_with_activation(module)
    used = 0
    if activation == "none":
        activation, used = _activation(rest[1:])
    return ConvertedLayer(rest[: 1 + used], Norm(activation=activation), detached(batch_norm_tensors("norm.bn", bn)))


def _pool(rest: Rest, last: bool) -> ConvertedLayer | None:
    """Pooling over windows."""
    module: Any = rest[0].unit.module
    if not plain(module, nn.MaxPool2d, nn.AvgPool2d):
        return None
    size, stride, padding = (_square(name, getattr(module, name)) for name in ("kernel_size", "stride", "padding"))
    require(not module.ceil_mode, "ceil_mode")
    if isinstance(module, nn.MaxPool2d):
        require(_square("dilation", module.dilation) == 1 and not module.return_indices, "dilation or return_indices")
        return ConvertedLayer(rest[:1], MaxPool(kernel_size=size, stride=stride, padding=padding))
    require(padding == 0 or module.count_include_pad, "count_include_pad=False")
    require(module.divisor_override is None, f"divisor_override {module.divisor_override}")
    return ConvertedLayer(rest[:1], AveragePool(kernel_size=size, stride=stride, padding=padding))


def _token(rest: Rest, last: bool) -> ConvertedLayer | None:
    """The class token."""
    return ConvertedLayer(rest[:1], SelectToken(index=0)) if plain(rest[0].unit.module, FirstToken) else None


def _block(rest: Rest, last: bool) -> ConvertedLayer | None:
    """A residual or encoder block."""
    module = rest[0].unit.module
    converter = CONVERTERS.get(type(module).__name__)
    if converter is None:
        return None
    require(not any(map(_has_hooks, module.modules())), "hooks, or a forward of its own")
    try:
        spec, tensors = converter(module, rest[0].input)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise Unconvertible(f"only looks like a {type(module).__name__} of torchvision or timm") from error
    return _same(ConvertedLayer(rest[:1], spec, detached(tensors)))


_RULES: tuple[Callable[[Rest, bool], ConvertedLayer | None], ...] = (
    _nothing,
    _pool_linear,
    _flat_linear,
    _linear,
    _conv,
    _norm,
    _pool,
    _token,
    _block,
)


def _same(layer: ConvertedLayer) -> ConvertedLayer:
    """The layer, if it computes the same as its unit."""
    assert layer.spec is not None
    step = layer.units[0]
    problem = computes_the_same(layer.spec, layer.tensors, step.unit.module, _small(step))
    require(not problem, problem)
    return layer


def _small(step: TracedUnit) -> Shape:
    """The shape of a small input of a unit; patches of images have the size that their positions belong to."""
    if isinstance(step.unit.module, ImageTokens):
        return step.input
    if len(step.input) == 3:
        return step.input[0], min(step.input[1], 9), step.input[2]
    return *step.input[:2], *(min(side, 9) for side in step.input[2:])


def _has_hooks(module: nn.Module) -> bool:
    return not plain(module, type(module))


def _activation(rest: Rest) -> tuple[str, int]:
    """The activation that the next unit is, and how many units that are: 0 or 1."""
    name = activation_name(rest[0].unit.module) if rest else None
    return ("none", 0) if name in (None, "none") else (name, 1)


def _pools_all(step: TracedUnit) -> bool:
    """Whether a unit is the mean over all pixels or tokens."""
    module: Any = step.unit.module
    if plain(module, TokenMean):
        return bool(module.first == 0)
    if type(module).__name__ == "SelectAdaptivePool2d":
        return getattr(module, "pool_type", "") in ("avg", "fast", "fastavg") and len(step.output) == 2
    return plain(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)) and len(step.input) == 4


def _end_of_pooling(rest: Rest) -> int:
    """The index after the pooling with which ``rest`` begins and all that leaves its result as it is."""
    end = 1
    while end < len(rest) and (is_nothing(rest[end].unit.module) or plain(rest[end].unit.module, nn.Flatten)):
        end += 1
    return end


def _square(name: str, value: Any) -> int:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    require(pair[0] == pair[1], f"{name} {pair}")
    number: int = pair[0]
    return number


def _product(shape: Sequence[int]) -> int:
    product = 1
    for count in shape:
        product *= count
    return product


def _input_size(shape: Shape) -> int | tuple[int, int]:
    """Height and width, or the number of tokens."""
    if len(shape) == 3:
        return shape[1]
    return (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
