"""Everything that needs a GPU, in one go: build, test suite, compute-sanitizer, benchmarks.

``make gpu-check`` runs it on a machine with CUDA's compiler, PyTorch, Triton and pytest; no network is needed.
Each step prints a line of the table at the end. All run, whatever became of those before; the exit status is 1 if one
failed. The outcome, with machine and versions, goes to ``benchmarks/results/gpu_check.json``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STEP_SECONDS = 1200  # a step that takes longer hangs


@dataclass
class Step:
    """Outcome of a step."""

    name: str
    passed: bool
    seconds: float
    note: str


class Failure(Exception):
    """What went wrong, in a line."""


def run(*command: str, **environ: str) -> str:
    """Run from the root of the checkout; the output is shown and returned.

    Raises:
        Failure: it could not be run, ended with an error or took too long.
    """
    print("$", " ".join(command), flush=True)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **environ},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=STEP_SECONDS,
                check=False,
            ).returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failure(str(error)) from None
        finally:
            output.seek(0)
            text = output.read()
            print(text[-20000:], flush=True)
    if code:
        raise Failure(f"exit status {code}: {text.strip().splitlines()[-1] if text.strip() else 'no output'}")
    return text


def preconditions() -> str:
    missing = [
        what
        for what, there in {
            "nvcc": shutil.which("nvcc") or os.environ.get("CUDA_HOME"),
            "a GPU that torch can use": torch.cuda.is_available(),
            "triton": importlib.util.find_spec("triton"),
            "pytest": importlib.util.find_spec("pytest"),
        }.items()
        if not there
    ]
    if missing:
        raise Failure(f"missing: {', '.join(missing)}")
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def build() -> str:
    major, minor = torch.cuda.get_device_capability()
    target = f"{major}.{minor}" + ("a" if major == 9 else "")
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    run(*pip, HNE_CUDA="1", TORCH_CUDA_ARCH_LIST=target)
    return f"for sm_{target.replace('.', '')}"


def backends() -> str:
    code = "import hne_kernels as K; print(dict(K.unavailable_backends()))"
    said = run(sys.executable, "-c", code).strip().splitlines()[-1]
    if said != "{}":
        raise Failure(f"not available: {said}")
    return "reference, cpp, cuda, triton"


def tests() -> str:
    """The whole suite but what is marked slow; on a machine with a GPU that is every backend."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        without = [] if importlib.util.find_spec("hypothesis") else ["--ignore=tests/test_properties.py"]
        command = (sys.executable, "-m", "pytest", "-q", "-rs", "-m", "not slow", f"--junitxml={report}", *without)
        try:
            run(*command)
        finally:
            counts = counted(report)
    return counts + (", without test_properties.py (no hypothesis)" if without else "")


def counted(report: Path) -> str:
    """Passed, failed and skipped; the cases of each GPU backend that passed. None of a backend is a failure."""
    if not report.exists():
        raise Failure("pytest left no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    good = [c for c in cases if c not in set(bad) | set(skipped)]
    served = {name: sum(f"{name}-" in c.get("name", "") for c in good) for name in ("cuda", "triton")}
    summary = f"{len(good)} passed, {len(bad)} failed, {len(skipped)} skipped; " + ", ".join(
        f"{count} on {name}" for name, count in served.items()
    )
    if bad or not all(served.values()):
        raise Failure(summary)
    return summary


def sanitizer(tool: str) -> Callable[[], str]:
    def step() -> str:
        program = shutil.which("compute-sanitizer")
        if program is None:
            raise Failure("compute-sanitizer is not on the PATH")
        # Without torch's cache every tensor is an allocation of its own, and an access beyond it is seen.
        said = run(
            *(program, "--tool", tool, "--error-exitcode", "1", "--kernel-regex", "kns=hne"),
            *(sys.executable, "-m", "pytest", "-q", "-x", "tests/test_parity.py"),
            *("-k", "cuda-bfloat16 and test_results_and_gradients"),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        return said.strip().splitlines()[-1]

    return step


def benchmarks() -> str:
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise Failure("missing: pytest-benchmark")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    table = RESULTS / f"gpu-{name}"
    run(sys.executable, "-m", "pytest", "--benchmark", f"--benchmark-save-table={table}")
    return f"{table.relative_to(ROOT)}.md"


STEPS: dict[str, Callable[[], str]] = {
    "machine": preconditions,
    "build": build,
    "backends": backends,
    "tests": tests,
    "memcheck": sanitizer("memcheck"),
    "racecheck": sanitizer("racecheck"),
    "benchmarks": benchmarks,
}


def main() -> int:
    done = []
    for name, step in STEPS.items():
        start = time.monotonic()
        try:
            passed, note = True, step()
        except Failure as failure:
            passed, note = False, str(failure)
        done.append(Step(name, passed, round(time.monotonic() - start, 1), note))
        if name in ("machine", "build") and not passed:
            break  # nothing to check
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu_check.json").write_text(json.dumps([asdict(step) for step in done], indent=2) + "\n")
    for step in done:
        print(f"{step.name:11} {'passed' if step.passed else 'FAILED'} {step.seconds:7.1f} s  {step.note}")
    return 0 if all(step.passed for step in done) and len(done) == len(STEPS) else 1


if __name__ == "__main__":
    sys.exit(main())
