"""Steps of the build: both libraries side by side, for this GPU alone, and a look at which backends then load.

A CUDA library that was built before is taken from ``build/cuda-HASH`` if the hash of the CUDA sources, of nvcc's flags
and of PyTorch's version fits; it depends neither on the version of Python nor on the machine. A new one is kept there,
and in the folder of the results. ``python tools/build_steps.py`` prints the folder for the targets of a usual build,
and keeps the library of the checkout there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

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
        kept = kept_library(check.machine["torch"], target)
        if _STAMP.exists() and _STAMP.read_text() == stamp:
            note = "up to date"
        else:
            failures = _compile(check, target, kept)
            note = f"for sm_{target.replace('.', '')}" + (f", the CUDA library from {kept.parent.name}" if kept else "")
            if not failures:
                _STAMP.write_text(stamp)
                if kept is None:
                    _keep(cuda_folder(check.machine["torch"], target), check.results)
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


_USUAL = "usual"  # the targets of a build without TORCH_CUDA_ARCH_LIST


def cuda_folder(torch_version: str, target: str, root: Path = ROOT) -> Path:
    """Where a CUDA library of the present sources is kept.

    Args:
        torch_version: with or without the suffix of a build, such as ``+cu130``: its stable ABI is the same.
        target: compute capability, as in ``TORCH_CUDA_ARCH_LIST``, or ``usual`` for the targets of a usual build.
        root: the checkout.
    """
    native = _build_rules()
    targets = native.CUDA_TARGETS if target == _USUAL else (target,)
    setting = (*native.nvcc_flags({}), native.target_define(), *targets, torch_version.partition("+")[0])
    digest = hashlib.sha256(repr(setting).encode())
    for path in sorted([*root.glob("csrc/*.h"), *root.glob("csrc/cuda/*")]):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return root / "build" / f"cuda-{digest.hexdigest()[:16]}"


def _build_rules() -> Any:
    """The module with the flags of the compilers."""
    sys.path.insert(0, str(ROOT / "build_backend"))
    return importlib.import_module("native")


def kept_library(torch_version: str, target: str, root: Path = ROOT) -> Path | None:
    """A CUDA library that was built before from the same sources, for this target or for the usual ones."""
    for targets in (target, _USUAL):
        library = cuda_folder(torch_version, targets, root) / "_C_cuda.so"
        if library.exists() and not (targets == _USUAL and not _is_usual(target)):
            return library
    return None


def _is_usual(target: str) -> bool:
    """Whether the usual build has machine code for this compute capability."""
    native = _build_rules()
    names = {name.partition("_")[2] for name in native.target_names([f"={t}" for t in native.CUDA_TARGETS])}
    return target.replace(".", "") in names


def _keep(folder: Path, *others: Path) -> None:
    """Copy the CUDA library of the checkout to a folder, and into other folders below the same name."""
    for place in (folder, *(other / folder.name for other in others)):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / "hne_kernels" / "_C_cuda.so", place / "_C_cuda.so")


def _compile(check: GpuCheck, target: str, kept: Path | None) -> list[str]:
    """Compile both libraries and put them in place; return the reasons of what failed.

    Args:
        check: runs the compilers.
        target: compute capability.
        kept: a CUDA library that was built before; it is then not compiled.
    """
    if kept is not None:
        place = _FOLDER / "lib" / "hne_kernels"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy2(kept, place / "_C_cuda.so")
    jobs = str(len(os.sched_getaffinity(0)))
    environ = {"HNE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": target, "MAX_JOBS": jobs}
    command = (sys.executable, "tools/gpu_build.py")
    parts = ("cpu",) if kept else ("cuda", "cpu")
    with contextlib.ExitStack() as stack:
        running = {part.upper(): stack.enter_context(check.start(*command, part, **environ)) for part in parts}
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


def main() -> None:
    import torch

    folder = cuda_folder(torch.__version__, _USUAL)
    if (ROOT / "hne_kernels" / "_C_cuda.so").exists():
        _keep(folder)
    print(folder)


if __name__ == "__main__":
    main()
