"""Steps of the smoke table, and of the memory checker: each runs one stage of ``gpu_smoke.py``."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial

from gpu_machine import GPU_BACKENDS, REHEARSAL_BACKENDS, GpuCheck
from predicted_rows import CALIBRATION, calibration
from row_runner import RowRunner
from rows import Cells
from timed_steps import Failure, Skipped


def rates(check: GpuCheck) -> str:
    """measure the speed of a large copy and of a large matrix product"""

    def write(name: str, cells: Cells) -> None:
        check.write_row("rates", name, cells)
        if "bytes/s" in cells:
            check.bytes_per_s = max(check.bytes_per_s or 0.0, cells["bytes/s"])

    return RowRunner(check, _worker(check, "rates"), write).run()


def ops(position: int) -> Callable[[GpuCheck], str]:
    """The step of all ops on the backend at this position."""

    def step(check: GpuCheck) -> str:
        return _table(check, "ops", position)

    step.__doc__ = f"{GPU_BACKENDS[position]}: every op, dtype and shape: errors, times, share of the copy speed"
    return step


def networks(position: int) -> Callable[[GpuCheck], str]:
    """The step of the network on the backend at this position."""

    def step(check: GpuCheck) -> str:
        return _table(check, "networks", position)

    step.__doc__ = f"{GPU_BACKENDS[position]}: the network: errors, inference at batch 128 and 1, a training step"
    return step


def eager(check: GpuCheck) -> str:
    """time the network in plain channels-last PyTorch"""
    return _table(check, "eager")


def compiled(check: GpuCheck) -> str:
    """time it under torch.compile"""
    return _table(check, "compiled")


def calibrate(check: GpuCheck) -> str:
    """compare the cost model's predictions with the measured rows, and write gpu_calibration.json"""
    if not check.predictions.rows:
        raise Skipped(check.predictions.note)
    source = f"calibrated on {check.machine['gpu'] or 'no GPU'}"
    found = calibration(check.rows, check.predictions, source)
    if found is None:
        raise Skipped("no measured row has a prediction")
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    (check.results / CALIBRATION.name).write_text(text)
    if check.device == "cuda" and not check.predictions.note:
        CALIBRATION.write_text(text)
    worst = max(found["kernels"].items(), key=lambda pair: pair[1], default=("", 1.0))
    return (
        f"measured over predicted time: median {found['everything']:.2f}"
        + (f", most of {worst[0]} {worst[1]:.2f}" if worst[0] else "")
        + (f"; {check.predictions.note}" if check.predictions.note else "")
    )


def memcheck(check: GpuCheck) -> str:
    """look for accesses outside of tensors in a small case of every op, both backends"""
    return _sanitizer(check, "memcheck")


def racecheck(check: GpuCheck) -> str:
    """look for races in shared memory in the same cases"""
    if check.device == "cpu":
        raise Skipped("a rehearsal runs the cases once, in memcheck")
    return _sanitizer(check, "racecheck")


def _backend(check: GpuCheck, position: int) -> str:
    """The backend at this position, if it is usable."""
    backend = (GPU_BACKENDS if check.device == "cuda" else REHEARSAL_BACKENDS)[position]
    if backend not in check.backends:
        raise Skipped(f"the backend {backend} is not available")
    return backend


def _worker(check: GpuCheck, stage: str, backend: str | None = None) -> list[str]:
    command = [sys.executable, "tools/gpu_smoke.py", "--device", check.device, "--stage", stage]
    command += ["--backend", backend] if backend else []
    command += ["--bytes-per-s", str(check.bytes_per_s)] if check.bytes_per_s else []
    return [*command, *(["--faults"] if check.faults and stage == "ops" else [])]


def _table(check: GpuCheck, stage: str, position: int | None = None) -> str:
    backend = None if position is None else _backend(check, position)
    step = stage if backend is None else f"{backend}-{stage}"
    return RowRunner(check, _worker(check, stage, backend), partial(check.write_row, step)).run()


def _sanitizer(check: GpuCheck, tool: str) -> str:
    """Run the stage ``memory`` of each backend under a tool of compute-sanitizer."""
    prefix: list[str] = []
    if check.device == "cuda":
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise Skipped("compute-sanitizer is not on the PATH")
        prefix = [program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "application-only"]
    notes, failed = [], False
    for backend in check.backends:
        # The process runs kernels of PyTorch, too. Triton's kernels have no common name.
        chosen = ["--kernel-regex", "kns=hne"] if prefix and backend == "cuda" else []
        runner = RowRunner(
            check,
            [*prefix, *chosen, *_worker(check, "memory", backend)],
            partial(check.write_row, f"{tool}-{backend}"),
            # Without torch's cache every tensor is a separate allocation, so that accesses outside of it are found.
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        try:
            notes.append(f"{backend}: {runner.run()}")
        except Failure as failure:
            if "Device not supported" in check.log.read_text(errors="replace"):
                raise Skipped("compute-sanitizer does not support this device") from None
            notes.append(f"{backend}: {failure}")
            failed = True
    if failed:
        raise Failure("; ".join(notes))
    return "; ".join(notes)
