"""Steps of the build: both libraries side by side, for this GPU alone, and a look at which backends then load."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time

from gpu_machine import GpuCheck, ask
from timed_steps import ROOT, Failure, RanOut

_FOLDER = ROOT / "build" / "gpu_check"
_STAMP = _FOLDER / "built"
_BACKENDS = """
import json, hne_kernels as K
print(json.dumps([list(K.available_backends()), dict(K.unavailable_backends())]))
"""


def build(check: GpuCheck) -> str:
    """compile the CPU and the CUDA library at the same time, for this GPU alone, without downloads

    Without the CUDA library the check goes on with the other backends.
    """
    failures, note = [], "a rehearsal uses the library that is there"
    if check.device == "cuda":
        major, minor = check.machine["capability"]
        target = f"{major}.{minor}" + ("a" if major == 9 else "")
        stamp = _fingerprint(f"{target} {check.machine['torch']} {sys.implementation.cache_tag}")
        if _STAMP.exists() and _STAMP.read_text() == stamp:
            note = "up to date"
        else:
            failures = _compile(check, target)
            note = f"for sm_{target.replace('.', '')}"
            if not failures:
                _STAMP.write_text(stamp)
    _find_backends(check, failures)
    if failures:
        raise Failure("; ".join(failures))
    return f"{note}; {', '.join(check.backends)}"


def _fingerprint(setting: str) -> str:
    """Identifies the sources and the setting of a build."""
    digest = hashlib.sha256(setting.encode())
    for path in sorted([*ROOT.glob("csrc/**/*.*"), *ROOT.glob("build_backend/*.py"), ROOT / "setup.py"]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _compile(check: GpuCheck, target: str) -> list[str]:
    """Compile both libraries and put them in place; return the reasons of what failed."""
    jobs = str(len(os.sched_getaffinity(0)))
    environ = {"HNE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": target, "MAX_JOBS": jobs}
    command = (sys.executable, "tools/gpu_build.py")
    with check.start(*command, "cuda", **environ) as cuda, check.start(*command, "cpu", **environ) as cpu:
        running = {"CPU": cpu, "CUDA": cuda}
        while any(process.poll() is None for process in running.values()):
            if check.left() <= 0:
                raise RanOut("the compilers were stopped")
            time.sleep(0.1)
        failures = [
            f"the {name} library: exit status {process.returncode}, see {check.log.name}"
            for name, process in running.items()
            if process.returncode
        ]
    for library in (_FOLDER / "lib" / "hne_kernels").glob("*.so"):
        shutil.copy2(library, ROOT / "hne_kernels" / library.name)
    return failures


def _find_backends(check: GpuCheck, failures: list[str]) -> None:
    """Keep the backends that load. Each other one is a row with the reason."""
    found, error = ask(_BACKENDS)
    if found is None:
        check.backends = ()
        raise Failure("; ".join([*failures, f"the package does not load: {error}"]))
    available, reasons = found
    for backend in check.backends:
        if backend not in available:
            check.write_row("build", f"backend {backend}", {"result": "FAILED", "note": reasons[backend]})
            failures.append(f"no {backend}: {reasons[backend]}")
    check.backends = tuple(backend for backend in check.backends if backend in available)
