"""Registration of derivatives, and errors where a derivative would be wrong without a word.

PyTorch's dispatcher calls the kernels registered here first. Reverse mode is as ``torch.library.register_autograd`` has
it. A tangent of forward mode would be dropped there, and the result would look like a constant.
"""

from __future__ import annotations

import warnings
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


def register_mutable(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """:func:`register` for an op that writes to some of its arguments, which ``torch.library`` does not support.

    The written arguments must have no derivative, and must not be saved for the backward pass.
    """
    overload = getattr(torch.ops.hne, op).default
    arguments = overload._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    after = torch._C._after_ADInplaceOrView_keyset

    def increment_versions(args: tuple[Any, ...]) -> None:
        torch._C._increment_version([args[i] for i in written if args[i] is not None])

    class Differentiated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args_and_keyset: Any) -> Any:
            args, keyset = args_and_keyset[:-1], args_and_keyset[-1]
            with torch._C._AutoDispatchBelowADInplaceOrView():
                result = overload.redispatch(keyset & after, *args)
            setup_context(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return *backward(ctx, *grads), None

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        increment_versions(args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Differentiated.apply(*args, keyset)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & after, *args)

    def inference_kernel(keyset: Any, *args: Any) -> Any:  # torch.inference_mode() passes by the kernel above
        increment_versions(args)
        return overload.redispatch(keyset & after, *args)

    with warnings.catch_warnings():  # torch.library.custom_op has registered kernels without a derivative
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for key, kernel in (("Autograd", autograd_kernel), ("ADInplaceOrView", inference_kernel)):
            _LIBRARY.impl(op, kernel, key, with_keyset=True, allow_override=True)


def call(op: Callable[..., Any], *args: Any) -> Any:
    """The result of a backward op; without the detour through its own derivative where nothing is recorded."""
    if torch.is_grad_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def register_inference(op: str) -> None:
    """Let every derivative of the op ``hne::op`` raise an error.

    In reverse mode that is the backward pass, since an exported program may be called with gradients switched on.
    """

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(checks.NO_GRADIENT.format(op))

    register(op, refuse)


def guard(definition: Any) -> None:
    """The same errors for an op that ``torch.library.custom_op`` or ``triton_op`` defines.

    Such an op keeps its derivatives to itself; a kernel for a device's derivatives comes before it.
    """
    kernel = torch._library.autograd.make_autograd_impl(definition._opoverload, definition)
    for key in ("AutogradCPU", "AutogradCUDA"):
        _LIBRARY.impl(definition._name, kernel, key, with_keyset=True)


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
