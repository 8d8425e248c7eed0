"""Registers and memory of compiled GPU kernels, read from a library or from the machine code of one kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Usage:
    """Resources of a kernel on a multiprocessor."""

    registers: int  # per thread
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes per block; memory requested at launch is not included


_TARGET = re.compile(r"^arch = (sm_\w+)")
_KERNEL = re.compile(r"^\s*Function (.+):$")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def of_file(path: Path) -> list[tuple[str, str, Usage]]:
    """Target, mangled name and usage of each kernel in ``path``, read with the cuobjdump that Triton includes."""
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, target, kernel = [], "", ""
    for line in report.splitlines():
        if match := _TARGET.match(line):
            target = match[1]
        elif match := _KERNEL.match(line):
            kernel = match[1]
        elif match := _USAGE.search(line):
            registers, stack, shared, local = map(int, match.groups())
            found.append((target, kernel, Usage(registers, stack + local, shared)))
    return found


def readable(names: list[str]) -> list[str]:
    """Demangle and shorten kernel names."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    shorter = text.replace("(anonymous namespace)::", "").replace("hne::", "").replace("c10::", "")
    return [re.sub(r"^void |\(.*\)$", "", line) for line in shorter.splitlines()]
