"""Registration, tuning and launch of the kernels, on a GPU or in Triton's interpreter on a CPU."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import autograd

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Sizes that no access is aligned by: they need no separate compilation where one is 1 or a multiple of 16.
SIZES = [
    "parents", "branches", "replicate", "residual_replicate", "batch", "height", "width", "out_height", "out_width",
    "rows", "parts",
]  # fmt: skip
_PIXELS = 2**31 - 2**14  # of a branch, so that pixel numbers, up to the end of the last tile, fit into 32 bits
_INTERPRETER = threading.Lock()  # the interpreter replaces parts of triton.language while a kernel runs
_PROGRAMS_PER_PROCESSOR = 4  # so that one computes while another waits for memory


def op(function: Callable[..., Any] | None = None, *, mutates_args: Sequence[str] = ()) -> Any:
    """Register ``function`` as the op ``hne::triton_<its name>``, which the compiler can trace into.

    Shape inference calls ``function``, without the launches.

    Args:
        function: the op; without it, the result is a decorator.
        mutates_args: names of the arguments that the op writes to.
    """
    if function is None:
        return functools.partial(op, mutates_args=mutates_args)
    name = f"triton_{function.__name__}"
    if INTERPRETED:  # there is no kernel that the compiler could trace
        definition: Any = torch.library.custom_op(f"hne::{name}", function, mutates_args=mutates_args)
        definition.register_fake(function)
    else:
        definition = torch.library.triton_op(f"hne::{name}", function, mutates_args=mutates_args)
    if not mutates_args:  # autograd.register_mutable guards the others
        autograd.guard(definition)
    return getattr(torch.ops.hne, name)


@functools.cache
def programs(device: torch.device) -> int:
    """Programs in a persistent launch; each strides over the tiles by this number."""
    if not torch.cuda.is_available():
        return 3  # without a GPU, a number that exercises the strides
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_PROCESSOR


def split(tiles: int, device: torch.device) -> int:
    """The number of parts to split a sum over pixels into, each with ``tiles`` tiles, so that the GPU is busy."""
    return -(-programs(device) // max(tiles, 1))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor.contiguous()``, or None."""
    return None if tensor is None else tensor.contiguous()


def common_multiple(*sizes: int) -> int:
    """8 where it divides all sizes, else 1: the kernels' constant MULTIPLE, for accesses of 16 bytes.

    Triton itself only looks for multiples of 16, and inverted residuals have 24, 72 or 120 channels.
    """
    return 8 if all(size % 8 == 0 for size in sizes) else 1


def check_pixels(name: str, shape: Sequence[int]) -> None:
    """Raise if a branch of features ``[G, B, H, W, C]`` has more pixels than the kernels can index."""
    pixels = shape[1] * shape[2] * shape[3]
    if isinstance(pixels, int) and pixels > _PIXELS:  # a traced size is unknown, and a comparison would bound it
        raise ValueError(f"{name}: expected at most 2^31 - 2^14 pixels a branch, got {pixels} in shape {tuple(shape)}")


def config(warps: int, stages: int = 1, registers: int | None = None, **blocks: int) -> triton.Config:
    """One configuration of a kernel; ``registers`` limits those of a thread."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages, maxnreg=registers)


def _measure(call: Callable[[], None], quantiles: Sequence[float]) -> Any:
    """Time a configuration, which is not possible while a CUDA graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a Triton kernel has to be tuned, which a CUDA graph cannot capture: "
            "make the same call once before the capture"
        )
    return triton.testing.do_bench(call, quantiles=quantiles)


class Kernel:
    """A kernel and the configurations that it is tuned over.

    Tuning launches the kernel many times, so a kernel must not change its inputs. The choice is stored on disk, beside
    Triton's compiled kernels. It is made in the first call with the sizes of a layer, which therefore must precede the
    capture of a CUDA graph (as PyTorch's warm-up does). No later launch waits for the GPU.

    Args:
        kernel: a function under ``triton.jit``.
        configs: the fastest one is chosen; or the first one where the choice must not vary, in the interpreter and
            under ``torch.use_deterministic_algorithms(True)`` (another tile has another order of summation).
        key: names of the arguments whose values need a choice of their own. They include the sizes of a layer
            (channels, height), but not the batch: the last, smaller batch of an epoch is not worth tuning.
    """

    def __init__(self, kernel: Any, configs: list[triton.Config], key: list[str]) -> None:
        self.kernel, self.configs = kernel, configs
        self._tuned = triton.autotune(configs, key, cache_results=True, do_bench=_measure)(kernel)
        self._fixed = triton.autotune(configs[:1], [])(kernel)

    def __call__(self, *args: Any, **constants: Any) -> None:
        """Launch on the device of the first argument, a tensor."""
        first: Tensor = args[0]
        if INTERPRETED:
            if not (isinstance(first, FakeTensor) or first.is_meta):
                with _INTERPRETER:
                    self._fixed[(programs(first.device),)](*args, **constants)
            return
        fixed = torch.are_deterministic_algorithms_enabled()
        kernel = torch.library.wrap_triton(self._fixed if fixed else self._tuned)
        # Triton launches on the current device and stream, regardless of the device of the tensors.
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            kernel[(programs(first.device),)](*args, **constants)
