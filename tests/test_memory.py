"""Freed memory is kept where malloc is glibc's; in a process of its own, as the setting is for good."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch, hne_kernels
if sys.argv[1] == "retain":
    assert hne_kernels.retain_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 << 20)  # 64 MiB, above glibc's largest threshold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_large_tensors_are_given_the_same_memory_again() -> None:
    counts = {}
    for mode in ("default", "retain"):
        run = subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True, check=True)
        counts[mode] = int(run.stdout)
    assert counts["retain"] < 10 < counts["default"]
