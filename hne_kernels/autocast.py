"""Autocast for the ops, by the rules that PyTorch has for convolutions, linear layers and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("hne", "IMPL")
_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
# By op: the dtype (None: the one that autocast was asked for), and the positions of the arguments to cast.
_RULES: dict[str, tuple[torch.dtype | None, frozenset[int]]] = {}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(item, dtype) for item in value]
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible else value


def _cast_arguments(arguments: tuple[Any, ...], positions: frozenset[int], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(_cast(value, dtype) if i in positions else value for i, value in enumerate(arguments))


def register(op: str, dtype: torch.dtype | None = None, cast: Sequence[str] | None = None) -> None:
    """Under autocast, cast floating-point tensors among the arguments of ``op`` to ``dtype``.

    Args:
        op: name of the op in ``torch.ops.hne``.
        dtype: None for the dtype that autocast was asked for (convolutions), or torch.float32 (losses).
        cast: names of the arguments to cast, None for all.
    """
    names = [argument.name for argument in getattr(torch.ops.hne, op).default._schema.arguments]
    positions = frozenset(i for i, name in enumerate(names) if cast is None or name in cast)
    _RULES[op] = dtype, positions
    for key, device in _DEVICES.items():

        def kernel(*args: Any, key: str = key, device: str = device) -> Any:
            target = dtype or torch.get_autocast_dtype(device)
            excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return getattr(torch.ops.hne, op)(*_cast_arguments(args, positions, target))

        _LIBRARY.impl(op, kernel, key)


def casting(op: str, function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """``function`` under the rule of ``op``, for implementations that PyTorch's dispatcher does not know."""

    def call(*args: Any) -> Any:
        if op in _RULES:
            dtype, positions = _RULES[op]
            args = _cast_arguments(args, positions, dtype or torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return call
