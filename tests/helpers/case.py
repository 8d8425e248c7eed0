"""A case: one call of one op, with inputs that are drawn anew for every test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hne_kernels as K

Inputs = dict[str, Any]
# Ops of training around a convolution; differentiable once.
TRAINING_OPS = ("branch_norm_conv2d", "branch_pointwise_stats", "branch_pointwise_norm_conv2d")
NORMS = ("norm", "out_norm", "residual_norm")  # inputs that are normalisations [3, G, C]
STATISTICS = ("mean", "var", "total")  # inputs that are statistics of a batch, float32 at least
STATE = ("running_mean", "running_var", "num_batches_tracked")  # inputs that an op writes to
KINK = 0.05  # gradients are not compared this close to where an activation bends


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    op: str
    name: str
    make: Callable[[torch.Generator], Inputs] = field(repr=False)
    differentiable: tuple[str, ...]  # inputs with a gradient
    terms: int  # length of the longest sum behind an element of a result or gradient
    roundings: int = 1  # how often a value is rounded to the dtype on its way to a result or gradient
    naive_roundings: int = 1  # the same in plain PyTorch, which stores the result of each step
    arguments: Callable[[Inputs], Inputs] = field(default=dict, repr=False)  # the op's arguments, from the inputs
    plain_results: int = 0  # the last results, which have no gradient
    variant: str = ""  # for an op with several kernels: which one

    @property
    def label(self) -> str:
        """The op and the variant."""
        return f"{self.op}-{self.variant}" if self.variant else self.op

    def __str__(self) -> str:
        return f"{self.label}-{self.name}"

    def inputs(self, rng: torch.Generator, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        """New inputs; normalisations and statistics are float32 at least."""
        made = cast(self.make(rng), dtype, device)
        if dtype.itemsize < 4:
            made |= {name: made[name].float() for name in (*NORMS, *STATISTICS) if made.get(name) is not None}
        return made

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        op = _CALLS.get(self.op) or getattr(K, self.op)
        result = op(**self.arguments(inputs))
        return tuple(r for r in result if r is not None) if isinstance(result, tuple) else (result,)


def _fused_layers(x: Tensor, layers: Sequence[K.FusedLayer], keep: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(K.FusedLayers(layers, keep)(x))


def _batch_norm_scale_shift(**inputs: Any) -> tuple[Tensor, ...]:
    """The normalisation and the new state; the given state stays unchanged."""
    state = {name: _copy(inputs[name]) for name in STATE if isinstance(inputs[name], Tensor)}
    norm = K.batch_norm_scale_shift(**{**inputs, **state})
    return norm, *(value if value.is_floating_point() else value.double() for value in state.values())


def _copy(tensor: Tensor) -> Tensor:
    """A copy of the same strides and alignment; contiguous if the tensor is expanded and so cannot be written to."""
    expanded = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if expanded or tensor.numel() == 0 or torch.compiler.is_compiling():
        return tensor.clone()
    start = tensor.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((start + last + 1,), (1,), 0).clone().as_strided(tensor.shape, tensor.stride(), start)


_CALLS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "FusedLayers": _fused_layers,
    "batch_norm_scale_shift": _batch_norm_scale_shift,
}


def normal(rng: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64) * scale


def cast(inputs: Inputs, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The same inputs in another dtype and place; integers keep their dtype."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return {name: move(value) for name, value in inputs.items()}


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
