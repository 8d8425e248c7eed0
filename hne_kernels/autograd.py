"""Registration of derivatives, and errors where a derivative would be wrong without a word.

PyTorch's dispatcher calls the kernels registered here first. Reverse mode is as ``torch.library.register_autograd`` has
it. A tangent of forward mode would be dropped there, and the result would look like a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .tracing import is_transformed


class _Library(torch.library.Library):
    """Registers kernels that refuse transforms which they cannot differentiate."""

    def impl(self, op_name: str, fn: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if is_transformed():
                _check_transform(op_name, args)
            return fn(keyset, *args, **kwargs)

        super().impl(op_name, kernel, *arguments, **options)


_LIBRARY = _Library("hne", "FRAGMENT")


def register(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """``torch.library.register_autograd`` for the op ``hne::op``; forward mode and ``torch.func.grad`` are errors."""
    torch.library.register_autograd(f"hne::{op}", backward, setup_context=setup_context, lib=_LIBRARY)


def register_inference(op: str) -> None:
    """Let every derivative of the op ``hne::op`` raise an error.

    In reverse mode that is the backward pass, since an exported program may be called with gradients switched on.
    """

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(checks.NO_GRADIENT.format(op))

    register(op, refuse)


def _check_transform(op: str, arguments: tuple[Any, ...]) -> None:
    """Raise if the result of ``op`` has a derivative in forward mode, or in reverse mode of ``torch.func``."""
    tensors = list(_tensors(arguments))
    forward = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )
    reverse = (
        torch._C._functorch.maybe_current_level() is not None
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
    )
    if forward or reverse:
        wanted = "forward-mode derivatives" if forward else "derivatives by torch.func"
        raise RuntimeError(
            f'{op}: {wanted} are not implemented; use the reference backend, with hne_kernels.use_backend("reference")'
        )


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
