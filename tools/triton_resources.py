"""What the Triton kernels take of a GPU, compiled without one.

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


def _unit(
    name: str, new: Callable[..., Tensor], weight: Tensor, source: tuple[int, int, int], activation: str | None,
    geometry: tuple[int, int, int],
) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:  # fmt: skip
    """A training unit and its gradients; ``source`` has branches, height and channels."""
    branches, size, channels = source
    x = new(branches, 8, size, size, channels)
    y = new(weight.shape[0], 8, size, size, weight.shape[1])
    above, vector = (_tensor(t.shape[0], t.shape[4], dtype=torch.float32) for t in (y, x))
    normal = (*(None if activation is None else vector for _ in range(3)), activation or "none")
    grads = (y, above, above, y, above)
    yield getattr(_OPS, f"triton_{name}"), (x, weight, *normal, *geometry)
    yield getattr(_OPS, f"triton_{name}_backward"), (*grads, weight, x, *normal, *geometry, True, True)


def _calls(dtype: torch.dtype) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every op as the two architectures use it; 24 channels stand for the counts that 16 does not divide."""

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

    # Training: a stem that reads the image as it is, a branching 1x1 and a 3x3 that normalise what they read.
    yield from _unit("branch_conv2d_stats", new, new(1, 16, 3, 3, 3), (1, 16, 3), None, (1, 1, 1))
    yield from _unit("branch_conv2d_stats", new, new(8, 64, 128, 1, 1), (4, 16, 128), "relu", (1, 0, 2))
    yield from _unit("branch_conv2d_stats", new, new(2, 144, 24, 1, 1), (2, 16, 24), "none", (1, 0, 1))
    yield from _unit("branch_depthwise_conv2d_stats", new, new(4, 64, 3, 3), (4, 16, 64), "relu6", (1, 1, 1))
    x = new(4, 8, 16, 16, 64)
    gain = _tensor(4, 64, dtype=torch.float32)
    for activation, added in (("relu", x), ("none", None)):
        yield _OPS.triton_branch_normalize, (x, gain, gain, gain, added, activation)
        yield _OPS.triton_branch_normalize_backward, (x, x, x, gain, gain, activation)
    for models, classes in ((16, 100), (8, 1000), (100, 100)):
        logits, target = new(models, 8, classes), _tensor(8, dtype=torch.int64)
        sizes = default_sizes(models)
        yield _OPS.triton_prefix_mean, (logits, sizes)
        yield _OPS.triton_prefix_mean_backward, (logits[: len(sizes)], sizes, models)
        yield _OPS.triton_hierarchical_distillation_loss, (logits, target, 0.5, 2.0)


@dataclass(frozen=True)
class Launch:
    """What a kernel is compiled for: types and alignments of its arguments, and its constants."""

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
        """The constants and the configuration, readable."""
        constants = " ".join(f"{name.lower()}={value}" for name, value in self.constants.items() if name != "ENDS")
        blocks = "x".join(str(size) for size in self.config.kwargs.values())
        return f"{constants} tile={blocks} warps={self.config.num_warps} stages={self.config.num_stages}".strip()


def launches(targets: tuple[int, ...]) -> list[Launch]:
    """All kernels in all configurations, dtypes and uses, each once."""
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
    """What Triton distinguishes in a number: its type, one, multiples of 16."""
    return "1" if value == 1 else f"{type(value).__name__}{isinstance(value, int) and value % 16 == 0}"


# --- compilation -------------------------------------------------------------------------------------------


class Driver:
    """The part of Triton's driver that compiling needs, for a GPU that is not here."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(job: Launch) -> cuda_resources.Usage:
    """Compile down to machine code and look at it."""
    triton.runtime.driver.set_active(Driver(job.target))
    compiled = job.kernel.warmup(*job.arguments, grid=(1,), **job.constants, **job.config.all_kwargs())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, _, taken),) = cuda_resources.of_file(Path(file.name))
    return cuda_resources.Usage(taken.registers, taken.spilled, compiled.metadata.shared)


_jobs: list[Launch] = []  # in the parent; its forked workers have them too, as kernels cannot be pickled


def _usage_of(index: int) -> cuda_resources.Usage:
    return usage(_jobs[index])


def compile_all(targets: tuple[int, ...], workers: int) -> list[tuple[Launch, cuda_resources.Usage]]:
    """Every kernel in every configuration, dtype and use, for GPUs of these compute capabilities.

    Raises:
        RuntimeError: Triton's interpreter is on, which leaves nothing to compile.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    _jobs[:] = launches(targets)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        return list(zip(_jobs, pool.map(_usage_of, range(len(_jobs))), strict=True))
