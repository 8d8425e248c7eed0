"""Choice of the backend that serves a call.

An op has up to four implementations: ``reference`` (plain PyTorch, the baseline of the parity tests), ``cpp`` (CPU),
``cuda`` (C++) and ``triton``. By default the fastest one that can serve the call is chosen. ``HNE_BACKEND`` or
:func:`use_backend` choose one explicitly; a call that it cannot serve then raises an error that says why.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from . import autocast, checks, extension, reference
from .tracing import constant_when_compiled as _constant_when_compiled
from .tracing import is_traced, is_transformed

BACKENDS = ("reference", "cpp", "cuda", "triton")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The backends that an automatic choice tries before the reference, by kind of device, fastest first.
_PREFERENCE = {"cpu": ("cpp", "cuda"), "cuda": ("cuda", "triton")}
_DEVICES = {
    "cpp": ("cpu",),
    "cuda": ("cpu",) if extension.CUDA_EMULATED else ("cuda",),
    "triton": ("cuda", "cpu") if _INTERPRETED else ("cuda",),
}
DTYPES = {
    "cpp": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}

_DEFAULT: str | None = os.environ.get("HNE_BACKEND") or None

_TRANSFORMED = (
    "torch.func transforms and forward-mode derivatives are only implemented by the reference backend, "
    'with hne_kernels.use_backend("reference")'
)


class _Choice:
    """An open block of :func:`use_backend`."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.is_open = True  # False where the block was left in another context than it was entered in


# The open blocks of this thread or asyncio task, the innermost last.
_choices: ContextVar[tuple[_Choice, ...]] = ContextVar("choices", default=())
# The backend of the block that was entered or left last, in any thread: a compiled program is compiled again when it
# changes, since the compiler cannot watch a ContextVar.
_latest: str | None = _DEFAULT
# The choice of a block inside of a program that is being compiled.
_compiled_choice: str | None = None


def _unusable(backend: str) -> str | None:
    """Why ``backend`` cannot be used in this process at all, or None."""
    if backend == "cpp" and extension.CUDA_EMULATED:
        return "HNE_CUDA_EMULATION has put the CUDA kernels in its place"
    if backend == "cuda":
        return extension.cuda_unavailable()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if importlib.util.find_spec("hne_kernels.triton") is None:
            return "this version of hne_kernels has no Triton kernels"
        if not (_INTERPRETED or torch.cuda.is_available()):
            return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    return None


_UNUSABLE = {backend: _unusable(backend) for backend in BACKENDS}
_MODULES: dict[str, Any] = {"reference": reference, "cpp": torch.ops.hne, "cuda": torch.ops.hne}


def add_module(backend: str, module: Any) -> None:
    """Set the module with the implementations of ``backend``.

    For a backend whose modules import this one, so that this one cannot import them.
    """
    _MODULES[backend] = module


def _unavailable(backend: str) -> str | None:
    """Why ``backend`` serves no tensor in this process, or None. It asks the GPUs, which an import must not."""
    if _UNUSABLE[backend] is None and _DEVICES.get(backend) == ("cuda",):
        return extension.every_gpu_refused(backend)
    return _UNUSABLE[backend]


def is_loaded(backend: str) -> bool:
    """Whether ``backend`` is there; it may still refuse the GPUs of this machine (:func:`available_backends`)."""
    return _UNUSABLE[backend] is None


def available_backends() -> tuple[str, ...]:
    """Names of the backends that are usable in this process, on at least one device."""
    return tuple(backend for backend in BACKENDS if _unavailable(backend) is None)


def unavailable_backends() -> dict[str, str]:
    """The other backends, each with the reason why it cannot be used."""
    reasons = {backend: _unavailable(backend) for backend in BACKENDS}
    return {backend: reason for backend, reason in reasons.items() if reason is not None}


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = _UNUSABLE[name]
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call inside the ``with`` block by the backend ``name``.

    The choice holds in the thread or asyncio task that enters the block, and in tasks that are started inside of it.
    Other threads keep theirs. The gradient of an op runs on the backend of the op, whenever ``backward()`` is called;
    only layers that ``torch.utils.checkpoint`` computes again are served by the choice at that time.

    Args:
        name: one of ``reference``, ``cpp``, ``cuda``, ``triton``.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it is not available here; the message says why. Calls inside the block that it cannot
            serve (another device or dtype) raise too.
    """
    global _compiled_choice, _latest
    _check_name(name)
    if torch.compiler.is_compiling():
        outer, _compiled_choice = _compiled_choice, name
        try:
            yield
        finally:
            _compiled_choice = outer
        return
    choice = _Choice(name)
    _choices.set((*_choices.get(), choice))
    _latest = name
    try:
        yield
    finally:
        # Blocks may be left in any order, and a generator's block in another task than it was entered in.
        choices = _choices.get()
        if choice in choices:
            _choices.set(tuple(other for other in choices if other is not choice))
        else:
            choice.is_open = False
        _latest = _chosen()


def _chosen() -> str | None:
    """The explicitly chosen backend, or None."""
    for choice in reversed(_choices.get()):
        if choice.is_open:
            return choice.backend
    return _DEFAULT


@_constant_when_compiled
def _chosen_when_compiled(latest: str | None) -> str | None:
    """The chosen backend; a compiled program is valid for one value of ``latest``."""
    return _chosen()


def _rejects(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot serve tensors of this device and dtype, or None."""
    if _UNUSABLE[backend] is not None:
        return _UNUSABLE[backend]
    if backend == "reference":
        return None
    kind, devices = device.type, _DEVICES[backend]
    if kind not in devices:
        return f"it serves tensors on {' and '.join(devices)}, got {device}"
    if kind == "cuda" and (reason := _gpu_refusal(backend, device)) is not None:
        return reason
    if dtype not in DTYPES[backend]:
        return f"it serves {', '.join(str(d) for d in DTYPES[backend])}, got {dtype}"
    return None


@_constant_when_compiled
def _gpu_refusal(backend: str, device: torch.device) -> str | None:
    return extension.gpu_refusal(backend, torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _warn_once(reason: str, server: str) -> None:
    warnings.warn(f"hne_kernels: {reason}; {server}", stacklevel=5)


# The last value that the CUDA library was given (csrc/cuda/tf32.cu); it starts with exact products.
_tf32_passed_on = False


@_constant_when_compiled
def _pass_on_tf32() -> None:
    """Let the CUDA kernels multiply float32 in tf32 where torch's own matrix products may."""
    global _tf32_passed_on
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if allowed != _tf32_passed_on:
        torch.ops.hne.allow_tf32(allowed)
        _tf32_passed_on = allowed


@_constant_when_compiled
def _warn_of_refusal(device: torch.device, chosen: str) -> None:
    """Say once why a faster backend than ``chosen`` cannot run on this GPU."""
    for backend in _PREFERENCE["cuda"]:
        if backend == chosen:
            return
        if backend == "cuda" and not is_loaded("cuda"):
            continue  # the targets of a library that is not there say nothing
        if (reason := _gpu_refusal(backend, device)) is not None:
            _warn_once(reason, f"the backend {chosen!r} serves it" + (", slowly" if chosen == "reference" else ""))
            return


def backend_for(tensor: Tensor) -> str:
    """Name of the backend that serves a call whose first tensor is ``tensor``.

    Raises:
        RuntimeError: the explicitly chosen backend cannot serve it.
    """
    device = tensor.device
    kind = device.type
    dtype = checks.autocast_dtype(kind) or tensor.dtype
    compiling = torch.compiler.is_compiling()
    chosen = (_compiled_choice or _chosen_when_compiled(_latest)) if compiling else _chosen()
    if chosen is not None:
        _check_name(chosen)
        reason = _rejects(chosen, device, dtype)
        if chosen != "reference" and is_transformed():
            reason = _TRANSFORMED
        if reason is not None:
            raise RuntimeError(f"backend {chosen!r} cannot serve this call: {reason}")
        return chosen
    if is_transformed():
        return "reference"
    chosen = "reference"
    for backend in _PREFERENCE.get(kind, ()):
        if _rejects(backend, device, dtype) is None:
            chosen = backend
            break
    if kind == "cuda" and chosen != "cuda":
        _warn_of_refusal(device, chosen)
    return chosen


def reaches_cpp(x: Any, *, autocast: bool = False) -> bool:
    """Whether ``x`` is an ordinary tensor whose calls reach the library of the CPU, with the dtype of ``x``.

    Not where PyTorch records or transforms calls, nor where a gradient is required, nor under autocast, which lowers
    the dtype; with ``autocast`` whether they would reach it without.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype in DTYPES["cpp"]
        and not is_traced()
        and _chosen() in (None, "cpp")
        and (autocast or not torch.is_autocast_enabled("cpu"))
        and not (x.requires_grad and torch.is_grad_enabled())
    )


# By backend and op: implementations other than the function of that name in the backend's module.
_REGISTERED: dict[tuple[str, str], Callable[..., Any]] = {}


def register(op: str, function: Callable[..., Any], *backends: str) -> None:
    """Let ``backends`` compute ``op`` by ``function``, for example by calling other ops.

    Without it, a backend computes an op by the function of that name in its module.
    """
    for backend in backends:
        _REGISTERED[backend, op] = function


def implementation(op: str, tensor: Tensor, late_check: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function that computes ``op`` in a call whose first argument is ``tensor``.

    Args:
        op: name of the op.
        tensor: the first argument of the call.
        late_check: the check of the op's arguments, for a call whose arguments are not checked yet. The C++ ops of the
            CPU refuse wrong arguments themselves, faster than Python does: there the check runs only after a refusal,
            to explain it. With other implementations it runs before the call.

    Raises:
        RuntimeError: the explicitly chosen backend cannot serve the call.
    """
    if late_check is not None and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
        return late_check  # it raises: no backend serves such a call
    backend = backend_for(tensor)
    function = _REGISTERED.get((backend, op))
    if function is None:
        function = getattr(_MODULES[backend], op)
        if backend == "reference" and checks.autocast_dtype(tensor.device.type) is not None:
            function = autocast.casting(op, function, tensor.device.type)  # PyTorch's dispatcher casts for the others
    if backend == "cuda":
        _pass_on_tf32()
    if late_check is None:
        return function
    late = backend == "cpp" and not torch.compiler.is_compiling()
    return functools.partial(_check_after if late else _check_before, function, late_check)


def _check_before(function: Callable[..., Any], check: Callable[..., Any], *arguments: Any) -> Any:
    check(*arguments)
    return function(*arguments)


def _check_after(function: Callable[..., Any], check: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception:
        check(*arguments)
        raise


def has_kernel(op: str, tensor: Tensor) -> bool:
    """Whether the backend that serves ``tensor`` has a kernel for ``op``, and does not compose it from other ops."""
    return isinstance(implementation(op, tensor), torch._ops.OpOverloadPacket)
