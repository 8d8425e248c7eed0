"""Loads the compiled libraries: `_C` (CPU, always) and `_C_cuda` (where it was built and torch has CUDA).

Importing this module registers the ops `torch.ops.hne.*`. `HNE_EXTENSION_DIR` names another folder to load the
libraries from, for example a build with sanitizers. `HNE_CUDA_EMULATION` names a library with the CUDA kernels compiled
for the host (tests/cuda_emulation), which then replace the CPU kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

OLDEST_TORCH = (2, 11)  # the libraries use the stable ABI of this version, which newer ones keep
OLDEST_GPU = (8, 0)  # compute capability: the kernels copy with cp.async and multiply bfloat16
_REBUILD = "Rebuild it: `pip install -e .` in a checkout, or install the wheel again."


def _check_complete(library: Path) -> None:
    """Raise ImportError for a truncated ELF file, as loading one kills the process."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) == 64 and header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        (table,) = struct.unpack_from("<Q", header, 40)  # the section table, which comes last in the file
        size, count = struct.unpack_from("<HH", header, 58)
        if library.stat().st_size < table + size * count:
            raise ImportError(f"{library}: file is cut off")


def check_torch() -> None:
    """Raise ImportError for a torch that is too old for the libraries, which would lack symbols."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        oldest, found = ".".join(map(str, OLDEST_TORCH)), f"{torch.__version__} in {Path(torch.__file__).parent}"
        raise ImportError(
            f"hne_kernels needs torch {oldest} or newer, found torch {found}. "
            f"Upgrade it: `pip install 'torch>={oldest}'`."
        )


def load_cpu_library(folder: Path) -> ModuleType:
    """Import `hne_kernels._C` from `folder`.

    Raises:
        ImportError: it is missing or damaged, or does not fit this torch; the message says which, and what to do.
    """
    check_torch()
    name, library = "hne_kernels._C", folder / "_C.abi3.so"
    if not library.exists():
        raise ImportError(f"hne_kernels has no compiled library {library}. {_REBUILD}")
    try:
        _check_complete(library)
        spec = spec_from_file_location(name, library)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(
            f"hne_kernels cannot load its compiled library with torch {torch.__version__}: {error}. {_REBUILD}"
        ) from error
    module.cpu_capability()  # raises for an HNE_CPU_CAPABILITY that this machine cannot serve
    sys.modules[name] = module
    return module


def load_cuda_library(folder: Path) -> str | None:
    """Register the CUDA ops from `folder`, and return None or the reason why that failed."""
    library = folder / "_C_cuda.so"
    if not library.exists():
        reason = _CPU_LIBRARY.build_info().get("without_cuda")
        return "this build has no CUDA library" + (f", as {reason}" if reason else f" in {folder}")
    if torch.version.cuda is None:
        return f"built, but torch {torch.__version__} is without CUDA"
    if not torch.cuda.is_available():
        return "built, but torch sees no GPU"
    try:
        _check_complete(library)
        # The library does not name libtorch_cuda, as it may have been linked against a torch without CUDA.
        ctypes.CDLL("libtorch_cuda.so", ctypes.RTLD_GLOBAL)
        torch.ops.load_library(library)
    except (ImportError, OSError) as error:
        return f"built, but does not load: {error}"
    return None


def load_cuda_emulation(library: str | None) -> bool:
    """Load the CUDA kernels compiled for the host, if there are any; they then serve tensors on the CPU."""
    if library:
        torch.ops.load_library(library)
    return bool(library)


_FOLDER = Path(os.environ.get("HNE_EXTENSION_DIR") or Path(__file__).parent)
_CPU_LIBRARY = load_cpu_library(_FOLDER)
CUDA_EMULATED = load_cuda_emulation(os.environ.get("HNE_CUDA_EMULATION"))
_CUDA_UNAVAILABLE = None if CUDA_EMULATED else load_cuda_library(_FOLDER)


def cpu_library() -> ModuleType:
    """The module `hne_kernels._C`."""
    return _CPU_LIBRARY


def cuda_unavailable() -> str | None:
    """Why there are no CUDA ops, or None if there are."""
    return _CUDA_UNAVAILABLE


def can_run(target: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs code that was compiled for ``target``.

    Machine code (``sm_80``) runs on the GPUs of that generation, from that capability on; ``sm_90a`` on that very
    capability. The driver compiles PTX (``compute_90``) for all GPUs from that capability on, and ``compute_90a`` for
    that very one. (CUDA C++ Programming Guide, 6.1.2 to 6.1.4)
    """
    kind, _, name = target.partition("_")
    number = int(name.rstrip("af"))
    least = (number // 10, number % 10)
    if name.endswith("a"):
        return capability == least
    if kind == "sm" or name.endswith("f"):
        return capability[0] == least[0] and capability >= least
    return capability >= least


@functools.cache
def gpu_refusal(backend: str, index: int) -> str | None:
    """Why the GPU of this index cannot run the kernels of ``backend``, ``cuda`` or ``triton``, or None."""
    capability, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
    number = f"{capability[0]}.{capability[1]}"
    if capability < OLDEST_GPU:
        return f"the kernels need compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}, {name} has {number}"
    targets = build_info()["cuda_targets"].split()
    if backend == "cuda" and not any(can_run(target, capability) for target in targets):
        return (
            f"the CUDA library has code for {', '.join(targets) or 'no GPU'}, {name} has compute capability {number} "
            f"(rebuild with TORCH_CUDA_ARCH_LIST={number})"
        )
    return None


def every_gpu_refused(backend: str) -> str | None:
    """Why none of the GPUs that torch can use runs the kernels of ``backend``, or None."""
    refusals = [gpu_refusal(backend, index) for index in range(torch.cuda.device_count())]
    return "; ".join(dict.fromkeys(filter(None, refusals))) if refusals and all(refusals) else None


def build_info() -> dict[str, Any]:
    """How the libraries were built, as texts: version, commit, compiler, flags, torch, sanitizers.

    ``cuda_targets`` has the targets of the CUDA library, ``sm_80`` for machine code, ``compute_90`` for PTX;
    ``without_cuda`` is the reason why it was not compiled.
    """
    info: dict[str, Any] = _CPU_LIBRARY.build_info()
    return info
