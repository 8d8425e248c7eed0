"""The step of hardware counters: what the kernels that matter most do, as the GPU itself counts it."""

from __future__ import annotations

import csv
import io
import shutil
import sys

from gpu_machine import GpuCheck
from rows import Cells
from timed_steps import Failure, RanOut, Skipped

# Nsight Compute's names, with those of the table.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "memory",
    "lts__t_bytes.sum": "cache",
    "smsp__inst_executed.sum": "instructions",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots used",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor cores",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "shared memory conflicts",
}
_LAUNCHES = 2  # of each kernel

# A call of each network path, so that the kernels of inference and of training run.
_PROGRAM = """
import sys
sys.path[:0] = ["tools", "benchmarks", "tests/helpers", "."]
import torch
from smoke_networks import Network, _loss
from smoke_ops import Bench
import hne_kernels as K
bench = Bench.on("{device}")
net = Network(bench)
images = net.images(bench.batch).to("{device}")
with K.use_backend("{backend}"):
    with torch.no_grad():
        net.on("{device}", torch.bfloat16)(images.bfloat16())
    target = torch.zeros(bench.batch, dtype=torch.int64, device="{device}")
    _loss(net.on("{device}").train(), images, target, torch.bfloat16).backward()
"""


def counters(check: GpuCheck) -> str:
    """hardware counters of the three kernels with the longest predicted time, read by Nsight Compute"""
    kernels = check.predictions.most_important
    tool = shutil.which("ncu")
    if check.device == "cpu":
        check.run(sys.executable, "-c", _PROGRAM.format(device="cpu", backend=check.backends[0]))
        tool = None
    if tool is None:
        for kernel in kernels:
            check.write_row("counters", kernel, {"result": "skipped", "note": "ncu is not on the PATH"})
        raise Skipped("ncu (Nsight Compute) is not on the PATH")
    if "cuda" not in check.backends:
        raise Skipped("the backend cuda is not available")
    if not kernels:
        raise Skipped("no predictions name the kernels that matter")
    read = 0
    for kernel in kernels:
        cells = _read(check, tool, kernel)
        read += cells["result"] == "ok"
        check.write_row("counters", kernel, cells)
    if read < len(kernels):
        raise Failure(f"counters of {read} of {len(kernels)} kernels; see the rows")
    return f"counters of {', '.join(kernels)}"


def _read(check: GpuCheck, tool: str, kernel: str) -> Cells:
    command = [tool, "--csv", "--target-processes", "application-only", "--kernel-name-base", "function"]
    command += ["--kernel-name", f"regex:^{kernel}$", "--launch-count", str(_LAUNCHES)]
    command += ["--metrics", ",".join(METRICS), sys.executable, "-c", _PROGRAM.format(device="cuda", backend="cuda")]
    try:
        text = check.run(*command)
    except RanOut:
        raise
    except Failure as failure:
        return {"result": "FAILED", "note": str(failure)}
    found = parse(text)
    if not found:
        return {"result": "FAILED", "note": "ncu printed no counters; it may need permission to read them"}
    return {"result": "ok", "note": "; ".join(found)}


def parse(text: str) -> list[str]:
    """Each counter of a report in CSV, averaged over the launches, with its unit."""
    start = text.find('"ID"')
    values: dict[str, list[float]] = {}
    units: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(text[start:])) if start >= 0 else ():
        name, value = row.get("Metric Name") or "", (row.get("Metric Value") or "").replace(",", "")
        try:
            values.setdefault(METRICS[name], []).append(float(value))
        except (KeyError, ValueError):
            continue
        units[METRICS[name]] = row.get("Metric Unit") or ""
    return [f"{name} {sum(found) / len(found):.4g} {units[name]}".strip() for name, found in values.items()]
