"""Steps of the test suite on the GPU: one backend after the other, and vast tensors alone."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from gpu_machine import GpuCheck
from timed_steps import Check, Failure, RanOut, Skipped

_VAST = "tests/kernels/test_gpu_large.py"
_TEST_SECONDS = 120  # a test that takes longer hangs
# Of a rehearsal: the same steps with a few quick tests.
_REHEARSED = "test_results_and_gradients and prefix_mean"


def tests_cuda(check: GpuCheck) -> str:
    """parity and GPU tests of the backend cuda"""
    if check.device == "cpu":
        return suite(check, f"{_REHEARSED} and cpp", ("cpp",), "tests/kernels/test_parity.py")
    return _of_backend(check, "cuda", "(cuda or gpu) and not triton")


def tests_triton(check: GpuCheck) -> str:
    """parity and GPU tests of the backend triton"""
    if check.device == "cpu":
        return suite(check, f"{_REHEARSED} and reference", ("reference",), "tests/kernels/test_parity.py")
    return _of_backend(check, "triton", "triton")


def vast(check: GpuCheck) -> str:
    """tensors of more than 2^31 elements, in one process"""
    return suite(check, "", (), _VAST, workers=1)


def _of_backend(check: GpuCheck, backend: str, expression: str) -> str:
    if backend not in check.backends:
        raise Skipped(f"the backend {backend} is not available")
    return suite(check, expression, (backend,), "tests", f"--ignore={_VAST}", workers=8)


def suite(check: Check, expression: str, served: tuple[str, ...], *where: str, workers: int = 1) -> str:
    """Run the tests selected by ``expression`` and not marked slow; each backend in ``served`` must have some."""
    options = ["-p", "gpu_lost", "-k", expression] if expression else ["-p", "gpu_lost"]
    if missing := [package for package in ("hypothesis",) if importlib.util.find_spec(package) is None]:
        options.append("--ignore=tests/kernels/test_properties.py")
    if importlib.util.find_spec("xdist"):  # also for one worker: a lost GPU ends the worker, and a new one goes on
        options += ["-n", str(min(workers, os.cpu_count() or 1)), "--dist", "loadgroup", "-p", "no:benchmark"]
    if importlib.util.find_spec("pytest_timeout"):  # by a thread: a signal does not end a call that waits for the GPU
        options += [f"--timeout={_TEST_SECONDS}", "--timeout-method=thread"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        stopped = None
        try:
            pytest = (sys.executable, "-m", "pytest", "-q", "-rs", "-m", "not slow", f"--junitxml={report}")
            check.run(*pytest, *options, *where)
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
    for case in bad[:20]:
        print(f"failed: {case.get('classname')}::{case.get('name')}")
    on = {name: sum(f"{name}-" in case.get("name", "") for case in good) for name in served}
    note = f"{len(good)} passed, {len(bad)} failed, {len(skips)} skipped"
    note += "".join(f", {count} on {name}" for name, count in on.items())
    if bad:
        note += f"; first: {bad[0].get('classname')}::{bad[0].get('name')}"
    if bad or (complete and not all(on.values())):
        raise Failure(note)
    return note
