"""The machine of the check: what it has, which backends serve it, and where results go."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from predicted_rows import Predictions
from rows import Cells
from timed_steps import ROOT, Check, Failure

GPU_BACKENDS = ("cuda", "triton")
REHEARSAL_BACKENDS = ("cpp", "reference")  # take the place of the GPU's backends on a CPU
_ERRORS, _TIMES = ("error", "gradient error"), ("ms", "predicted ms", "backward ms", "predicted backward ms")
COLUMNS = ("step", "row", "result", *_ERRORS, *_TIMES, "of copy", "note")

_PROBE = """
import json, torch
gpu = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": str(torch.version.cuda),
    "gpu": torch.cuda.get_device_name() if gpu else "",
    "capability": list(torch.cuda.get_device_capability()) if gpu else [],
}))
"""
_DESCRIBE = "import json, {module}; print(json.dumps({module}.describe()))"


def ask(code: str, **environ: str) -> tuple[Any, str]:
    """The JSON that a Python program prints last, and otherwise None and the last line of its error."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return json.loads(result.stdout.splitlines()[-1]), ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    except (IndexError, ValueError):
        return None, (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


class GpuCheck(Check):
    """A run of the check.

    Args:
        seconds: total time.
        results: folder of the results; None for a folder of the GPU's name below ``benchmarks/results``.
        device: ``cuda``, or ``cpu`` for a rehearsal.
        call: name of the call, which its files have.
        faults: begin the tables of ops with rows that fail, hang and end their process.
    """

    def __init__(
        self, seconds: float, results: Path | None, device: str = "cuda", call: str = "all", *, faults: bool = False
    ) -> None:
        self.device, self.call, self.faults = device, call, faults
        probe, self.problem = ask(_PROBE)
        self.machine: dict[str, Any] = probe or {"gpu": "", "capability": []}
        name = self.machine["gpu"].lower().replace(" ", "-") or "cpu-rehearsal"
        super().__init__(seconds, results or ROOT / "benchmarks" / "results" / name, f"{call}.log")
        self.backends: tuple[str, ...] = REHEARSAL_BACKENDS if device == "cpu" else GPU_BACKENDS
        self.bytes_per_s: float | None = None  # speed of a large copy
        self.lost_sides: list[str] = []  # of the benchmarks, that made the GPU unusable
        self.rows: list[Cells] = []
        self.predictions = Predictions.load()

    @property
    def missing(self) -> list[str]:
        """What the check needs and the machine lacks."""
        needs: dict[str, object] = {"pytest": importlib.util.find_spec("pytest")}
        if self.device == "cuda":
            needs |= {
                "a GPU that torch can use": self.machine["gpu"],
                "ninja, to compile": importlib.util.find_spec("ninja") or shutil.which("ninja"),
                "nvcc": shutil.which("nvcc") or os.environ.get("CUDA_HOME"),
                "triton": importlib.util.find_spec("triton"),
            }
        return [need for need, found in needs.items() if not found]

    def facts(self) -> dict[str, str]:
        """GPU, driver, versions, commit and date, as in the benchmarks; before the build what torch knows of them."""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        described, _ = ask(_DESCRIBE.format(module="machine"), PYTHONPATH=paths)
        if described:
            return described
        revision, _ = ask(_DESCRIBE.format(module="revision"), PYTHONPATH=paths)
        return {name: str(value) for name, value in self.machine.items()} | (revision or {})

    def write_row(self, step: str, name: str, cells: Cells) -> None:
        """Append a row to the table on disk, with the prediction of the cost model beside times, and show it."""
        predicted = self.predictions.of_row(name)
        beside = {
            f"predicted {key}": predicted[key] for key in ("ms", "backward ms") if cells.get(key) and key in predicted
        }
        row = {"step": step, "row": name} | cells | beside
        self.rows.append(row)
        path = self.results / f"{self.call}.tsv"
        line = "\t".join(str(row.get(column, "")).replace("\t", " ") for column in COLUMNS)
        with path.open("a") as table:
            if table.tell() == 0:
                table.write("\t".join(COLUMNS) + "\n")
            table.write(line + "\n")
            table.flush()
            os.fsync(table.fileno())
        print(line, flush=True)


def machine(check: GpuCheck) -> str:
    """check that the requirements are installed"""
    if check.problem:
        raise Failure(f"torch does not work: {check.problem}")
    if check.missing:
        raise Failure(f"missing: {', '.join(check.missing)}")
    return f"{check.machine['gpu'] or 'no GPU'}, torch {check.machine['torch']}, CUDA {check.machine['cuda']}"
