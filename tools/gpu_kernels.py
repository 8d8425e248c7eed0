"""``make kernels`` prints the registers and memory of every GPU kernel, Triton's and CUDA's. It needs no GPU.

A kernel fails if it does not compile, spills registers to memory or needs more shared memory than a block may have. The
compiler does not know the shared memory that the launch of a CUDA kernel adds; the host code limits it, and the
emulation in the tests has as much of it as the smallest GPU.

The Triton kernels of every case of the parity suite are compiled as well, to Triton's IR; only failures have a row.

Where there is a CUDA library, the lint of its machine code follows (:mod:`kernel_lint`), and the predicted time of the
networks (:mod:`cost_model`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cost_model
import cost_table
import cuda_resources
import kernel_lint
import machine_code
import triton_resources
from block_trace import Unsupported
from cost_launches import CALLS, FOLDER
from cost_prediction import Calibration, MissingKernel, Prediction

import hne_kernels

# Shared memory that a block may ask for, in bytes (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel, compiled for one kind of GPU."""

    backend: str
    target: str
    kernel: str
    usage: cuda_resources.Usage | str  # or the error of the compilation

    @property
    def failure(self) -> str:
        """Why it cannot be used, or an empty text."""
        if isinstance(self.usage, str):
            return f"FAILED: {self.usage}"
        limit = SHARED_LIMIT[int(self.target.removeprefix("sm_").rstrip("a"))]
        if self.usage.spilled:
            return "FAILED: spills"
        return f"FAILED: more than {limit} bytes of shared memory" if self.usage.shared > limit else ""


def of_triton(workers: int) -> Iterator[CompiledKernel]:
    jobs = triton_resources.network_launches(tuple(SHARED_LIMIT))
    for job, usage in triton_resources.compile_all(triton_resources.usage, jobs, workers):
        yield CompiledKernel("triton", f"sm_{job.target}", f"{job.name} {job.dtype} {job.options}", usage)


def of_parity_suite(workers: int) -> tuple[int, list[CompiledKernel]]:
    """The number of specialisations of Triton kernels in the cases of the parity suite, and those that fail."""
    target = max(SHARED_LIMIT)
    jobs = triton_resources.parity_launches(target)
    failed = []
    for job, error in triton_resources.compile_all(triton_resources.to_ir, jobs, workers):
        if error is not None:
            failed.append(CompiledKernel("triton", f"sm_{target}", f"{job.name} {job.dtype} in {job.call}", error))
    return len(jobs), failed


def of_cuda(library: Path) -> Iterator[CompiledKernel]:
    found = cuda_resources.of_file(library)
    names = cuda_resources.readable([kernel for _, kernel, _ in found])
    for (target, _, usage), name in zip(found, names, strict=True):
        yield CompiledKernel("cuda", target, name, usage)


def table(rows: list[CompiledKernel]) -> list[str]:
    """One line per kernel, failures last."""
    lines = [f"{'backend':7}  {'target':6}  {'registers':>9}  {'spilled':>7}  {'shared':>6}  kernel"]
    for row in sorted(rows, key=lambda row: (bool(row.failure), row.backend, row.kernel, row.target)):
        used = f"{'-':>9}  {'-':>7}  {'-':>6}"
        if isinstance(row.usage, cuda_resources.Usage):
            used = f"{row.usage.registers:9}  {row.usage.spilled:7}  {row.usage.shared:6}"
        lines.append(f"{row.backend:7}  {row.target:6}  {used}  {row.kernel}  {row.failure}".rstrip())
    return lines


def networks(library: Path) -> list[str]:
    """Print the predicted time of the networks' kernels; return the failures of the lint and of the model."""
    functions = machine_code.load([library], cost_model.TARGET, FOLDER / "machine_code")
    if not functions:
        print(f"no lint and no prediction: the library has no machine code for {cost_model.TARGET}")
        return []
    calibration, calls = Calibration.load(), list[list[Prediction]]()
    failures = []
    try:
        for call, launches in cost_model.predictions(CALLS, [library], calibration):
            calls.append(launches)
            print(*cost_table.table(call, launches, calibration), "", sep="\n", flush=True)
        print(cost_table.LEGEND)
    except (MissingKernel, Unsupported, RuntimeError) as error:
        failures.append(f"cost model: {error}")
    return failures + kernel_lint.lint(functions, kernel_lint.load(), calls)


def main() -> int:
    workers = len(os.sched_getaffinity(0))
    cases, failed = of_parity_suite(workers)
    rows = [*of_triton(workers), *failed]
    library = next(Path(hne_kernels.__file__).parent.glob("_C_cuda*.so"), None)
    if library is not None:
        rows += of_cuda(library)
    print(*table(rows), sep="\n")
    print(f"parity suite: {cases} specialisations of Triton kernels compiled to IR, {len(failed)} failed")
    if library is None:
        print(f"Triton's kernels only: no CUDA library, as {hne_kernels.build_info()['without_cuda']}")
    failures = sum(bool(row.failure) for row in rows)
    print(f"{len(rows)} kernels, {failures} failed\n")
    faults = [] if library is None else networks(library)
    print(*(f"FAILED: {fault}" for fault in faults), sep="\n")
    return min(failures + len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
