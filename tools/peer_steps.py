"""Steps of the benchmarks: the rows that matter most, first without and then with compiled sides, then all others."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable

from gpu_machine import GpuCheck
from timed_steps import Failure, RanOut, Skipped

# By name: the rows that matter first, as pytest's -k selects them on a GPU and in a rehearsal.
ROWS = {
    "inference-128": ("inference and HNE-ResNet-16-128-bfloat16", "inference and HNE-tiny-2-2-bfloat16"),
    "inference-1": ("inference and HNE-ResNet-16-1-bfloat16", "inference and HNE-tiny-1-2-bfloat16"),
    "training-128": ("training and HNE-ResNet-128-bfloat16", "training and HNE-tiny-4-bfloat16"),
}
_REHEARSED = ("inference-1", "training-128")  # with compiled sides; another batch is the same code
COMPILED = ("compiled", "channels_last_compiled", "frozen")
_MOST_LOSSES = 3  # sides that may make the GPU unusable, each after a new start


def row(name: str, *, compiled: bool) -> Callable[[GpuCheck], str]:
    """The step of a row that matters first."""

    def step(check: GpuCheck) -> str:
        if check.device == "cpu" and compiled and name not in _REHEARSED:
            raise Skipped("a rehearsal compiles each kind of row once")
        return benchmark(check, ROWS[name][check.device == "cpu"], () if compiled else COMPILED)

    step.__doc__ = f"{name.replace('-', ', batch ')}, {'with' if compiled else 'without'} compiled sides"
    return step


def others(check: GpuCheck) -> str:
    """all other comparisons, in the time that is left"""
    chosen = " or ".join(f"({expressions[check.device == 'cpu']})" for expressions in ROWS.values())
    return benchmark(check, f"not ({chosen})" if check.device == "cuda" else "hierarchical", ())


def benchmark(check: GpuCheck, expression: str, without: tuple[str, ...]) -> str:
    """Run the selected comparisons. A side that makes the GPU unusable is left out of the next start."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise Skipped("the package pytest-benchmark is not installed")
    table = check.results / "peers"
    options = ["--benchmark-workload", "gpu" if check.device == "cuda" else "rehearsal"]
    options += ["--benchmark-quick"] if check.device == "cpu" else []
    for _ in range(_MOST_LOSSES):
        left_out = [word for side in (*without, *check.lost_sides) for word in ("--benchmark-without", side)]
        command = (sys.executable, "-m", "pytest", "--benchmark", "-q", "-rs", *options, *left_out, "-k", expression)
        budget = max(1.0, check.left() - 30)  # time to finish the comparison that runs
        failure: Failure | None = None
        with_budget = (f"--benchmark-save-table={table}", f"--benchmark-budget={budget:.0f}")
        position = check.log.stat().st_size if check.log.exists() else 0
        try:
            output = check.run(*command, *with_budget)
        except Failure as error:
            failure = error
            with check.log.open("rb") as log:
                log.seek(position)
                output = log.read().decode(errors="replace")
        lost = re.search(r"the GPU is lost after the side (\w+)", output)
        if lost is None:
            break
        check.lost_sides.append(lost[1])
    note = f"{last_line(output, 'comparisons, fused slower')}: {table.name}.md"
    if check.lost_sides:
        raise Failure(f"{note}; the GPU was lost after {', '.join(check.lost_sides)}")
    if failure:
        raise Failure(f"{note}; {last_line(output, ' failed')}")
    if "the budget of" in output:
        raise RanOut(f"{note}; {last_line(output, ' skipped')}")
    return note


def last_line(text: str, part: str) -> str:
    return next((line for line in reversed(text.splitlines()) if part in line), f"no line with {part!r}")
