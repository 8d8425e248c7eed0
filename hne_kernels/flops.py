"""Floating-point operations of the ops, for ``torch.utils.flop_counter.FlopCounterMode``.

PyTorch's convention: a multiply-add of a convolution or matrix product counts two, padding included, and everything
else counts nothing. Each of the two gradients of a convolution counts as much as the convolution. A kernel that
computes a convolution again in its backward pass counts it once. :func:`~hne_kernels.branch_pointwise_stats` counts
nothing, since the op that reads the convolution counts it.

PyTorch's own formula counts the weight's gradient of a *grouped* convolution once for each group. The backward pass of
a ``NaiveHNE`` therefore shows far more operations than that of a ``FusedHNE``, which shows those that are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType
from typing import Any

import torch

from .ops.fused_layers import prepared_layers

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _conv(weight: Shape, y: Shape) -> int:
    """A convolution with the output ``[G, B, H, W, C_out]``, dense ``[G, C_out, C_in, k, k]`` or depthwise."""
    return 2 * prod(y) * prod(weight[2:])


def _branch_conv2d(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return _conv(weight, out_shape)


def _backward_input(grad: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _conv(weight, grad)


def _backward_weight(grad: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return _conv(out_shape, grad)


def _branch_norm_conv2d(x: Shape, weight: Shape, *_: Any, out_shape: Sequence[Shape], **__: Any) -> int:
    return _conv(weight, out_shape[0])


def _branch_norm_conv2d_backward(grad_y: Shape, *rest: Any, **_: Any) -> int:
    weight, (need_input, need_weight) = rest[7], rest[-2:]
    return _conv(weight, grad_y) * (int(need_input) + int(need_weight))


def _branch_pointwise_norm_conv2d(x: Shape, weight: Shape, *rest: Any, out_shape: Sequence[Shape], **_: Any) -> int:
    next_weight = rest[6]
    return _conv(weight, out_shape[0]) + (0 if next_weight is None else _conv(next_weight, out_shape[1]))


def _branch_pointwise_norm_conv2d_backward(grad_z: Shape, grad_y: Shape, *rest: Any, **_: Any) -> int:
    weight, next_weight = rest[6], rest[13]
    return 2 * (_conv(weight, grad_z) + (0 if next_weight is None else _conv(next_weight, grad_y)))


def _packed(weight: Shape, bias: Shape, pixels: int) -> int:
    """A convolution with packed filters ``[G, P, k, k, C_in, 16]`` for ``pixels`` of the output of one branch."""
    return 2 * pixels * prod(bias) * prod(weight[2:5])


def _fused_conv2d(x: Shape, weight: Shape, bias: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return _packed(weight, bias, prod(out_shape[1:4]))


def _fused_bottleneck(x: Shape, *rest: Any, out_shape: Shape, **_: Any) -> int:
    expand, expand_bias, depthwise, _, project, project_bias, shortcut, shortcut_bias = rest[:8]
    pixels = prod(out_shape[1:4])
    total = _packed(expand, expand_bias, prod(x[1:4])) + 2 * pixels * prod(depthwise)
    total += _packed(project, project_bias, pixels)
    return total if shortcut is None else total + _packed(shortcut, shortcut_bias, pixels)


def _fused_bottleneck_chain(x: Shape, weights: Sequence[Any], numbers: Sequence[int], *_: Any, **__: Any) -> int:
    total = 0
    for i in range(len(numbers) // 4):
        shapes = weights[8 * i : 8 * i + 8]  # of these, the project bias is [G', C_out]
        x = (shapes[5][0], *x[1:4], shapes[5][1])
        total += _fused_bottleneck(x, *shapes, out_shape=x)
    return total


def _fused_layers(x: Shape, handle: int, *_: Any, **__: Any) -> int:
    outputs: list[Shape] = [x if len(x) == 5 else (1, x[0], *x[2:], x[1])]
    total = 0
    for index, layer in enumerate(prepared_layers(handle)):
        shapes: list[Any] = [None if weight is None else weight.shape for weight in layer.weights]
        count = _none if layer.is_norm or layer.pooling else _fused_bottleneck if layer.is_bottleneck else _fused_conv2d
        features = outputs[index + 1 + layer.source]
        features = (*features[:2], 1, 1, features[4]) if layer.mean else features
        like = next(weight for weight in (*layer.weights, torch.empty(())) if weight is not None)
        outputs.append(layer.check(like.new_empty(()).expand(features)))
        total += count(features, *shapes, out_shape=outputs[-1])
    return total


def _prefix_logits(features: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * features[1] * prod(weight)


def _none(*_: Any, **__: Any) -> int:
    return 0


_FORMULAS: dict[str, Callable[..., int]] = {
    "batch_norm_scale_shift": _none,
    "batch_norm_scale_shift_backward": _none,
    "branch_conv2d": _branch_conv2d,
    "branch_conv2d_backward_input": _backward_input,
    "branch_conv2d_backward_weight": _backward_weight,
    "branch_depthwise_conv2d": _branch_conv2d,
    "branch_depthwise_conv2d_backward_input": _backward_input,
    "branch_depthwise_conv2d_backward_weight": _backward_weight,
    "branch_norm_conv2d": _branch_norm_conv2d,
    "branch_norm_conv2d_backward": _branch_norm_conv2d_backward,
    "branch_pointwise_stats": _none,
    "branch_pointwise_stats_backward": _none,
    "branch_pointwise_norm_conv2d": _branch_pointwise_norm_conv2d,
    "branch_pointwise_norm_conv2d_backward": _branch_pointwise_norm_conv2d_backward,
    "branch_normalize": _none,
    "branch_normalize_backward": _none,
    "fused_conv2d": _fused_conv2d,
    "fused_bottleneck": _fused_bottleneck,
    "fused_bottleneck_chain": _fused_bottleneck_chain,
    "fused_layers": _fused_layers,
    "prefix_mean": _none,
    "prefix_mean_backward": _none,
    "prefix_logits": _prefix_logits,
    "hierarchical_distillation_loss": _none,
}


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _FORMULAS.items():
        for op in (name, f"triton_{name}"):
            packet = getattr(torch.ops.hne, op, None)
            if packet is not None and packet not in flop_registry:
                register_flop_formula(packet)(formula)


class _Finder(MetaPathFinder):
    """Registers the formulas once ``torch.utils.flop_counter`` has been imported.

    To import it here would take 0.3 s, since it imports Triton.
    """

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register the formulas of all ops with PyTorch, now or when its counter is imported."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())
