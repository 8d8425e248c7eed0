"""How kernels reach the GPU: registered, traced by the compiler, tuned or fixed; or interpreted on the CPU."""

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

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Sizes that no access is aligned by: a kernel is not compiled anew where one of them is 1 or a multiple of 16.
SIZES = [
    "parents", "branches", "replicate", "residual_replicate", "batch", "height", "width", "out_height", "out_width",
    "rows", "parts",
]  # fmt: skip
_PIXELS = 2**31 - 2**14  # of a branch, so that a number for each and for those of a last, incomplete tile has 32 bits
_INTERPRETER = threading.Lock()  # it replaces parts of triton.language while a kernel runs
_PROGRAMS_PER_PROCESSOR = 4  # enough that one waits for memory while another computes


def op(function: Callable[..., Any]) -> Any:
    """Register ``function`` as the op ``hne::triton_<its name>``, which the compiler can look into.

    Its shape inference is ``function`` itself, without the launches.
    """
    name = f"triton_{function.__name__}"
    if INTERPRETED:  # the compiler has no kernel to look at, only a result to wait for
        torch.library.custom_op(f"hne::{name}", function, mutates_args=()).register_fake(function)
    else:
        torch.library.triton_op(f"hne::{name}", function, mutates_args=())
    return getattr(torch.ops.hne, name)


@functools.cache
def programs(device: torch.device) -> int:
    """How many programs share the tiles of a launch, each taking every so-manieth."""
    if not torch.cuda.is_available():
        return 3  # interpreted (or compiled alone): no GPU to fill, but the sharing is exercised
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_PROCESSOR


def split(tiles: int, device: torch.device) -> int:
    """In how many parts to cut a sum over pixels, each the work of ``tiles`` programs, so that the GPU is busy."""
    return -(-programs(device) // max(tiles, 1))


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor.contiguous()`` of one that may be absent."""
    return None if tensor is None else tensor.contiguous()


def check_pixels(name: str, shape: Sequence[int]) -> None:
    """Raise if a branch of features ``[G, B, H, W, C]`` has more pixels than the kernels can number."""
    pixels = shape[1] * shape[2] * shape[3]
    if isinstance(pixels, int) and pixels > _PIXELS:  # a traced size is unknown, and would get an upper bound
        raise ValueError(f"{name}: expected at most 2^31 - 2^14 pixels a branch, got {pixels} in shape {tuple(shape)}")


def config(warps: int, stages: int = 1, **blocks: int) -> triton.Config:
    """One way to compile a kernel."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def _measure(call: Callable[[], None], quantiles: Sequence[float]) -> Any:
    """Time a configuration; a graph that is being captured would be spoilt by that."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a Triton kernel has to be tuned, which a CUDA graph cannot capture: "
            "make the same call once before the capture"
        )
    return triton.testing.do_bench(call, quantiles=quantiles)


class Kernel:
    """A kernel and the configurations it is tuned over.

    Tuning launches the kernel many times, so a kernel must not change what it reads. The choice is kept on disk, beside
    Triton's compiled kernels. It happens in the first call of a layer's size, which therefore has to come before a CUDA
    graph is captured (as the warm-up that PyTorch asks for does); no later launch waits for the GPU.

    Args:
        kernel: a function under ``triton.jit``.
        configs: the fastest of them serves; the first where the choice must not vary: in the interpreter and under
            ``torch.use_deterministic_algorithms(True)`` (another tile is another order of summation).
        key: names of the arguments that a new choice is made for. Of sizes it has those of a layer (channels,
            height), not the batch: the last, smaller batch of an epoch is not worth a tuning.
    """

    def __init__(self, kernel: Any, configs: list[triton.Config], key: list[str]) -> None:
        self.kernel, self.configs = kernel, configs
        self._tuned = triton.autotune(configs, key, cache_results=True, do_bench=_measure)(kernel)
        self._fixed = triton.autotune(configs[:1], [])(kernel)

    def __call__(self, *args: Any, **constants: Any) -> None:
        """Launch; the first argument is a tensor, and tells the device."""
        first: Tensor = args[0]
        if INTERPRETED:
            if not (isinstance(first, FakeTensor) or first.is_meta):
                with _INTERPRETER:
                    self._fixed[(programs(first.device),)](*args, **constants)
            return
        fixed = torch.are_deterministic_algorithms_enabled()
        kernel = torch.library.wrap_triton(self._fixed if fixed else self._tuned)
        # Triton launches on the current device (and its current stream), whichever the tensors are on.
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            kernel[(programs(first.device),)](*args, **constants)
