"""``pytest --benchmark``: collection, checks, output and files. (No test judges speed.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytest.importorskip("pytest_benchmark")


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread: the work is tiny. Under the name of a worker, pytest-benchmark would not measure.
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_benchmarks_are_collected_instead_of_the_tests() -> None:
    result = _pytest("--benchmark", "--collect-only", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    files = {line.partition("::")[0] for line in result.stdout.splitlines() if "::" in line}
    assert files == {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("bench_*.py")}


def test_tests_are_collected_without_the_flag() -> None:
    # The other folders of the tests are left out: their imports would take most of the time.
    others = [f"--ignore={path}" for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "benchmarks"]
    result = _pytest("--collect-only", "-q", *others, "-k", "bench_prefix_mean or test_tests_are_collected")
    assert result.returncode == 0, result.stdout + result.stderr
    collected = [line for line in result.stdout.splitlines() if "::" in line]
    assert collected == ["tests/benchmarks/test_benchmarks.py::test_tests_are_collected_without_the_flag"]


def test_table(tmp_path: Path) -> None:
    """A row stands on the terminal, in both files, and in the output of pytest-benchmark."""
    result = _pytest(
        *("--benchmark", "--benchmark-quick", "-k", "bench_prefix_mean"),
        *("--benchmark-save-table", str(tmp_path / "new" / "table"), "--benchmark-json", str(tmp_path / "full.json")),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 comparisons, fused slower than another side in" in result.stdout
    assert "peak in float32, measured beside each row: " in result.stdout
    saved = json.loads((tmp_path / "new" / "table.json").read_text())
    assert {"cpu", "threads", "torch", "commit", "date"} <= saved["machine"].keys()
    assert "quick" in saved["note"]
    full = json.loads((tmp_path / "full.json").read_text())
    assert full["machine_info"]["hne"].items() <= saved["machine"].items()
    by_row = {tuple(bench["extra_info"][key] for key in ("name", "shape")): bench for bench in full["benchmarks"]}
    document = (tmp_path / "new" / "table.md").read_text()
    for row in saved["rows"]:
        assert row["ratio"] == pytest.approx(row["naive_ms"] / row["fused_ms"])
        bench = by_row[row["name"], row["shape"]]
        assert row["fused_ms"] == pytest.approx(bench["stats"]["median"] * 1e3)
        assert bench["extra_info"]["naive_ms"] == row["naive_ms"]
        numbers = f"{row['fused_ms']:.3f} | {row['naive_ms']:.3f}"
        assert f"| {row['name']} | {row['shape']} | {numbers}" in document
        assert row["name"] in result.stdout
    assert {row["name"] for row in saved["rows"]} == {"prefix_mean forward", "prefix_mean backward"}


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every side of every comparison, tiny and on the CPU: all sides agree and appear in the table."""
    result = _pytest(
        *("--benchmark", "--benchmark-workload", "rehearsal", "--benchmark-quick"),
        *("--benchmark-save-table", str(tmp_path / "table")),
        *("-k", "training and bfloat16 or 2-2 or anytime or hierarchical or conv2d and stem"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    sides = {row["name"]: set(row.get("others_ms", {})) for row in rows}  # inference: the last row, in float32
    compiled = {"compiled", "channels_last", "channels_last_compiled"}
    installed = {name for name in ("onnxruntime", "openvino") if find_spec(name)}
    assert sides["inference"] == compiled | {"eager", "frozen"} | installed
    assert sides["training step"] == compiled | {"eager"}
    assert sides["anytime"] == set()
    assert sides["branch_conv2d backward"] == sides["fused_conv2d"] == compiled
    assert sides["hierarchical_distillation_loss both ways"] == {"compiled"}
    assert sides["back to back"] == installed
    assert all(set(row["p99_ms"]) == {"fused", *installed} for row in rows if row["name"] == "back to back")
    busy = {"a process spins on a core"} | ({"an engine's threads spin"} if "onnxruntime" in installed else set())
    assert {name for name in sides if "spin" in name} == busy
    without_peak = {"op call", "back to back", *busy}
    assert all(row["of_peak"] > 0 for row in rows if row["name"] not in without_peak)
    assert {row["backend"] for row in rows if row["name"] == "op call"} == {"cpp", "dispatcher"}
    for title in ("Anytime, through all models", "An op call on tiny inputs", "Calls back to back"):
        assert title in (tmp_path / "table.md").read_text()
        assert title in result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith("inference ")]
    assert len(table) == 2, "both dtypes"


def test_no_comparison_begins_beyond_the_budget() -> None:
    result = _pytest("--benchmark", "--benchmark-quick", "--benchmark-budget", "0", "-k", "bench_prefix_mean")
    assert "4 skipped" in result.stdout, result.stdout
    assert "the budget of 0 s is used up" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpus_workload_needs_one() -> None:
    result = _pytest("--benchmark", "--benchmark-workload", "gpu", "--collect-only", "-q")
    assert result.returncode != 0
    assert "no backend can serve a GPU here (cuda: " in result.stdout + result.stderr
