"""Whether PyTorch records or transforms a call, so that more is wanted of it than its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_functorch_level = torch._C._functorch.maybe_current_level
_PROXY = torch._C._TorchDispatchModeKey.PROXY


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, without importing the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (``grad``, ``jvp``, ``vmap``, ...) or forward-mode derivatives are active.

    The kernels know neither of them; the reference implementations know all.
    """
    return forward_ad._current_level >= 0 or _functorch_level() is not None


def is_symbolic() -> bool:
    """Whether values of tensors are unknown or must not decide anything: in compiled, exported and traced programs, and
    in transforms."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._get_dispatch_mode(_PROXY) is not None
        or is_transformed()
    )


def is_traced() -> bool:
    """Whether a call may be recorded or transformed, so that it must read the weights themselves.

    True in programs of ``torch.compile``, ``torch.export``, ``torch.jit.trace`` and ``make_fx``, under transforms of
    ``torch.func`` and forward-mode differentiation, and in every ``TorchDispatchMode`` (fake tensors, counters of
    operations, loggers). Weights that were prepared before the call would be missing there: a recorded program could
    not hold them, and derivatives with respect to them would be zero.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or is_transformed()
    )
