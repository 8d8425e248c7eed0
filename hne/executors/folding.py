"""The kernel paths of layers for inference: batch norm folded into packed weights, one kernel for a whole layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import hne_kernels as K

from ..layers import (
    BottleneckLayer,
    BranchConv,
    BranchLinear,
    ConvLayer,
    ConvNorm,
    Layer,
    PoolLinearLayer,
    called_modules,
    check_kind,
    global_hook_dicts,
    has_hooks,
    running_normalization,
    uses_batch_statistics,
)

KernelPath = Callable[[Any], Sequence[K.FusedLayer] | None]  # None if the kernels do not know its settings

_KERNEL_PATHS: dict[type[Layer], KernelPath] = {}


def kernel_path(kind: type[Layer]) -> Callable[[KernelPath], KernelPath]:
    """Decorator that registers a kernel path: a function that converts a layer of class ``kind``, with all branches, to
    :class:`hne_kernels.FusedLayer` that are computed one after the other."""

    def register(function: KernelPath) -> KernelPath:
        _KERNEL_PATHS[kind] = function
        return function

    return register


def to_fused_layers(layer: Layer) -> Sequence[K.FusedLayer] | None:
    """The fused layers, with all branches, that compute a layer one after the other.

    Returns:
        None if inference has to call the layer instead: its class has no kernel path, or none for its settings; the
        layer, or a module that its ``forward`` calls, has hooks or a replaced ``forward``; or one of its batch norms
        normalises by the statistics of the batch.
    """
    function = _KERNEL_PATHS.get(type(layer))
    if function is None or any(global_hook_dicts()):
        return None
    if any(has_hooks(module) or "forward" in module.__dict__ for module in called_modules(layer)):
        return None
    if any(isinstance(module, ConvNorm) and uses_batch_statistics(module) for module in layer.modules()):
        return None
    return function(layer)


@kernel_path(ConvLayer)
def _conv(layer: ConvLayer) -> Sequence[K.FusedLayer] | None:
    unit, activation = layer.unit, layer.spec.activation
    if activation not in K.ACTIVATIONS or layer.spec.groups > 1:
        return None
    if isinstance(unit, BranchConv):
        weight, bias = unit.weight_and_bias(slice(0, unit.branches))
        return [K.FusedLayer((K.pack_weight(weight), bias), unit.stride, unit.padding, activation=activation)]
    return [fused_conv(unit, activation)]


@kernel_path(BottleneckLayer)
def _bottleneck(layer: BottleneckLayer) -> Sequence[K.FusedLayer] | None:
    if not {layer.spec.activation, layer.spec.final_activation} <= set(K.ACTIVATIONS):
        return None
    depthwise, depthwise_bias = _fold(layer.depthwise)
    weights = (
        *_fold_dense(layer.expand),
        depthwise.squeeze(2).permute(0, 2, 3, 1).contiguous(),
        depthwise_bias,
        *_fold_dense(layer.project),
        *((None, None) if layer.shortcut is None else _fold_dense(layer.shortcut)),
    )
    bottleneck = K.FusedLayer(
        weights,
        stride=layer.spec.stride,
        activation=layer.spec.activation,
        final_activation=layer.spec.final_activation,
        identity=layer.identity,
    )
    return [bottleneck]


@kernel_path(PoolLinearLayer)
def _pool_linear(layer: PoolLinearLayer) -> Sequence[K.FusedLayer] | None:
    if layer.spec.activation not in K.ACTIVATIONS:
        return None
    return [fused_pool_linear(layer.linear, layer.spec.activation)]


def fused_conv(module: ConvNorm, activation: str = "none") -> K.FusedLayer:
    """A dense convolution with its batch norm and an activation as one fused layer."""
    return K.FusedLayer(_fold_dense(module), module.stride, module.padding, activation=activation)


def fused_pool_linear(linear: BranchLinear, activation: str = "none") -> K.FusedLayer:
    """Global average pooling, a linear layer and an activation as one fused layer."""
    check_kind(linear, BranchLinear)
    weight, bias = linear.weight_and_bias(slice(0, linear.branches))
    return K.FusedLayer((K.pack_weight(weight), bias), activation=activation, mean=True)


def _fold(module: ConvNorm) -> tuple[Tensor, Tensor]:
    """Weight ``[branches, channels, in_channels, k, k]`` and bias ``[branches, channels]`` with batch norm folded in:
    ``(conv(x) - mean) * scale + shift``."""
    check_kind(module, ConvNorm)
    everything = slice(0, module.branches)
    weight = module.weight(everything)
    weight = weight[:, :, None] if module.depthwise else weight
    mean, scale, shift = running_normalization(module, everything)
    return (weight * scale[..., None, None, None]).to(weight.dtype), (shift - mean * scale).to(weight.dtype)


def _fold_dense(module: ConvNorm) -> tuple[Tensor, Tensor]:
    weight, bias = _fold(module)
    return K.pack_weight(weight), bias
