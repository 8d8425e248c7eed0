"""Autocast for the ops: the same rules that PyTorch has for convolutions, linear layers and losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("hne", "IMPL")
_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
_RULES: dict[str, tuple[torch.dtype | None, int | None]] = {}  # dtype, and how many arguments it is for


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(part, dtype) for part in value]
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible else value


def _cast_first(args: tuple[Any, ...], count: int | None, dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(_cast(value, dtype) for value in args[:count]) + (() if count is None else args[count:])


def register(op: str, dtype: torch.dtype | None = None, tensors: int | None = None) -> None:
    """Under autocast, cast the floating-point tensors of ``op`` to ``dtype``.

    Args:
        op: name of the op in ``torch.ops.hne``.
        dtype: None for the dtype that autocast was asked for (convolutions), or torch.float32 (losses).
        tensors: how many of the first arguments; None for all.
    """
    _RULES[op] = dtype, tensors
    for key, device in _DEVICES.items():

        def kernel(*args: Any, key: str = key, device: str = device) -> Any:
            target = dtype or torch.get_autocast_dtype(device)
            excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return getattr(torch.ops.hne, op)(*_cast_first(args, tensors, target))

        _LIBRARY.impl(op, kernel, key)


def casting(op: str, function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """``function`` under the rule of ``op``: for implementations that the dispatcher does not know."""

    def call(*args: Any) -> Any:
        if op in _RULES:
            dtype, tensors = _RULES[op]
            args = _cast_first(args, tensors, dtype or torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return function(*args)

    return call
