"""Run everything that needs a GPU: build, test suite, compute-sanitizer, benchmarks.

Requires the CUDA compiler, PyTorch, Triton and pytest, but no network. Each step has a time limit. A step that exceeds
it is stopped and reported, and the next step runs. The last step, the benchmarks, gets all remaining time and starts
with the most important comparisons.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import torch
from timed_steps import ROOT, Check, Failure, Outcome, RanOut, Skipped

BACKENDS = ("cuda", "triton")


# --- steps -------------------------------------------------------------------------------------------------------


def machine(check: Check) -> str:
    """check that the requirements are installed"""
    missing = [
        requirement
        for requirement, found in {
            "nvcc": shutil.which("nvcc") or os.environ.get("CUDA_HOME"),
            "a GPU that torch can use": torch.cuda.is_available(),
            "triton": importlib.util.find_spec("triton"),
            "pytest": importlib.util.find_spec("pytest"),
        }.items()
        if not found
    ]
    if missing:
        raise Failure(f"missing: {', '.join(missing)}")
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def build(check: Check) -> str:
    """compile the extension for this GPU only, against the installed PyTorch, without downloads"""
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}.{minor}" + ("a" if major == 9 else "")
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    # No constraints: pip rejects them for a build without isolation.
    free = {"PIP_CONSTRAINT": "", "PIP_BUILD_CONSTRAINT": "", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    check.run(*pip, seconds=None, HNE_CUDA="1", TORCH_CUDA_ARCH_LIST=target, **free)
    return f"for sm_{target.replace('.', '')}"


def backends(check: Check) -> str:
    """check that all four backends are available"""
    code = "import hne_kernels as K; print(dict(K.unavailable_backends()))"
    output = check.run(sys.executable, "-c", code).strip().splitlines()[-1]
    if output != "{}":
        raise Failure(f"not available: {output}")
    return "reference, cpp, cuda, triton"


def gpu_tests(check: Check) -> str:
    """run the tests of both GPU backends"""
    return suite(check, "cuda or triton or gpu", BACKENDS)


def other_tests(check: Check) -> str:
    """run the rest of the test suite"""
    return suite(check, "not (cuda or triton or gpu)", ())


def suite(check: Check, expression: str, served: tuple[str, ...]) -> str:
    """Run the tests selected by ``expression`` and not marked slow; each backend in ``served`` must have some."""
    missing = [package for package in ("hypothesis",) if importlib.util.find_spec(package) is None]
    without = ["--ignore=tests/kernels/test_properties.py"] if missing else []
    workers = []
    if importlib.util.find_spec("xdist"):
        workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup", "-p", "no:benchmark"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        stopped = None
        try:
            command = ("-m", "pytest", "-q", "-rs", "-m", "not slow", "-k", expression, f"--junitxml={report}")
            check.run(sys.executable, *command, *workers, *without)
        except RanOut as done:
            stopped = done
        except Failure:
            if not report.exists():
                raise
        note = counted(report, served, complete=stopped is None)
    if missing:
        note += f", without test_properties.py (no {', '.join(missing)})"
    if stopped:
        raise RanOut(f"{note}; then the time was over")
    return note


def counted(report: Path, served: tuple[str, ...], *, complete: bool) -> str:
    """Summarise a report of pytest in one line, and print the reasons of skipped tests.

    Args:
        report: JUnit file of pytest.
        served: backends that must have passed tests.
        complete: False if pytest was interrupted. Its last test is then ignored, and backends may have no tests yet.

    Raises:
        Failure: a test failed, or a backend in ``served`` has no passed test.
    """
    if not report.exists():
        raise Failure("pytest left no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    if not complete:
        del cases[-1:]
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [skip for case in cases if (skip := case.find("skipped")) is not None]
    good = [case for case in cases if case not in bad and case.find("skipped") is None]
    for reason, count in Counter(skip.get("message", "") for skip in skips).most_common():
        print(f"skipped {count}: {reason}")
    on = {name: sum(f"{name}-" in case.get("name", "") for case in good) for name in served}
    note = f"{len(good)} passed, {len(bad)} failed, {len(skips)} skipped"
    note += "".join(f", {count} on {name}" for name, count in on.items())
    if bad:
        note += f"; first: {bad[0].get('classname')}::{bad[0].get('name')}"
    if bad or (complete and not all(on.values())):
        raise Failure(note)
    return note


def memcheck(check: Check) -> str:
    """look for accesses outside of tensors, on small shapes, both backends"""
    return sanitizer(check, "memcheck")


def racecheck(check: Check) -> str:
    """look for races in shared memory, on small shapes, both backends"""
    return sanitizer(check, "racecheck")


def sanitizer(check: Check, tool: str) -> str:
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not on the PATH")
    notes, stopped = [], False
    for backend, rest in zip(BACKENDS, (2, 1), strict=True):
        kernels = (
            ("--kernel-regex", "kns=hne") if backend == "cuda" else ()
        )  # Triton names kernels after their functions
        tests = f"test_results_and_gradients and ({backend}-bfloat16 or {backend}-float32)"
        try:
            # Without torch's cache every tensor is a separate allocation, so that accesses outside of it are found.
            output = check.run(
                *(
                    program,
                    "--tool",
                    tool,
                    "--error-exitcode",
                    "99",
                    "--target-processes",
                    "application-only",
                    *kernels,
                ),
                *(sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels/test_parity.py", "-k", tests),
                seconds=check.left() / rest,
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
        except Failure as failure:
            if "Device not supported" in (check.results / "check.log").read_text():
                raise Skipped("compute-sanitizer does not support this device") from None
            raise Failure(f"{backend}: {failure}") from None
        except RanOut as done:
            notes.append(f"{backend}: {done}")
            stopped = True
        else:
            notes.append(f"{backend}: {_last_line(output, ' passed')}")
    if stopped:
        raise RanOut("; ".join(notes))
    return "; ".join(notes)


def _last_line(text: str, part: str) -> str:
    return next((line for line in reversed(text.splitlines()) if part in line), "no test passed")


def benchmarks(check: Check) -> str:
    """compare all sides with each other and with the lower bound"""
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise Skipped("the package pytest-benchmark is not installed")
    table = check.results / gpu_name()
    budget = check.left() - 45  # leaves time to finish the running comparison
    choice = ("-k", check.expression) if check.expression else ()
    output = check.run(
        *(sys.executable, "-m", "pytest", "--benchmark", "-q", "-rs", "--benchmark-workload=gpu"),
        *(f"--benchmark-save-table={table}", f"--benchmark-budget={budget:.0f}", *choice),
    )
    note = f"{_last_line(output, 'comparisons, fused slower')}: {table}.md"
    if "the budget of" in output:
        raise RanOut(f"{note}; {_last_line(output, ' skipped')}")
    return note


# Each step and its limit in seconds; the last step takes the remaining time.
STEPS: dict[str, tuple[Callable[[Check], str], float | None]] = {
    "machine": (machine, 15),
    "build": (build, 150),
    "backends": (backends, 20),
    "gpu-tests": (gpu_tests, 150),
    "other-tests": (other_tests, 45),
    "memcheck": (memcheck, 60),
    "racecheck": (racecheck, 50),
    "benchmarks": (benchmarks, None),
}


def gpu_name() -> str:
    return torch.cuda.get_device_name().lower().replace(" ", "-")


def facts() -> dict[str, str]:
    """GPU, driver, versions and commit, as in the benchmarks; before the build only the versions that torch knows."""
    code = "import json, machine; facts = machine.describe(); print(json.dumps(facts))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda)}


def save(path: Path, machine: dict[str, str], done: dict[str, Outcome]) -> None:
    """Write the outcomes; earlier outcomes of other steps on the same machine and commit stay."""
    steps = {}
    if path.exists():
        before = json.loads(path.read_text())
        if before["machine"] | {"date": ""} == machine | {"date": ""}:
            steps = before["steps"]
    steps |= {name: asdict(outcome) for name, outcome in done.items()}
    path.write_text(json.dumps({"machine": machine, "steps": steps}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    width = max(map(len, STEPS))
    steps = "\n".join(
        f"  {name:<{width}}  {'the rest' if limit is None else f'{limit:>6} s'}  {function.__doc__}"
        for name, (function, limit) in STEPS.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""\
steps and their time limits:
{steps}

examples:
  make gpu-check                                            everything, in under ten minutes
  python tools/gpu_check.py --only build --only gpu-tests --seconds 600      some steps, with more time
  python tools/gpu_check.py --only benchmarks --benchmarks 'inference and 128'   one part of the table

A step given alone may use all the time. The first call on a new machine must include the build. Results are added to
those of earlier calls on the same machine and commit: RESULTS/<gpu>.md and .json hold the table of the benchmarks,
<gpu>-check.json the outcomes of the steps, check.log all output.
The exit status is 1 if a step failed or ran out of time.
""",
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(STEPS), metavar="STEP", help="run this step only (repeatable)"
    )
    parser.add_argument("--seconds", type=float, default=560, help="total time (default: 560)")
    parser.add_argument("--benchmarks", default="", metavar="EXPRESSION", help="select benchmarks, as pytest -k does")
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder of the results (default: benchmarks/results)",
    )
    return parser.parse_args()


def main() -> int:
    args = arguments()
    check = Check(args.seconds, args.results.resolve(), args.benchmarks)
    chosen = args.only or list(STEPS)
    done: dict[str, Outcome] = {}
    for name in (name for name in STEPS if name in chosen):
        function, limit = STEPS[name]
        done[name] = check.step(function, None if len(chosen) == 1 else limit)
        if name in ("machine", "build") and done[name].result != "passed":
            break  # the other steps cannot run
    if torch.cuda.is_available():
        save(check.results / f"{gpu_name()}-check.json", facts(), done)
    for name, outcome in done.items():
        print(f"{name:12} {outcome.result:8} {outcome.seconds:6.1f} s  {outcome.note}")
    for name in chosen[len(done) :]:
        print(f"{name:12} not begun")
    fine = all(outcome.result in ("passed", "skipped") for outcome in done.values())
    return 0 if fine and len(done) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
