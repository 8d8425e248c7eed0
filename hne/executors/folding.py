"""The kernel paths of layers for inference: batch norm folded into packed weights, one kernel for a whole layer where
there is one, else the layer's forward with folded weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import hne_kernels as K

from ..layers import (
    AveragePoolLayer,
    BasicBlockLayer,
    BatchNormModule,
    BottleneckLayer,
    BranchConv,
    BranchLinear,
    BranchModule,
    BranchNorm,
    BranchParameters,
    ConvLayer,
    ConvNorm,
    DenseBottleneckLayer,
    Layer,
    LayerNormLayer,
    MaxPoolLayer,
    NormLayer,
    PatchEmbeddingLayer,
    PoolLinearLayer,
    PreActivationLayer,
    SelectTokenLayer,
    called_modules,
    check_kind,
    global_hook_dicts,
    has_hooks,
    running_normalization,
    uses_batch_statistics,
)
from .folded_step import Folded, FoldedConv, FoldedNorm, FoldedParameters, FoldedStep
from .kernels import group_weight

FoldedLayer = Sequence[K.FusedLayer] | FoldedStep  # with all branches
KernelPath = Callable[[Any], FoldedLayer | None]  # None if the kernels do not know its settings

_KERNEL_PATHS: dict[type[Layer], KernelPath] = {}


def kernel_path(kind: type[Layer]) -> Callable[[KernelPath], KernelPath]:
    """Decorator that registers a kernel path: a function that converts a layer of class ``kind``, with all branches, to
    a sequence of :class:`hne_kernels.FusedLayer`, or to a :class:`FoldedStep`."""

    def register(function: KernelPath) -> KernelPath:
        _KERNEL_PATHS[kind] = function
        return function

    return register


def to_fused_layers(layer: Layer) -> FoldedLayer | None:
    """The fused layers, or the step, that compute a layer with all branches.

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
    if any(isinstance(module, BatchNormModule) and uses_batch_statistics(module) for module in layer.modules()):
        return None
    return function(layer)


@kernel_path(ConvLayer)
def _conv(layer: ConvLayer) -> FoldedLayer:
    unit, activation = layer.unit, layer.spec.activation
    folded = _fold_conv(unit)
    if activation not in K.ACTIVATIONS or folded.groups > 1 or folded.depthwise:
        return FoldedStep(layer, {unit: folded})
    return [K.FusedLayer((folded.weight, folded.bias), folded.stride, folded.padding, activation=activation)]


@kernel_path(BottleneckLayer)
def _bottleneck(layer: BottleneckLayer) -> FoldedLayer:
    if not {layer.spec.activation, layer.spec.final_activation} <= set(K.ACTIVATIONS):
        return folded_forward(layer)
    depthwise, depthwise_bias = fold_conv(layer.depthwise)
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
def _pool_linear(layer: PoolLinearLayer) -> FoldedLayer:
    if layer.spec.activation not in K.ACTIVATIONS:
        return folded_forward(layer)
    return [fused_pool_linear(layer.linear, layer.spec.activation)]


def folded_forward(layer: Layer) -> FoldedStep:
    """A layer as a step: its forward, with folded weights. It may read parameters through the executor only."""
    folded: dict[BranchModule, Folded] = {}
    for module in layer.modules():
        if isinstance(module, BranchNorm):
            folded[module] = _fold_norm(module)
        elif isinstance(module, ConvNorm | BranchConv):
            folded[module] = _fold_conv(module)
        elif isinstance(module, BranchParameters):
            folded[module] = FoldedParameters(module.read(slice(0, module.branches)))
    return FoldedStep(layer, folded)


_FORWARD: tuple[type[Layer], ...] = (
    PatchEmbeddingLayer,
    LayerNormLayer,
    SelectTokenLayer,
)
for _kind in _FORWARD:
    kernel_path(_kind)(folded_forward)


@kernel_path(BasicBlockLayer)
def _basic_block(layer: BasicBlockLayer) -> FoldedLayer:
    return _residual(layer, layer.first, layer.second)


@kernel_path(DenseBottleneckLayer)
def _dense_bottleneck(layer: DenseBottleneckLayer) -> FoldedLayer:
    return _residual(layer, layer.expand, layer.spatial, layer.project)


def _residual(layer: BasicBlockLayer | DenseBottleneckLayer, *modules: ConvNorm) -> FoldedLayer:
    """A block with a shortcut: its convolutions, the last of which adds the block's input or the shortcut's output."""
    activation, count = layer.spec.activation, len(modules)
    dense = all(isinstance(module, ConvNorm) and module.groups == 1 and not module.depthwise for module in modules)
    if activation not in K.ACTIVATIONS or layer.squeeze is not None or not dense:
        return folded_forward(layer)
    *before, last = [fused_conv(module, activation) for module in modules]
    last = last._replace(residual=-count)
    if layer.shortcut is None:
        return [*before, last]
    first, *others = before
    return [fused_conv(layer.shortcut), first._replace(source=-2), *others, last]


@kernel_path(PreActivationLayer)
def _preactivation(layer: PreActivationLayer) -> FoldedLayer:
    activation = layer.spec.activation
    if activation not in K.ACTIVATIONS or layer.first.groups > 1 or layer.first.depthwise:
        return folded_forward(layer)
    norm, first = fused_norm(layer.norm, activation), fused_conv(layer.first, activation)
    if layer.shortcut is None:
        return [norm, first, fused_conv(layer.second)._replace(residual=-3)]
    shortcut = fused_conv(layer.shortcut)
    return [norm, shortcut, first._replace(source=-2), fused_conv(layer.second)._replace(residual=-2)]


@kernel_path(MaxPoolLayer)
@kernel_path(AveragePoolLayer)
def _pool(layer: MaxPoolLayer | AveragePoolLayer) -> FoldedLayer:
    pooling = "max" if isinstance(layer, MaxPoolLayer) else "average"
    spec = layer.spec
    return [
        K.FusedLayer((), spec.stride, layer.padding, pooling=pooling, window=spec.kernel_size, branches=layer.branches)
    ]


@kernel_path(NormLayer)
def _norm(layer: NormLayer) -> FoldedLayer:
    if layer.spec.activation not in K.ACTIVATIONS:
        return folded_forward(layer)
    return [fused_norm(layer.norm, layer.spec.activation)]


def fused_norm(module: BranchNorm, activation: str = "none") -> K.FusedLayer:
    """A batch norm and an activation as one fused layer."""
    check_kind(module, BranchNorm)
    return K.FusedLayer((_fold_norm(module).rows,), activation=activation)


def fused_conv(module: ConvNorm | BranchConv, activation: str = "none") -> K.FusedLayer:
    """A dense convolution with its batch norm, if it has one, and an activation as one fused layer."""
    folded = _fold_conv(module)
    return K.FusedLayer((folded.weight, folded.bias), folded.stride, folded.padding, activation=activation)


def fused_pool_linear(linear: BranchLinear, activation: str = "none") -> K.FusedLayer:
    """Global average pooling, a linear layer and an activation as one fused layer."""
    check_kind(linear, BranchLinear)
    weight, bias, *_ = _fold_conv(linear)
    return K.FusedLayer((weight, bias), activation=activation, mean=True)


def _fold_conv(module: ConvNorm | BranchConv) -> FoldedConv:
    """A convolution with all branches, and with its batch norm if it has one, packed for the kernels."""
    weight, bias = fold_conv(module)
    if isinstance(module, BranchConv):
        return FoldedConv(K.pack_weight(weight), bias, module.stride, module.padding)
    if module.depthwise:
        return FoldedConv(weight.squeeze(2), bias, module.stride, module.padding, depthwise=True)
    weight, bias = group_weight(weight, module.groups), bias.view(-1, module.channels // module.groups)
    return FoldedConv(K.pack_weight(weight), bias, module.stride, module.padding, module.groups)


def _fold_norm(module: BranchNorm) -> FoldedNorm:
    """A batch norm with all branches."""
    module.check_hooks()
    return FoldedNorm(running_normalization(module, slice(0, module.branches)).transpose(0, 1).contiguous())


def fold_conv(module: ConvNorm | BranchConv) -> tuple[Tensor, Tensor]:
    """Weight ``[branches, channels, in_channels // groups, k, k]`` and bias ``[branches, channels]`` of a convolution.
    A batch norm is folded in: ``(conv(x) - mean) * scale + shift``."""
    if isinstance(module, BranchConv):
        weight, bias = module.weight_and_bias(slice(0, module.branches))
        return weight, weight.new_zeros(weight.shape[:2]) if bias is None else bias
    check_kind(module, ConvNorm)
    everything = slice(0, module.branches)
    weight = module.weight(everything)
    weight = weight[:, :, None] if module.depthwise else weight
    mean, scale, shift = running_normalization(module, everything)
    return (weight * scale[..., None, None, None]).to(weight.dtype), (shift - mean * scale).to(weight.dtype)


def _fold_dense(module: ConvNorm) -> tuple[Tensor, Tensor]:
    weight, bias = fold_conv(module)
    return K.pack_weight(weight), bias
