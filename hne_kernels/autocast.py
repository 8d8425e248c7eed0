"""Autocast for the ops: the same rules that PyTorch has for convolutions, linear layers and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("hne", "IMPL")
_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return value.to(dtype) if eligible else value


def register(op: str, dtype: torch.dtype | None = None) -> None:
    """Under autocast, cast the floating-point tensors of ``op`` to ``dtype``.

    Args:
        op: name of the op in ``torch.ops.hne``.
        dtype: None for the dtype that autocast was asked for (convolutions), or torch.float32 (losses).
    """
    for key, device in _DEVICES.items():

        def kernel(*args: Any, key: str = key, device: str = device) -> Any:
            target = dtype or torch.get_autocast_dtype(device)
            excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return getattr(torch.ops.hne, op)(*(_cast(value, target) for value in args))

        _LIBRARY.impl(op, kernel, key)
