"""Compiles the Triton kernels without a GPU: to machine code, with its registers and memory, or to Triton's IR.

Ops are called with tensors that have a shape and no memory, in every dtype; a launch is recorded instead of running.
Machine code is compiled of the layers of the networks, in every configuration. Triton's IR is compiled of every case of
the parity suite, which takes a hundredth of the time and finds errors in the code of a kernel. The interpreter finds
none that depend on what Triton specialises a kernel for: an argument of 1 is a constant to the compiler.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import cuda_resources
import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor

import hne_kernels
from hne_kernels import default_sizes, dispatch, pack_weight
from hne_kernels.triton import launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_OPS = torch.ops.hne
_HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"


# --- calls -------------------------------------------------------------------------------------------------


def _label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm_conv(
    new: Callable[..., Tensor], weight: Tensor, source: tuple[int, int, int], activation: str | None,
    geometry: tuple[int, int, int], *, stored: bool = False,
) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:  # fmt: skip
    """A convolution between two batch norms and its gradients; ``source`` is (branches, height, channels).

    With ``stored``, its normalised input is stored, and includes a shortcut that is normalised, too.
    """
    branches, size, channels = source
    x = new(branches, 8, size, size, channels)
    y = new(weight.shape[0], 8, size, size, weight.shape[1])
    vector = _tensor(y.shape[0], y.shape[4], dtype=torch.float32)
    norm = None if activation is None else _tensor(3, branches, channels, dtype=torch.float32)
    shortcut = (x, norm) if stored else (None, None)
    z = x if stored else None
    options = (*shortcut, activation or "none", *geometry)
    yield _OPS.triton_branch_norm_conv2d, (x, weight, norm, *options, stored)
    grads = (y, vector, vector, z, y, vector, z)
    yield _OPS.triton_branch_norm_conv2d_backward, (*grads, x, weight, norm, *options, stored, True, True)


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

    # Bottlenecks of Table 2, with the branching shortcut and plain, and wide inverted residuals.
    def bottleneck(branches: int, channels: int, middle: int, outputs: int) -> tuple[Tensor, ...]:
        expand, project = pointwise(branches, middle, channels), pointwise(branches, outputs, middle)
        return (*expand, new(branches, 3, 3, middle), new(branches, middle), *project)

    for size, channels, middle, branches in ((32, 64, 16, 2), (16, 128, 32, 4), (8, 256, 64, 8)):
        plain = (*bottleneck(branches, channels, middle, channels), None, None)
        yield _OPS.triton_fused_bottleneck, (new(branches, 8, size, size, channels), *plain, 1, 1, "relu", True, "relu")
    branching = (*bottleneck(8, 128, 64, 256), *pointwise(8, 256, 128))
    yield _OPS.triton_fused_bottleneck, (new(4, 8, 16, 16, 128), *branching, 2, 2, "relu", False, "relu")
    for channels, outputs, stride in ((72, 120, 2), (120, 120, 1)):
        inverted = (*bottleneck(8, channels, 6 * channels, outputs), None, None)
        yield (
            _OPS.triton_fused_bottleneck,
            (new(8, 8, 14, 14, channels), *inverted, stride, 1, "relu6", stride == 1, "none"),
        )

    # A grey image's stem and a head with one class, with their gradients: an argument of 1 is a constant.
    for in_channels, out_channels, size in ((1, 16, 3), (16, 1, 1), (1, 1, 3)):
        x, grad = new(2, 8, 16, 16, in_channels), new(2, 8, 16, 16, out_channels)
        weight = new(2, out_channels, in_channels, size, size)
        yield _OPS.triton_branch_conv2d, (x, weight, None, 1, size // 2, 1)
        yield _OPS.triton_branch_conv2d_backward_input, (grad, weight, 16, 16, 1, size // 2, 1)
        yield _OPS.triton_branch_conv2d_backward_weight, (grad, x, size, 1, size // 2, 1)
        yield from _norm_conv(new, weight, (2, 16, in_channels), "relu", (1, size // 2, 1))

    # Training: a stem that reads the image as it is; branching 1x1 and 3x3 convolutions that normalise their input.
    yield from _norm_conv(new, new(1, 16, 3, 3, 3), (1, 16, 3), None, (1, 1, 1))
    yield from _norm_conv(new, new(8, 64, 128, 1, 1), (4, 16, 128), "relu", (1, 0, 2))
    yield from _norm_conv(new, new(2, 144, 24, 1, 1), (2, 16, 24), "none", (1, 0, 1))
    yield from _norm_conv(new, new(4, 64, 256, 1, 1), (4, 16, 256), "relu", (1, 0, 1), stored=True)
    yield from _norm_conv(new, new(4, 64, 3, 3), (4, 16, 64), "relu6", (1, 1, 1))
    x = new(4, 8, 16, 16, 64)
    norm = _tensor(3, 4, 64, dtype=torch.float32)
    for activation, added, added_norm in (("relu", x, None), ("none", None, None), ("relu", x, norm)):
        options = (added, added_norm, activation)
        yield _OPS.triton_branch_normalize, (x, norm, *options)
        yield _OPS.triton_branch_normalize_backward, (x, x, x, norm, *options, added is not None)
    rows = [new(4 * 64) for _ in range(4)]
    batches = _tensor(1, dtype=torch.int64)
    for parameters in ((*rows, batches), (None,) * 5):
        yield _OPS.triton_batch_norm_scale_shift, (norm[0], norm[1], *parameters, None, 2048, 0.1, 1e-5)
        yield _OPS.triton_batch_norm_scale_shift_backward, (norm, norm[1], parameters[0], True, 1e-5)
    for models, classes in ((16, 100), (8, 1000), (100, 100)):
        logits, target = new(models, 8, classes), _tensor(8, dtype=torch.int64)
        sizes = default_sizes(models)
        yield _OPS.triton_prefix_mean, (logits, sizes)
        yield _OPS.triton_prefix_mean_backward, (logits[: len(sizes)], sizes, models)
        yield _OPS.triton_hierarchical_distillation_loss, (logits, target, 0.5, 2.0)


@contextlib.contextmanager
def _served_by_triton() -> Iterator[None]:
    """The public functions call the Triton kernels for tensors without memory, which no backend serves."""
    with (
        mock.patch.dict(dispatch._UNUSABLE, triton=None),
        mock.patch.dict(dispatch._DEVICES, triton=("meta",)),
        mock.patch.dict(dispatch._MODULES, triton=importlib.import_module("hne_kernels.triton")),
        hne_kernels.use_backend("triton"),
    ):
        yield


def _differentiate(case: Any, inputs: dict[str, Any]) -> None:
    """Call the op of a case of the parity suite and its gradients, with tensors that have no memory."""
    inputs = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for name in case.differentiable:
        inputs[name].requires_grad_()
    results = [result for result in case(inputs) if result.requires_grad]
    if results:
        grads = [torch.empty_like(result) for result in results]
        torch.autograd.grad(results, [inputs[name] for name in case.differentiable], grads)


# --- launches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The types, alignments and constants that a kernel is compiled for."""

    kernel: Any
    config: triton.Config
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    dtype: str
    target: int
    call: str  # the op, or the case of the parity suite

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}{self.kernel.__name__}"

    @property
    def options(self) -> str:
        """The constants and the configuration as text."""
        constants = " ".join(f"{name.lower()}={value}" for name, value in self.constants.items() if name != "ENDS")
        blocks = "x".join(str(size) for size in self.config.kwargs.values())
        return f"{constants} tile={blocks} warps={self.config.num_warps} stages={self.config.num_stages}".strip()

    def warmup(self) -> Any:
        """Compile to machine code."""
        triton.runtime.driver.set_active(Driver(self.target))
        return self.kernel.warmup(*self.arguments, grid=(1,), **self.constants, **self.config.all_kwargs())

    def specialization(self) -> dict[str, Any]:
        """Triton's ``signature``, ``constants`` and attributes (``configs``) of the kernel, and a ``key`` of them."""
        found: dict[str, Any] = {}

        def keep(*, compile: dict[str, Any], **_: Any) -> bool:
            found.update(compile)
            return True  # not to be compiled

        with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", keep):
            self.warmup()
        return found


class Recorder:
    """Keeps one launch of each specialisation of each kernel, instead of running any."""

    def __init__(self, targets: tuple[int, ...], all_configs: bool) -> None:
        self.targets, self.all_configs = targets, all_configs
        self.found: dict[Any, Launch] = {}
        self.dtype, self.call = "", ""

    def __enter__(self) -> Recorder:
        def record(kernel: launch.Kernel, *arguments: Any, **constants: Any) -> None:
            self._record(kernel, arguments, constants)

        self._patch = mock.patch.object(launch.Kernel, "__call__", record)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()

    def _record(self, kernel: launch.Kernel, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        mocked = tuple(MockTensor(a.dtype, a.shape) if isinstance(a, Tensor) else a for a in arguments)
        for target in self.targets:
            for config in kernel.configs if self.all_configs else kernel.configs[:1]:
                new = Launch(kernel.kernel, config, mocked, constants, self.dtype, target, self.call)
                self.found.setdefault((new.name, target, str(new.specialization()["key"])), new)


def network_launches(targets: tuple[int, ...]) -> list[Launch]:
    """All kernels in all configurations and dtypes, as the layers of the networks launch them."""
    with Recorder(targets, all_configs=True) as recorder:
        precision = torch.backends.cuda.matmul.fp32_precision
        for label, dtype in (*((_label(dtype), dtype) for dtype in DTYPES), ("tf32", torch.float32)):
            torch.backends.cuda.matmul.fp32_precision = "tf32" if label == "tf32" else precision
            for op, arguments in _calls(dtype):
                recorder.dtype, recorder.call = label, op.__name__
                op(*arguments)
        torch.backends.cuda.matmul.fp32_precision = precision
    return list(recorder.found.values())


def parity_launches(
    target: int, cases: Sequence[Any] | None = None, dtypes: Sequence[torch.dtype] = DTYPES
) -> list[Launch]:
    """All kernels, in the first configuration, as the cases of the parity suite launch them, forward and backward.

    Args:
        target: compute capability of the GPU, times 10.
        cases: cases of tests/helpers; all by default.
        dtypes: of the features.
    """
    if cases is None:
        sys.path.append(str(_HELPERS))
        cases = importlib.import_module("cases").CASES
    rng = torch.Generator().manual_seed(0)
    with _served_by_triton(), Recorder((target,), all_configs=False) as recorder:
        for dtype in dtypes:
            for case in cases:
                recorder.dtype, recorder.call = _label(dtype), str(case)
                _differentiate(case, case.inputs(rng, dtype))
    return list(recorder.found.values())


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
    compiled = job.warmup()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, _, taken),) = cuda_resources.of_file(Path(file.name))
    return cuda_resources.Usage(taken.registers, taken.spilled, compiled.metadata.shared)


def to_ir(job: Launch, **constants: int) -> None:
    """Compile to Triton's IR.

    Args:
        job: the launch.
        constants: arguments that become constants, as torch.compile makes of all that are 1, even where the kernel
            asks Triton not to.
    """
    found, names = job.specialization(), job.kernel.arg_names
    signature = found["signature"] | dict.fromkeys(constants, "constexpr")
    values = found["constants"] | {(names.index(name),): value for name, value in constants.items()}
    attributes = {path: value for path, value in found["configs"][0].items() if names[path[0]] not in constants}
    source = ASTSource(job.kernel, signature, values, attributes)
    target = GPUTarget("cuda", job.target, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({"num_warps": job.config.num_warps, "num_stages": job.config.num_stages})
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    stages: dict[str, Callable[..., Any]] = {}
    backend.add_stages(stages, options, source.language)
    stages["ttir"](module, {})


_jobs: list[Launch] = []  # forked workers inherit them, as kernels cannot be pickled


def _attempt(compile: Callable[[Launch], Any], index: int) -> Any:
    """The result of ``compile``, or the error as one line."""
    try:
        return compile(_jobs[index])
    except Exception as error:
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[-1]}"


def compile_all(compile: Callable[[Launch], Any], jobs: list[Launch], workers: int) -> list[tuple[Launch, Any]]:
    """Each launch with the result of ``compile`` (:func:`usage` or :func:`to_ir`), or with an error as text.

    Raises:
        RuntimeError: Triton's interpreter is on, so that there is nothing to compile.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    _jobs[:] = jobs
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        results = pool.map(functools.partial(_attempt, compile), range(len(jobs)), chunksize=4)
        return list(zip(jobs, results, strict=True))
