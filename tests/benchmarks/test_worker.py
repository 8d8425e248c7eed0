"""Sides in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from networks import TREES, build

from hne import FusedHNE
from hne.inference import ENGINES, missing

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.usefixtures("_import_benchmarks")


def test_workers_compute_the_same_and_tell_the_time_of_each_call(tmp_path: Path, rng: torch.Generator) -> None:
    from comparison import check_agreement
    from worker import Worker, make_side, write_files

    files = write_files(tmp_path, build(FusedHNE, TREES["doubling"], rng, torch.float32), 3, 12)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_files(tmp_path, build(FusedHNE, TREES["doubling"], rng, torch.float32), 3, 12)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    expected = make_side("fused", files, 2)()
    assert expected.shape == (2, 5)
    for name in ("fused", *(name for name in ENGINES if missing(name) is None)):
        with Worker(name, files, 2, environ={"HNE_TEST": "1"}) as worker:
            assert worker.pid != os.getpid()
            check_agreement(worker.result(), expected)
            seconds = worker.calls(0.05)
            assert 0.02 <= sum(seconds) < 5, "without the call that began in the time of warming up"
            assert min(seconds) > 0
    assert "HNE_TEST" not in os.environ


def test_a_worker_that_fails(tmp_path: Path) -> None:
    from worker import Files, Worker

    with pytest.raises(RuntimeError, match=r"fused: FileNotFoundError: .*weights.pt"):
        Worker("fused", Files(tmp_path, 1, 8), 1)
