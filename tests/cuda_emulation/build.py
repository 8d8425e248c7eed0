"""Compiles the kernels of csrc/cuda for the host, where emulation.h replaces the GPU."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import native  # noqa: E402

SANITIZED = (
    "-fsanitize=address,alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow",
    *("-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
)


def compiler() -> str | None:
    """The command of a C++ compiler, or None."""
    command = os.environ.get("CXX", "g++")
    return command if shutil.which(command.split()[0]) else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``: one process builds there at a time."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _command(level: str, flags: tuple[str, ...]) -> list[str]:
    includes = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    return [
        *(compiler() or "g++").split(),
        *(
            "-std=c++20",
            level,
            "-g1",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
            "-Wno-clobbered",
            "-Werror",
        ),
        *("-ffp-contract=off", "-ftls-model=initial-exec", f"-I{ROOT / 'csrc'}", f"-I{HERE}"),
        *(native.target_define(), *includes, *flags),
    ]


def _run(arguments: list[str]) -> None:
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{result.stderr}")


def _libraries() -> list[str]:
    return [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lpthread"]


def build_program(source: Path, flags: tuple[str, ...] = ()) -> Path:
    """Compile a program that calls the emulation itself, into the folder of ``source``; return its path.

    Raises:
        RuntimeError: The compilation failed; the message is the compiler's output.
    """
    program = source.with_suffix("")
    search = [f"-Wl,-rpath,{path}" for path in cpp_extension.library_paths()]
    sources = [source, HERE / "emulation.cpp", HERE / "fiber.cpp"]
    _run([*_command("-Og", flags), *map(str, sources), "-o", str(program), *_libraries(), *search])
    return program


def build(folder: Path, flags: tuple[str, ...]) -> Path:
    """Compile into ``folder`` and return the library; files that are up to date are not compiled again.

    Raises:
        RuntimeError: A compilation failed; the message is the compiler's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *HERE.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in headers)

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.name}.o"
        if not output.exists() or output.stat().st_mtime < max(newest, source.stat().st_mtime):
            # The kernels take longer to compile than to run, in the emulation; the emulation itself runs longest.
            command = _command("-O3" if source.parent == HERE else "-Og", flags)
            _run([*command, "-x", "c++", "-c", str(source), "-o", str(output)])
        return output

    sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), *sorted(HERE.glob("*.cpp"))]
    library = folder / "libcuda_emulation.so"
    with locked(folder):
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compile_one, sources))
        if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in objects):
            _run([*_command("-Og", flags), "-shared", *map(str, objects), "-o", str(library), *_libraries()])
    return library


def build_sanitized() -> Path:
    """The library of the tests, with sanitizers, which also find unaligned accesses of 16 bytes."""
    return build(ROOT / "build" / "cuda_emulation", SANITIZED)


def sanitized_environ() -> dict[str, str]:
    """What a process needs to load that library: Python is not instrumented, so the runtime is preloaded."""
    preload = [
        subprocess.check_output([(compiler() or "g++").split()[0], f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


def main() -> None:
    """Run ``python build.py FOLDER [FLAG...]``: build and print the path of the library."""
    print(build(Path(sys.argv[1]), tuple(sys.argv[2:])))


if __name__ == "__main__":
    main()
