"""What the compiled CUDA kernels take of a GPU: registers, spills and shared memory of each, per target.

Shared memory is what the compiler knows of. What a launch adds is limited where it is decided: by a static_assert
(gemm.h), by what the device says it has (fused_bottleneck.cu, hierarchical_distillation_loss.cu), and for all by the
emulation, which has what the least GPU has.

``python tests/cuda_resources.py`` prints the table.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))

import native  # noqa: E402


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one target."""

    source: str
    kernel: str
    target: str
    registers: int
    spilled: int  # bytes
    stack: int  # bytes
    shared: int  # bytes, static


_ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<target>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:, used \d+ barriers)?(?:, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def readable(kernels: list[str]) -> list[str]:
    """Demangled names, shortened."""
    tool = shutil.which("c++filt")
    if tool is None or not kernels:
        return kernels
    text = subprocess.run([tool], input="\n".join(kernels), capture_output=True, text=True, check=True).stdout
    shorter = text.replace("hne::", "").replace("(anonymous namespace)::", "").replace("c10::", "")
    return [re.sub(r"^void |\(.*\)$", "", line) for line in shorter.splitlines()]


def compile_all(folder: Path) -> list[Usage]:
    """Compile and link the CUDA library in ``folder``, warnings being errors.

    Raises:
        RuntimeError: with what the compiler says.
    """
    targets = [target.replace(".", "") for target in native.CUDA_TARGETS.split(";")]
    includes = [word for path in cpp_extension.include_paths() for word in ("-isystem", path)]
    toolkit = native.cuda_toolkit(os.environ)
    assert toolkit is not None
    nvcc = str(toolkit / "bin" / "nvcc")
    flags = [
        *native.nvcc_flags({"HNE_WERROR": "1"}),
        *("-std=c++20", "-Xcompiler", "-fPIC", "--resource-usage", f"-I{ROOT / 'csrc'}", native.target_define()),
        *includes,
        *(f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets),
    ]

    def run(command: list[str]) -> str:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        return result.stdout + result.stderr

    def compile_one(source: Path) -> list[Usage]:
        said = run([nvcc, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
        found = [match.groupdict() for match in _ENTRY.finditer(said)]
        names = readable([entry["kernel"] for entry in found])
        return [
            Usage(
                source.name,
                name,
                entry["target"],
                int(entry["registers"]),
                int(entry["stores"]) + int(entry["loads"]),
                int(entry["stack"]),
                int(entry["shared"] or 0),
            )
            for entry, name in zip(found, names, strict=True)
        ]

    # The largest first, so that no processor is left with it at the end.
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda path: path.stat().st_size, reverse=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        usages = [usage for part in pool.map(compile_one, sources) for usage in part]
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    search = [f"-L{path}" for path in cpp_extension.library_paths()]
    run([nvcc, "-shared", *objects, "-o", str(folder / "_C_cuda.so"), *search, "-ltorch_cpu", "-cudart=static"])
    return usages


def table(usages: list[Usage]) -> str:
    """One line a kernel and target."""
    lines = [f"{'target':7} {'registers':>9} {'spilled':>7} {'stack':>5} {'shared':>6}  kernel"]
    lines += [
        f"{u.target:7} {u.registers:9} {u.spilled:7} {u.stack:5} {u.shared:6}  {u.source}: {u.kernel}" for u in usages
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(table(compile_all(Path(temporary))))
