"""Check the package on a machine with a GPU, in three calls that each stand alone and take less than ten minutes.

Requires the CUDA compiler, PyTorch, Triton, ninja and pytest, but no network and no installed copy of the package.
Every row of a result is on disk as soon as it is known. A step that exceeds its time is stopped, and the next one runs;
time that a step does not use goes to the next one. Interrupted, the check keeps all rows and prints its summary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import build_steps
import counter_steps
import peer_steps
import smoke_steps
import suite_steps
from gpu_machine import COLUMNS, GPU_BACKENDS, GpuCheck, machine
from predicted_rows import ratios
from timed_steps import ROOT, Outcome


@dataclass(frozen=True)
class Step:
    """A step and its share of the time, in seconds."""

    name: str
    function: Callable[[GpuCheck], str]
    share: float


PREPARATION = (Step("machine", machine, 15), Step("build", build_steps.build, 165))
CALLS: dict[str, tuple[Step, ...]] = {
    "first": (
        Step("rates", smoke_steps.rates, 20),
        Step("cuda-ops", smoke_steps.ops(0), 40),
        Step("cuda-network", smoke_steps.networks(0), 35),
        Step("eager", smoke_steps.eager, 50),
        Step("compiled", smoke_steps.compiled, 50),
        Step("triton-ops", smoke_steps.ops(1), 140),  # most of it is compilation and tuning
        Step("triton-network", smoke_steps.networks(1), 45),
        Step("calibrate", smoke_steps.calibrate, 5),
    ),
    "second": (
        Step("tests-cuda", suite_steps.tests_cuda, 120),
        Step("tests-triton", suite_steps.tests_triton, 120),
        Step("vast", suite_steps.vast, 40),
        Step("counters", counter_steps.counters, 40),
        Step("memcheck", smoke_steps.memcheck, 60),
        Step("racecheck", smoke_steps.racecheck, 20),
    ),
    "third": (
        *(Step(name, peer_steps.row(name, compiled=False), 45) for name in peer_steps.ROWS),
        *(Step(f"{name}-compiled", peer_steps.row(name, compiled=True), 60) for name in peer_steps.ROWS),
        Step("others", peer_steps.others, 45),
    ),
}
_TITLES = {
    "first": "build, then the smoke table: is every op right, and how fast are ops and network?",
    "second": "tests on the GPU, memory checker",
    "third": "speed against plain and compiled PyTorch",
}


def planned(call: str, seconds: float) -> list[Step]:
    """The steps of a call (``all``: of all calls in order), with shares that sum to less than ``seconds``."""
    steps = [step for name, steps in CALLS.items() if call in (name, "all") for step in steps]
    preparation = sum(step.share for step in PREPARATION)
    scale = max(0.0, seconds - preparation) / (sum(step.share for step in steps) + 1)
    return [*PREPARATION, *(Step(step.name, step.function, step.share * scale) for step in steps)]


def run(check: GpuCheck, steps: list[Step]) -> dict[str, Outcome]:
    """Run the steps until one is interrupted, and write the outcomes after each one."""
    done: dict[str, Outcome] = {}
    with contextlib.suppress(KeyboardInterrupt):  # between two steps
        _run(check, steps, done)
    return done


def _run(check: GpuCheck, steps: list[Step], done: dict[str, Outcome]) -> None:
    facts: dict[str, str] = {}
    for step in steps:
        print(f"--- {step.name}", flush=True)
        done[step.name] = outcome = check.step(lambda _, step=step: step.function(check), step.share)  # type: ignore[misc]
        if not facts or step.name == "build":
            facts = check.facts()
        _write(check, facts, done)
        unusable = step.name == "machine" and outcome.result != "passed"
        unusable = unusable or (step.name == "build" and (outcome.result == "ran out" or not check.backends))
        if outcome.result == "interrupted" or unusable:
            break


def _write(check: GpuCheck, facts: dict[str, str], done: dict[str, Outcome]) -> None:
    record = {
        "call": check.call,
        "machine": facts,
        "steps": {name: asdict(outcome) for name, outcome in done.items()},
        "rows": check.rows,
    }
    (check.results / f"{check.call}.json").write_text(json.dumps(record, indent=1) + "\n")


# --- report --------------------------------------------------------------------------------------------------------


def report(check: GpuCheck, steps: list[Step], done: dict[str, Outcome]) -> list[str]:
    """The end of the output: rows that are not right, times, outcomes, and what to do next."""
    lines = []
    shown = [row for row in check.rows if row["result"] not in ("ok", "skipped")]
    if shown:
        lines += ["", f"rows that are not right ({len(shown)}):"]
        lines += [f"{row['row']}: {row['result']}: {row.get('note', '')}"[:200] for row in shown[:25]]
    timed = [row for row in check.rows if row.get("ms") and ("network" in row["step"] or row["step"] in _PLAIN)]
    if timed:
        lines += ["", "network, milliseconds (predicted by the cost model):"]
        lines += [f"{row['ms']:>10} {_bracketed(row.get('predicted ms')):>12}  {row['row']}" for row in timed]
    beyond = slower_than_predicted(check)
    if beyond:
        lines += ["", f"slower than {_MUCH:g} times the prediction ({len(beyond)}):"]
        lines += [f"{ratio:>6.1f} times  {name}" for name, ratio in beyond[:12]]
    slow = _slow(check.rows)
    if slow:
        lines += ["", "ops furthest from the speed of a copy, forward:", *slow]
    lines += ["", *(f"{key} {value}" for key, value in check.facts().items() if key in _FACTS), ""]
    for step in steps:
        outcome = done.get(step.name)
        if outcome is None:
            lines.append(f"{step.name:24} not begun")
        else:
            lines.append(f"{step.name:24} {outcome.result:11} {outcome.seconds:6.1f} s  {outcome.note}"[:300])
    return [*lines, "", f"results: {check.results}", *(f"next: {advice}" for advice in advices(check, done))]


_PLAIN = ("eager", "compiled")
_MUCH = 2.0  # times the prediction


def _bracketed(predicted: float | None) -> str:
    return "" if predicted is None else f"({predicted:.3f})"


def slower_than_predicted(check: GpuCheck) -> list[tuple[str, float]]:
    """Rows that took much longer than predicted, the worst first, with measured over predicted time."""
    found = [(name, ratio) for name, ratio, _ in ratios(check.rows, check.predictions) if ratio > _MUCH]
    return sorted(found, key=lambda pair: -pair[1])


_FACTS = ("gpu", "driver", "torch", "cuda", "triton", "commit", "date")


def _slow(rows: list[dict[str, Any]], count: int = 8) -> list[str]:
    """The rows of ops with the smallest share of the copy speed."""
    shares = [(float(row["of copy"].rstrip("%")), row) for row in rows if row.get("of copy")]
    chosen = sorted(shares, key=lambda pair: pair[0])[:count]
    return [f"{share:>4.0f}%  {row['ms']:>9} ms  {row['row']}" for share, row in chosen]


# What to do about the rows of a result.
_ADVICE = {
    "HUNG": "a kernel that does not end: look at its loops and barriers",
    "DIED": "a process that ended: read {log}, and run the second call for the memory checker",
    "WRONG": "wrong values: compare the shapes that are wrong with those that are right",
    "FAILED": "read the notes of the failed rows",
}


def _alone(row: str) -> str:
    """The command that tests the op of a row alone, or an empty text."""
    words = row.partition(": ")[0].split()
    if len(words) != 3 or words[0] not in GPU_BACKENDS:
        return ""
    return f"; its op alone: python -m pytest -q tests/kernels/test_parity.py -k '{words[0]} and {words[2]}'"


def advices(check: GpuCheck, done: dict[str, Outcome]) -> list[str]:
    """What to do next, from the results."""
    by_result: dict[str, list[str]] = {}
    for row in check.rows:
        by_result.setdefault(row["result"], []).append(row["row"])
    log = check.log.name
    found = []
    if "machine" in done and done["machine"].result == "FAILED":
        return [f"install what is missing ({done['machine'].note})"]
    if "build" in done and done["build"].result in ("FAILED", "ran out"):
        found.append(f"mend the build; the compiler's output is in {log}")
    for result, advice in _ADVICE.items():
        if result in by_result:
            first = by_result[result][0]
            found.append(
                f"{advice.format(log=log)} ({len(by_result[result])} rows, the first is {first}){_alone(first)}"
            )
    if ran_out := [name for name, outcome in done.items() if outcome.result == "ran out"]:
        found.append(f"run the call of these steps alone, or with more --seconds: {', '.join(ran_out)}")
    if failed := [name for name, outcome in done.items() if outcome.result == "FAILED" and name not in ("build",)]:
        found.append(f"failed steps: {', '.join(failed)}")
    wrong = bool(found)
    if beyond := slower_than_predicted(check):
        by_kernel = {kernel: ratio for _, ratio, kernel in ratios(check.rows, check.predictions) if kernel}
        worst = max(by_kernel, key=lambda kernel: by_kernel[kernel], default=beyond[0][0])
        found.append(
            f"{len(beyond)} rows take more than {_MUCH:g} times the prediction: read the counters of {worst} "
            "(second call), then its machine code (python tools/cost_model.py --launches)"
        )
    if check.predictions.note and any(row.get("predicted ms") for row in check.rows):
        found.append(check.predictions.note)
    elif "calibrate" in done and done["calibrate"].result == "passed" and check.device == "cuda":
        found.append("commit tools/gpu_calibration.json and the results")
    names = list(CALLS)
    if not wrong and check.call in names[:-1]:
        found.append(f"GPU_CHECK={names[names.index(check.call) + 1]}")
    return found or ["nothing is wrong; keep the results"]


# --- command line ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    lines = [f"  {step.name:24} {step.share:4.0f} s  {_first_line(step)}" for step in PREPARATION]
    for name, members in CALLS.items():
        lines += [f"{name}: {_TITLES[name]}"]
        lines += [f"  {step.name:24} {step.share:4.0f} s  {_first_line(step)}" for step in members]
    text = "\n".join(lines)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""\
steps and their shares of the time; each call begins with the first two:
{text}

examples:
  make gpu-check GPU_CHECK=first        one call; then second, then third
  make gpu-check                        all three, each in a third of the time
  python tools/gpu_check.py first --results DIR
  python tools/gpu_check.py first --device cpu     a rehearsal on a CPU, with tiny sizes

RESULTS has CALL.tsv (rows), CALL.json (machine, outcomes, rows) and CALL.log (all output); the third call adds
peers.md and peers.json. Columns of the rows: {", ".join(COLUMNS)}.
The exit status is 1 if a step failed or ran out of time, 130 after an interruption.
""",
    )
    parser.add_argument("call", nargs="?", choices=("all", *CALLS), default="all", help="default: all three in order")
    parser.add_argument("--seconds", type=float, default=560.0, help="total time (default: 560)")
    parser.add_argument("--results", type=Path, help="folder of the results (default: benchmarks/results/<gpu>)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument(
        "--faults", action="store_true", help="begin the tables of ops with rows that fail, hang and crash"
    )
    return parser.parse_args()


def _first_line(step: Step) -> str:
    return (step.function.__doc__ or "").strip().splitlines()[0]


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)  # a background process of a shell would ignore it
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    results = None if args.results is None else args.results.resolve()
    check = GpuCheck(args.seconds, results, args.device, args.call, faults=args.faults)
    steps = planned(args.call, args.seconds)
    done = run(check, steps)
    print(*report(check, steps, done), sep="\n")
    if any(outcome.result == "interrupted" for outcome in done.values()):
        return 130
    fine = all(outcome.result in ("passed", "skipped") for outcome in done.values())
    return 0 if fine and len(done) == len(steps) else 1


if __name__ == "__main__":
    sys.exit(main())
