"""Registers and memory that the Triton kernels need, compiled without a GPU.

Every op is called with tensors that have a shape and no memory, in every dtype; each launch compiles its kernel in
every configuration for the GPUs asked for, instead of running it.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_resources
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from hne_kernels import default_sizes, pack_weight
from hne_kernels.triton import launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_OPS = torch.ops.hne


# --- calls -------------------------------------------------------------------------------------------------


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm_conv(
    new: Callable[..., Tensor], weight: Tensor, source: tuple[int, int, int], activation: str | None,
    geometry: tuple[int, int, int],
) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:  # fmt: skip
    """A convolution between two batch norms and its gradients; ``source`` is (branches, height, channels)."""
    branches, size, channels = source
    x = new(branches, 8, size, size, channels)
    y = new(weight.shape[0], 8, size, size, weight.shape[1])
    vector = _tensor(y.shape[0], y.shape[4], dtype=torch.float32)
    norm = None if activation is None else _tensor(3, branches, channels, dtype=torch.float32)
    options = (activation or "none", *geometry)
    yield _OPS.triton_branch_norm_conv2d, (x, weight, norm, None, *options, False)
    grads = (y, vector, vector, None, y, vector, None)
    yield _OPS.triton_branch_norm_conv2d_backward, (*grads, x, weight, norm, *options, False, True, True)


def _calls(dtype: torch.dtype) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every op as the two architectures call it; 24 channels stand for the counts that 16 does not divide."""

    def new(*shape: int) -> Tensor:
        return _tensor(*shape, dtype=dtype)

    def pointwise(branches: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        return pack_weight(new(branches, outputs, inputs, 1, 1)), new(branches, outputs)

    # The stem, and a branching 1x1 with its gradients.
    x, grad, weight = new(1, 8, 16, 16, 3), new(1, 8, 16, 16, 16), new(1, 16, 3, 3, 3)
    yield _OPS.triton_branch_conv2d, (x, weight, None, 1, 1, 1)
    yield _OPS.triton_branch_conv2d_backward_weight, (grad, x, 3, 1, 1, 1)
    x, grad, weight = new(4, 8, 16, 16, 128), new(8, 8, 16, 16, 64), new(8, 64, 128, 1, 1)
    yield _OPS.triton_branch_conv2d, (x, weight, None, 1, 0, 2)
    yield _OPS.triton_branch_conv2d_backward_input, (grad, weight, 16, 16, 1, 0, 2)
    yield _OPS.triton_branch_conv2d_backward_weight, (grad, x, 1, 1, 0, 2)
    x, weight = new(4, 8, 16, 16, 64), new(4, 64, 3, 3)
    yield _OPS.triton_branch_depthwise_conv2d, (x, weight, None, 1, 1, 1)
    yield _OPS.triton_branch_depthwise_conv2d_backward_input, (x, weight, 16, 16, 1, 1, 1)
    yield _OPS.triton_branch_depthwise_conv2d_backward_weight, (x, x, 3, 1, 1, 1)
    # The end of a branching bottleneck's shortcut, and a plain inverted residual (Table 3).
    yield _OPS.triton_fused_conv2d, (new(4, 8, 16, 16, 128), *pointwise(8, 256, 128), 2, 0, 2, "relu")
    filters, bias = new(2, 3, 3, 144), new(2, 144)
    residual = (*pointwise(2, 144, 24), filters, bias, *pointwise(2, 24, 144), None, None)
    yield _OPS.triton_fused_bottleneck, (new(2, 8, 28, 28, 24), *residual, 1, 1, "relu6", True, "none")

    # Training: a stem that reads the image as it is; branching 1x1 and 3x3 convolutions that normalise their input.
    yield from _norm_conv(new, new(1, 16, 3, 3, 3), (1, 16, 3), None, (1, 1, 1))
    yield from _norm_conv(new, new(8, 64, 128, 1, 1), (4, 16, 128), "relu", (1, 0, 2))
    yield from _norm_conv(new, new(2, 144, 24, 1, 1), (2, 16, 24), "none", (1, 0, 1))
    yield from _norm_conv(new, new(4, 64, 3, 3), (4, 16, 64), "relu6", (1, 1, 1))
    x = new(4, 8, 16, 16, 64)
    norm = _tensor(3, 4, 64, dtype=torch.float32)
    for activation, added in (("relu", x), ("none", None)):
        yield _OPS.triton_branch_normalize, (x, norm, added, activation)
        yield _OPS.triton_branch_normalize_backward, (x, x, x, norm, activation)
    for models, classes in ((16, 100), (8, 1000), (100, 100)):
        logits, target = new(models, 8, classes), _tensor(8, dtype=torch.int64)
        sizes = default_sizes(models)
        yield _OPS.triton_prefix_mean, (logits, sizes)
        yield _OPS.triton_prefix_mean_backward, (logits[: len(sizes)], sizes, models)
        yield _OPS.triton_hierarchical_distillation_loss, (logits, target, 0.5, 2.0)


@dataclass(frozen=True)
class Launch:
    """The types, alignments and constants that a kernel is compiled for."""

    kernel: Any
    config: triton.Config
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    dtype: str
    target: int

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}{self.kernel.__name__}"

    @property
    def options(self) -> str:
        """The constants and the configuration as text."""
        constants = " ".join(f"{name.lower()}={value}" for name, value in self.constants.items() if name != "ENDS")
        blocks = "x".join(str(size) for size in self.config.kwargs.values())
        return f"{constants} tile={blocks} warps={self.config.num_warps} stages={self.config.num_stages}".strip()


def launches(targets: tuple[int, ...]) -> list[Launch]:
    """All kernels in all configurations, dtypes and calls, each once."""
    found: dict[str, Launch] = {}

    def record(kernel: launch.Kernel, *arguments: Any, **constants: Any) -> None:
        mocked = tuple(MockTensor(a.dtype, a.shape) if isinstance(a, Tensor) else a for a in arguments)
        types = [str(a.dtype) if isinstance(a, MockTensor) else _specialised(a) for a in mocked]
        for target in targets:
            for config in kernel.configs:
                new = Launch(kernel.kernel, config, mocked, constants, label, target)
                found.setdefault(f"{new.name} {new.options} {types} {target}", new)

    with mock.patch.object(launch.Kernel, "__call__", record):
        for dtype in DTYPES:
            label = str(dtype).removeprefix("torch.")
            for op, arguments in _calls(dtype):
                op(*arguments)
        label, before = "tf32", torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for op, arguments in _calls(torch.float32):
            op(*arguments)
        torch.backends.cuda.matmul.fp32_precision = before
    return list(found.values())


def _specialised(value: Any) -> str:
    """The properties of a number that Triton compiles for: its type, whether it is 1 or a multiple of 16."""
    return "1" if value == 1 else f"{type(value).__name__}{isinstance(value, int) and value % 16 == 0}"


# --- compilation -------------------------------------------------------------------------------------------


class Driver:
    """The part of Triton's driver that compiling needs, for a GPU that is not in this machine."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target  # Triton stores kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(job: Launch) -> cuda_resources.Usage:
    """Compile to machine code and read its registers and memory."""
    triton.runtime.driver.set_active(Driver(job.target))
    compiled = job.kernel.warmup(*job.arguments, grid=(1,), **job.constants, **job.config.all_kwargs())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, _, taken),) = cuda_resources.of_file(Path(file.name))
    return cuda_resources.Usage(taken.registers, taken.spilled, compiled.metadata.shared)


_jobs: list[Launch] = []  # forked workers inherit them, as kernels cannot be pickled


def _usage_of(index: int) -> cuda_resources.Usage:
    return usage(_jobs[index])


def compile_all(targets: tuple[int, ...], workers: int) -> list[tuple[Launch, cuda_resources.Usage]]:
    """Every kernel in every configuration, dtype and call, for GPUs of these compute capabilities.

    Raises:
        RuntimeError: Triton's interpreter is on, so that there is nothing to compile.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    _jobs[:] = launches(targets)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(zip(_jobs, pool.map(_usage_of, range(len(_jobs))), strict=True))
