"""Versions, build, machine and backends, as a report."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import dispatch, extension

Section = tuple[str, dict[str, str]]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    gpus = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        gpus.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    return ", ".join(gpus)


def _extensions(library: Any) -> str:
    """What the kernels for int8 and bfloat16 use besides."""
    bfloat16 = {"amx": "AMX", "avx512": "BF16", "portable": "portable BF16"}.get(library.cpu_bfloat16())
    used = [name for name in ("VNNI" if library.cpu_vnni() else None, bfloat16) if name]
    return f" with {' and '.join(used)}" if used else ""


def processor_name() -> str:
    """Model name of the processor, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment_report() -> list[Section]:
    """Installed versions, properties of the build and the machine, and usable backends.

    Returns:
        Sections, each with its title and its values by name.
    """
    build = extension.build_info()
    library = extension.cpu_library()
    backends = dict.fromkeys(dispatch.available_backends(), "usable")
    backends |= {name: f"no: {why}" for name, why in dispatch.unavailable_backends().items()}
    torch_cuda = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return [
        (
            "versions",
            {
                "hne_kernels": " ".join(filter(None, (build["version"], build["commit"]))),
                "python": f"{platform.python_version()} ({platform.machine()})",
                "torch": f"{torch.__version__} ({torch_cuda})",
                "triton": _version("triton"),
                "numpy": _version("numpy"),
            },
        ),
        (
            "build",
            {
                "compiler": build["compiler"],
                "flags": build["flags"],
                "torch": f"{build['torch']}, runs with {build['torch_target']} and newer",
                "sanitizers": build["sanitizers"] or "none",
                "CUDA targets": build["cuda_targets"] or "none",
                "loaded from": str(library.__file__),
            },
        ),
        (
            "machine",
            {
                "processor": processor_name(),
                "CPU instructions": f"{library.cpu_capability()}{_extensions(library)} "
                f"(this machine: {library.cpu_capabilities_supported()})",
                "threads": str(torch.get_num_threads()),
                "GPUs": _gpus(),
            },
        ),
        ("backends", backends),
    ]
