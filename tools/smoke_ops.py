"""Rows of the smoke table for ops: is each op right, how fast is it, and how close is that to a copy?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from typing import Any

import torch
from cases import (
    Bottleneck,
    Case,
    Geometry,
    Inputs,
    bottleneck,
    convolution,
    cotangents,
    evaluate,
    expected,
    fused_convolution,
    loss,
    norm_conv,
    prefix_logits,
    prefix_mean,
    representative,
    tensors,
)
from meters import GpuMeter, HostMeter, Meter, Side
from norm_cases import normalize, pointwise_norm_conv, pointwise_stats
from rows import Cells, Row
from torch import Tensor

import hne_kernels as K

# Largest relative error that rounding explains: of float32 sums, and of operands with 11 and 8 significant bits.
LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
BATCH = 2  # of the comparison with float64, which runs on the CPU
_BATCH_DIM = {"x": 1, "residual": 1, "logits": 1, "features": 1, "target": 0}


@dataclass(frozen=True)
class Bench:
    """Where rows are computed, and how they are timed."""

    device: str
    batch: int  # of the timed calls, a multiple of BATCH
    meter: Meter
    seconds: float  # spent on one time
    bytes_per_s: float = inf  # speed of a large copy, bytes read and written

    @classmethod
    def on(cls, device: str, bytes_per_s: float = inf) -> Bench:
        if device == "cuda":
            return cls(device, 128, GpuMeter(torch.device("cuda")), 0.05, bytes_per_s)
        return cls(device, BATCH, HostMeter(), 0.0, bytes_per_s)

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"

    def milliseconds(self, side: Side, *, graphed: bool = True) -> float:
        """Median time of a call; graphed, without the time of its launch from Python."""
        with self.meter.running():
            ready = self.meter.prepare(side) if graphed else side
            once = self.meter.seconds(ready, 1)
            turns = max(3, min(100, round(self.seconds / max(once, 1e-6))))
            return median(self.meter.seconds(ready, 1) for _ in range(turns)) * 1e3


def geometry(G: int, r: int, size: int, ci: int, co: int, k: int = 1, stride: int = 1) -> Geometry:
    return Geometry(G, r, BATCH, size, size, ci, co, k, stride, k // 2)


# Layers of HNE-ResNet, then shapes at the edge of what kernels assume: one channel, odd sizes.
DENSE = {
    "stem": geometry(1, 1, 32, 3, 16, 3),
    "block 1, expand": geometry(1, 2, 32, 64, 16),
    "block 2, project": geometry(4, 1, 16, 32, 128),
    "block 3, shortcut": geometry(4, 2, 16, 128, 256, 1, 2),
    "block 4, expand": geometry(16, 1, 8, 256, 64),
    "block 4, project": geometry(16, 1, 8, 64, 256),
    "grey stem": geometry(1, 1, 28, 1, 16, 3),
    "one output channel": geometry(2, 2, 7, 5, 1),
    "odd": geometry(3, 1, 7, 13, 17, 5, 2),
}
DEPTHWISE = {
    "block 1": geometry(2, 1, 32, 16, 16, 3),
    "block 2, first": geometry(4, 1, 32, 32, 32, 3, 2),
    "block 4": geometry(16, 1, 8, 64, 64, 3),
    "one channel": geometry(2, 1, 9, 1, 1, 3),
    "odd": geometry(3, 2, 7, 13, 13, 5, 2),
}
FUSED = ("stem", "grey stem", "one output channel", "odd")
BOTTLENECKS = {
    "block 1, first": Bottleneck(1, 2, BATCH, 32, 32, 64, 16, 64, 3, 1, "shortcut", "relu", "relu"),
    "block 2": Bottleneck(4, 1, BATCH, 16, 16, 128, 32, 128, 3, 1, "identity", "relu", "relu"),
    "block 3, first": Bottleneck(4, 2, BATCH, 16, 16, 128, 64, 256, 3, 2, "shortcut", "relu", "relu"),
    "block 4": Bottleneck(16, 1, BATCH, 8, 8, 256, 64, 256, 3, 1, "identity", "relu", "relu"),
    "one channel": Bottleneck(2, 1, BATCH, 7, 7, 1, 1, 1, 3, 1, "identity", "relu", "relu"),
    "odd": Bottleneck(3, 2, BATCH, 7, 7, 13, 5, 17, 5, 2, "shortcut", "relu6", "none"),
}
FEATURES = {"block 2": (4, BATCH, 16, 16, 32), "one channel": (2, BATCH, 7, 7, 1), "odd": (3, BATCH, 7, 5, 13)}
HEADS = {"CIFAR-100": (16, BATCH, 256, 100), "ImageNet": (8, BATCH, 1280, 1000), "odd": (3, BATCH, 17, 7)}


def cases() -> Iterator[tuple[str, Case]]:
    """Every op at these shapes, with the name of the layer."""
    for layer, shape in DENSE.items():
        yield layer, convolution("branch_conv2d", shape, "odd" in layer)
    for layer, shape in DEPTHWISE.items():
        yield layer, convolution("branch_depthwise_conv2d", shape, "odd" in layer)
    for layer in FUSED:
        yield layer, fused_convolution(DENSE[layer], "relu")
    for layer, block in BOTTLENECKS.items():
        yield layer, bottleneck(block)
    for layer, shape in DENSE.items():
        yield layer, norm_conv(shape, None if "stem" in layer else "relu")
    for layer, shape in DEPTHWISE.items():
        yield layer, norm_conv(shape, "relu", depthwise=True)
    for layer, features in FEATURES.items():
        wide = 4 * features[-1]
        yield layer, pointwise_stats(features, wide, "relu")
        yield layer, pointwise_norm_conv(features, wide, features[-1], ("relu", "relu"), "plain")
        yield layer, normalize((*features[:-1], wide), "relu", "plain")
    for layer, (models, batch, channels, classes) in HEADS.items():
        yield layer, prefix_mean(models, batch, classes, None)
        yield layer, prefix_logits(models, batch, channels, classes, None, True)
        yield layer, loss(models, batch, classes, 0.5, 2.0)


def op_rows(bench: Bench, backend: str, dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """A row for every op, shape and dtype; in a rehearsal, for the odd shapes alone."""
    for dtype in dtypes:
        for layer, case in cases():
            if layer == "odd" or not bench.is_rehearsal:
                name = row_name(backend, dtype, case, layer)
                yield Row(name, f"{backend} {case.label}", partial(op_cells, bench, backend, case, dtype))


def row_name(backend: str, dtype: torch.dtype, case: Case, layer: str) -> str:
    return f"{backend} {str(dtype).removeprefix('torch.')} {case.label}: {layer}"


def memory_rows(bench: Bench, backend: str) -> Iterator[Row]:
    """A small case of every op without timing, to run under a memory checker."""
    for dtype in (torch.bfloat16, torch.float32):
        for case in representative():
            name = f"{backend} {str(dtype).removeprefix('torch.')} {case.label}"
            yield Row(name, f"{backend} {case.label}", partial(_compared, bench, backend, case, dtype), seconds=120)


def op_cells(bench: Bench, backend: str, case: Case, dtype: torch.dtype) -> Cells:
    """Errors of a small batch, times of a large one."""
    cells = _compared(bench, backend, case, dtype)
    try:
        return cells | _timed(bench, backend, case, dtype)
    except Exception as error:  # the errors are known, and stay
        raise type(error)(f"while timed, after {cells}: {error}") from error


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|``, in Euclidean norm."""
    exact = exact.detach().double().cpu()
    difference = torch.linalg.vector_norm(actual.detach().double().cpu() - exact)
    return (difference / torch.linalg.vector_norm(exact).clamp_min(1e-30)).item()


def judged(errors: dict[str, float], limit: float) -> Cells:
    """Cells of errors; the row is wrong if one exceeds the limit or is NaN."""
    beyond = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= limit]
    gradients = [error for name, error in errors.items() if name.startswith("gradient")]
    results = [error for name, error in errors.items() if not name.startswith("gradient")]
    cells: Cells = {}
    if results:
        cells["error"] = f"{_largest(results):.1e}"
    if gradients:
        cells["gradient error"] = f"{_largest(gradients):.1e}"
    if beyond:
        cells |= {"result": "WRONG", "note": f"{'; '.join(beyond)}; at most {limit:g} is rounding"}
    return cells


def _largest(errors: Sequence[float]) -> float:
    return max(errors, key=lambda error: inf if error != error else error)


def _compared(bench: Bench, backend: str, case: Case, dtype: torch.dtype) -> Cells:
    """Compare with the reference in float64: poisoned outputs at the first configuration, then as tuned."""
    rng = torch.Generator()
    rng.seed()
    inputs = case.inputs(rng, dtype, bench.device)
    exact = {name: value.double().cpu() if _is_floating(value) else _on_cpu(value) for name, value in inputs.items()}
    grads = cotangents(case, exact, rng) if case.differentiable else []
    grads = [grad.to(bench.device, dtype) for grad in grads]
    want = expected(case, {name: _on_cpu(value) for name, value in inputs.items()}, [grad.cpu() for grad in grads])
    errors: dict[str, float] = {}
    for poisoned in (True, False):
        with K.use_backend(backend), _poisoned_outputs(poisoned):
            got = evaluate(case, inputs, grads)
        for (name, actual), (_, value) in zip(got.items(), want.items(), strict=True):
            errors[name] = _largest([errors.get(name, 0.0), relative_error(actual, value)])
    return judged(errors, LIMITS[dtype])


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _poisoned_outputs(wanted: bool) -> Iterator[None]:
    """Fill new memory with NaN. PyTorch does so for deterministic algorithms, for which kernels are not tuned."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _timed(bench: Bench, backend: str, case: Case, dtype: torch.dtype) -> Cells:
    rng = torch.Generator()
    rng.seed()
    inputs = repeated(case.inputs(rng, dtype, bench.device), bench.batch // BATCH)
    with K.use_backend(backend):
        with torch.no_grad():
            results = case(inputs)
            forward = bench.milliseconds(lambda: case(inputs))
        moved = sum(tensor.nbytes for tensor in [*tensors(inputs).values(), *results])
        share = moved / bench.bytes_per_s / (forward / 1e3)
        cells: Cells = {"ms": f"{forward:.4f}", "of copy": f"{share:.0%}" if bench.bytes_per_s < inf else ""}
        if case.differentiable:
            cells["backward ms"] = f"{_backward_ms(bench, case, inputs):.4f}"
    return cells


def _backward_ms(bench: Bench, case: Case, inputs: Inputs) -> float:
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    # A backward pass runs on the stream of its forward pass, so the meter's stream computes both.
    with bench.meter.running():
        reached = [result for result in case({**inputs, **leaves}) if result.requires_grad]
        grads = [torch.randn_like(result) for result in reached]
    return bench.milliseconds(lambda: torch.autograd.grad(reached, list(leaves.values()), grads, retain_graph=True))


def repeated(inputs: Inputs, times: int) -> Inputs:
    """The same inputs for a larger batch. Copies of images take as long as new ones."""

    def larger(name: str, value: Any) -> Any:
        if name not in _BATCH_DIM or not isinstance(value, Tensor):
            return value
        dims = [1] * value.dim()
        dims[_BATCH_DIM[name]] = times
        return value.repeat(dims)

    return {name: larger(name, value) for name, value in inputs.items()}
