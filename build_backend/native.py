"""Compilation of the C++ and CUDA libraries.

Environment variables: `CXX` (compiler), `MAX_JOBS` (parallel compile jobs), `HNE_WERROR=1` (warnings are errors),
`HNE_SANITIZE=address,undefined` (instrumented build), `HNE_CUDA=0|1` (CUDA library off | required; by default it is
compiled where there is nvcc and torch has CUDA), `TORCH_CUDA_ARCH_LIST` (GPU targets), `HNE_LOCAL_VERSION=cu130`
(the version becomes 0.1.0+cu130, which tells wheels apart).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

VERSION = "0.1.0"
CPU_LIBRARY = "hne_kernels._C"  # a Python module that also registers the ops
CUDA_LIBRARY = "hne_kernels._C_cuda"  # registers ops, no Python module
TORCH_TARGET = (2, 11)  # oldest supported torch; its stable ABI is the one used
# Machine code for Ampere and Hopper, and PTX, which the driver compiles for every later GPU.
CUDA_TARGETS = ("compute_80,code=sm_80", "compute_90,code=sm_90a", "compute_90,code=compute_90")
OLDEST_PYTHON = "cp310"  # the C API is limited to what this version has, see csrc/python.h
STANDARD = "-std=c++20"  # torch's build helper would add its own: 17 with the oldest supported torch
OLDEST_TARGET = 80  # the kernels copy with cp.async and multiply bfloat16
BYTES_PER_JOB = 3 << 29  # 1.5 GiB: peak memory of a compiler process, rounded up


class BuildError(SystemExit):
    """Ends the build with one line instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"hne_kernels: {message}")


def cpp_flags(environ: Mapping[str, str]) -> list[str]:
    """Flags for every C++ file.

    No flag selects an instruction set: csrc/cpu/microkernels/isa/*.cpp do that for their own functions, and the library
    chooses among those at run time.
    """
    flags = [STANDARD, "-fno-wrapv", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-fno-math-errno", "-ffp-contract=fast"]  # the part of -ffast-math that preserves NaN and infinity
    if environ.get("HNE_WERROR") == "1":
        flags.append("-Werror")
    if sanitizers := environ.get("HNE_SANITIZE"):
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        flags += ["-O1", "-g1", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS", "-DHNE_EMULATED_TILES"]
    else:
        flags += ["-O3", "-g0"]
    return flags


def nvcc_flags(environ: Mapping[str, str]) -> list[str]:
    """Flags for every CUDA file but the targets."""
    flags = [STANDARD, "-O3", "-DUSE_CUDA", "--compiler-options", "-fvisibility=hidden,-Wall,-Wextra"]
    if environ.get("HNE_WERROR") == "1":
        flags += ["--Werror", "all-warnings", "--compiler-options", "-Werror"]
    return flags


def target_flags(environ: Mapping[str, str], arch_flags: Callable[[], list[str]]) -> list[str]:
    """Flags of nvcc for the targets: those of `TORCH_CUDA_ARCH_LIST`, else `CUDA_TARGETS`.

    They are passed in full, as torch's build helper adds none where any flag, such as the path of a header, has the
    letters "arch" in it.

    Args:
        environ: the environment variables.
        arch_flags: torch's translation of `TORCH_CUDA_ARCH_LIST`.
    """
    asked = environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:
        return [f"-gencode=arch={target}" for target in CUDA_TARGETS]
    try:
        flags = arch_flags()
    except (ValueError, IndexError):  # an unknown name; "native" without a GPU
        flags = []
    numbers = [int(number) for target in target_names(flags) for number in re.findall(r"\d+", target)]
    if not numbers or min(numbers) < OLDEST_TARGET:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: expected compute capabilities from {OLDEST_TARGET // 10}.{OLDEST_TARGET % 10} on, "
            f"such as '8.0;9.0+PTX', got {asked!r}."
        )
    return flags


def target_names(flags: Sequence[str]) -> list[str]:
    """Names of the targets in flags of nvcc: `sm_80` for machine code, `compute_90` for PTX."""
    return [flag.rpartition("code=")[2] for flag in flags]


def remove_stale_objects(folder: Path) -> None:
    """Remove object files that are older than a file that they were compiled from, a header for example.

    nvcc wrote the names of those files beside each object. Ninja reads them only where torch has CUDA.
    """
    for listing in folder.rglob("*.d"):
        compiled = listing.with_suffix(".o")
        names = re.split(r"(?<!\\)\s+", listing.read_text().replace("\\\n", " ").partition(": ")[2].strip())
        sources = [Path(name.replace("\\ ", " ")) for name in names if name]
        if compiled.exists() and any(
            not source.exists() or source.stat().st_mtime > compiled.stat().st_mtime for source in sources
        ):
            compiled.unlink()


def target_define() -> str:
    major, minor = TORCH_TARGET
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}"


def job_count(environ: Mapping[str, str], cpus: int, available_bytes: int) -> int:
    """Number of parallel compile jobs: `MAX_JOBS`, else as many as processors and memory allow."""
    if asked := environ.get("MAX_JOBS"):
        if not asked.isdigit() or int(asked) == 0:
            raise BuildError(f"MAX_JOBS must be a positive integer, got {asked!r}.")
        return int(asked)
    return max(1, min(cpus, available_bytes // BYTES_PER_JOB))


def available_bytes() -> int:
    """Free memory of the machine, or of the container if that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(match.group(1)) * 1024 if match else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def cxx_compiler(environ: Mapping[str, str]) -> str:
    """Command of the C++ compiler: `CXX`, else the first known compiler on the PATH."""
    candidates = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in candidates:
        # `CXX` may contain a launcher or flags ("ccache g++"), so only its first word must be a program.
        if shutil.which(command.split()[0], path=environ.get("PATH")):
            return command
    raise BuildError(
        f"no C++ compiler found ({', '.join(candidates)}). Install one with C++20, "
        "for example `apt install g++` or `conda install gxx`, or name yours in CXX."
    )


def check_python_headers() -> None:
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise BuildError(
            f"Python.h is missing. Install the headers of Python {platform.python_version()}, "
            "for example `apt install python3-dev`."
        )
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise BuildError("free-threaded Python has no stable ABI yet; use a Python with the global interpreter lock.")


def cuda_toolkit(environ: Mapping[str, str], torch_version: str, torch_cuda: str | None) -> tuple[Path | None, str]:
    """Folder of the CUDA toolkit, or None and the reason why the CUDA library is not to be compiled.

    The toolkit is that in `CUDA_HOME`, else the one that the nvcc on the PATH reports.

    Args:
        environ: the environment variables.
        torch_version: the version of torch.
        torch_cuda: `torch.version.cuda`; None for a torch without CUDA, which cannot load the library.
    """
    asked = environ.get("HNE_CUDA") or None
    if asked not in (None, "0", "1"):
        raise BuildError(f"HNE_CUDA must be 0 (no CUDA library) or 1 (it is required), got {asked!r}.")
    if asked == "0":
        return None, "it was built with HNE_CUDA=0 (wheels that have it are versions with +cu)"
    if asked is None and torch_cuda is None:
        return None, f"torch {torch_version} is without CUDA and could not load it (HNE_CUDA=1 compiles it anyway)"
    if home := environ.get("CUDA_HOME"):
        nvcc: str | None = str(Path(home, "bin", "nvcc"))
    else:
        nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc and Path(nvcc).exists():
        # The nvcc on the PATH is often a wrapper outside the toolkit, so nvcc itself is asked.
        dry = subprocess.run([nvcc, "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        if match := re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE):
            return Path(match.group(1)).resolve(), ""
    if asked == "1":
        raise BuildError(
            "HNE_CUDA=1 asks for the CUDA library, but there is no nvcc. "
            "Install the CUDA toolkit and put nvcc on the PATH or its folder in CUDA_HOME."
        )
    return None, "there was no nvcc (install the CUDA toolkit, put nvcc on the PATH or its folder in CUDA_HOME)"


def git_commit(root: Path) -> str:
    """Short hash of the checkout, with "-dirty" after edits; empty outside a checkout."""
    if not (root / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip()


def extensions(root: Path) -> list[Extension]:
    """The libraries that have sources."""
    cpu = [*root.glob("csrc/*.cpp"), *root.glob("csrc/cpu/**/*.cpp")]
    cuda = [*root.glob("csrc/cuda/**/*.cu"), *root.glob("csrc/cuda/**/*.cpp")]
    headers = [*root.glob("csrc/**/*.h"), *root.glob("csrc/**/*.cuh")]

    def extension(name: str, sources: Sequence[Path]) -> Extension:
        # setuptools requires paths relative to setup.py
        relative = sorted(str(path.relative_to(root)) for path in sources)
        depends = sorted(str(path.relative_to(root)) for path in headers)
        return Extension(name, relative, depends=depends, language="c++", py_limited_api=name == CPU_LIBRARY)

    result = [extension(CPU_LIBRARY, cpu)]
    if cuda:
        result.append(extension(CUDA_LIBRARY, cuda))
    return result


def version(environ: Mapping[str, str]) -> str:
    """Version of the package, with `HNE_LOCAL_VERSION` after a plus sign."""
    local = environ.get("HNE_LOCAL_VERSION")
    return f"{VERSION}+{local}" if local else VERSION


def write_build_info(folder: Path, values: Mapping[str, Any]) -> None:
    """Write build_info.h for csrc/bindings.cpp, unless its content is unchanged."""
    lines = ["// Written by build_backend/native.py.", "#pragma once"]
    for key, value in values.items():
        text = value if isinstance(value, str) else " ".join(value)
        lines.append(f"#define HNE_{key.upper()} {json.dumps(text)}")
    content = "\n".join(lines) + "\n"
    path = folder / "build_info.h"
    if not path.exists() or path.read_text() != content:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def build_command(root: Path) -> type[build_ext]:
    """Return the `build_ext` command, based on torch's; without torch, a command that fails with an explanation."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # NumPy is not needed here
            import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _BuildWithoutTorch
    from torch.utils import cpp_extension

    toolkit, missing = cuda_toolkit(os.environ, torch.__version__, torch.version.cuda)
    if toolkit:
        cpp_extension.CUDA_HOME = str(toolkit)  # torch leaves it None in builds without CUDA

    class Build(cpp_extension.BuildExtension):
        """Compiles the CUDA library if possible, then the CPU library, which stores the outcome."""

        extensions: list[Extension]
        target_flags: list[str]

        def finalize_options(self) -> None:
            super().finalize_options()
            # Always the same folder, even when pip passes a temporary one, so that rebuilds are incremental.
            kind = os.environ.get("HNE_SANITIZE", "release").replace(",", "-")
            self.build_temp = str(root / "build" / f"{kind}-{sys.implementation.cache_tag}")

        def run(self) -> None:
            os.environ["CXX"] = cxx_compiler(os.environ)
            check_python_headers()
            jobs = job_count(os.environ, len(os.sched_getaffinity(0)), available_bytes())
            os.environ["MAX_JOBS"] = str(jobs)
            super().run()
            if self.inplace and CUDA_LIBRARY not in [extension.name for extension in self.extensions]:
                (root / "hne_kernels" / "_C_cuda.so").unlink(missing_ok=True)  # left by an earlier build

        def get_ext_filename(self, fullname: str) -> str:
            filename: str = super().get_ext_filename(fullname)
            if fullname.endswith("_C_cuda"):  # not a Python module, so without a Python version in its name
                return filename.replace(sysconfig.get_config_var("EXT_SUFFIX"), ".so")
            return filename

        def build_extensions(self) -> None:
            cpu = [extension for extension in self.extensions if extension.name == CPU_LIBRARY]
            cuda = [extension for extension in self.extensions if extension.name == CUDA_LIBRARY]
            without, targets = missing, []
            if not cuda and os.environ.get("HNE_CUDA") == "1":
                raise BuildError("HNE_CUDA=1, but this version has no CUDA sources (csrc/cuda).")
            if cuda and toolkit:
                try:
                    self.target_flags = target_flags(os.environ, cpp_extension._get_cuda_arch_flags)
                    remove_stale_objects(Path(self.build_temp, "csrc", "cuda"))
                    self._build(cuda)
                    targets = target_names(self.target_flags)
                except BuildError as error:
                    if os.environ.get("HNE_CUDA") == "1":
                        raise
                    without = "its compilation failed (HNE_CUDA=1 makes that an error)"
                    self.warn(f"going on without the CUDA library. {error}")
            elif cuda:
                print(f"hne_kernels: no CUDA library is compiled, as {without}.")
            self._write_build_info(targets, without)
            self._build(cpu)
            self.extensions = cpu if without else [*cpu, *cuda]

        def _build(self, chosen: list[Extension]) -> None:
            self.extensions = chosen
            try:
                super().build_extensions()
            except (RuntimeError, BaseError, OSError) as error:
                names = ", ".join(extension.name for extension in chosen)
                raise BuildError(f"building {names} failed, see above: {error}") from None

        def _write_build_info(self, cuda_targets: list[str], without_cuda: str) -> None:
            write_build_info(
                Path(self.build_temp),
                {
                    "version": self.distribution.get_version(),
                    "commit": git_commit(root),
                    "flags": cpp_flags(os.environ),
                    "torch": torch.__version__,
                    "torch_target": ".".join(map(str, TORCH_TARGET)),
                    "sanitizers": os.environ.get("HNE_SANITIZE", "").replace(",", " "),
                    "cuda_targets": cuda_targets,
                    "without_cuda": without_cuda,
                },
            )

        def build_extension(self, extension: Extension) -> None:
            """Compile with the headers and libraries of torch and the CUDA toolkit."""
            system = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
            common = [target_define(), *system]
            extension.extra_compile_args = {
                "cxx": [*cpp_flags(os.environ), *common],
                "nvcc": [*nvcc_flags(os.environ), *common],
            }
            if extension.name == CUDA_LIBRARY:
                extension.extra_compile_args["nvcc"] += self.target_flags
                if torch.version.cuda is None:  # else torch lists the headers of an object for ninja
                    extension.extra_compile_args["nvcc"].append("-MMD")  # for remove_stale_objects
            extension.include_dirs = [str(root / "csrc"), self.build_temp]
            extension.library_dirs = cpp_extension.library_paths()
            extension.libraries = ["torch_cpu"]
            if sanitizers := os.environ.get("HNE_SANITIZE"):
                extension.extra_link_args = [f"-fsanitize={sanitizers}"]
            if extension.name == CUDA_LIBRARY:
                assert toolkit is not None
                extension.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
                # Static, so that no libcudart besides torch's must be found at run time.
                extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
            super().build_extension(extension)

    return Build


class _BuildWithoutTorch(build_ext):
    def run(self) -> None:
        raise BuildError(
            "PyTorch is needed to build. Install torch first, or let pip fetch it: "
            "`pip install` without --no-build-isolation."
        )
