"""Peak memory of a call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytestmark = [
    pytest.mark.usefixtures("_import_benchmarks"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process"),
]


def test_memory_at_the_peak() -> None:
    import memory

    def call() -> None:
        first = torch.ones(8 << 20)
        del first
        torch.ones(12 << 20)

    assert 46 <= memory.peak_mib(call) < 78, "one at a time, 32 and 48 MiB"


def test_memory_of_a_training_step() -> None:
    import memory
    from bench_model import _memory_of_step
    from workload import TINY

    small, large = (memory.in_fresh_process(_memory_of_step, "fused", TINY, batch, {}, 1) for batch in (64, 1024))
    assert 0 <= small < large
