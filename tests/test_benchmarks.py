"""``pytest --benchmark``: what it collects, checks, prints and writes. (How fast things are is no test's business.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

pytest.importorskip("pytest_benchmark")


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
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
    result = _pytest("--collect-only", "-q", "-k", "bench_ or test_tests_are_collected")
    assert result.returncode == 0, result.stdout + result.stderr
    collected = [line for line in result.stdout.splitlines() if "::" in line]
    assert collected == ["tests/test_benchmarks.py::test_tests_are_collected_without_the_flag"]


def test_table(tmp_path: Path) -> None:
    """The row on the terminal, in both files, and in what pytest-benchmark keeps."""
    result = _pytest(
        *("--benchmark", "--benchmark-quick", "-k", "bench_prefix_mean"),
        *("--benchmark-save-table", str(tmp_path / "new" / "table"), "--benchmark-json", str(tmp_path / "full.json")),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 comparisons, fused slower than naive in" in result.stdout
    saved = json.loads((tmp_path / "new" / "table.json").read_text())
    assert {"cpu", "threads", "torch", "commit", "date"} <= saved["machine"].keys()
    assert "quick" in saved["note"]
    full = json.loads((tmp_path / "full.json").read_text())
    assert full["machine_info"]["hne"].items() <= saved["machine"].items()
    kept = {bench["extra_info"]["name"]: bench for bench in full["benchmarks"]}
    document = (tmp_path / "new" / "table.md").read_text()
    for row in saved["rows"]:
        assert row["ratio"] == pytest.approx(row["naive_ms"] / row["fused_ms"])
        bench = kept[row["name"]]
        assert row["fused_ms"] == pytest.approx(bench["stats"]["median"] * 1e3)
        assert bench["extra_info"]["naive_ms"] == row["naive_ms"]
        numbers = f"{row['fused_ms']:.3f} | {row['naive_ms']:.3f}"
        assert f"| {row['name']} | {row['shape']} | {numbers}" in document
        assert row["name"] in result.stdout
    assert {row["name"] for row in saved["rows"]} == {"prefix_mean forward", "prefix_mean backward"}


def test_slower_than_naive_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from comparison import Row
    from table import text

    rows = [Row("op", "1 x 1", fused, 2.0, 1.0, 3) for fused in (1.0, 4.0)]
    _, faster, slower = text(rows)
    assert "2.00" in faster
    assert "SLOWER" not in faster
    assert "0.50" in slower
    assert "SLOWER" in slower


def test_sides_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from comparison import check_agreement

    right = torch.tensor([1000.0, 1.0])
    check_agreement((right + 0.05, right), (right, right))
    with pytest.raises(AssertionError, match=r"result 1: fused and naive differ by 0\.2"):
        check_agreement((right, right + 0.2), (right, right))
    with pytest.raises(AssertionError, match="differ by nan"):
        check_agreement(right * float("nan"), right)
    with pytest.raises(AssertionError, match="shape"):
        check_agreement(right[:1], right)
