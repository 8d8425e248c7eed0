"""Tables and plots of the benchmarks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.usefixtures("_import_benchmarks")


def _row(**given: object) -> Any:
    from comparison import Row

    values = {"name": "op", "shape": "1 x 1", "fused_ms": 1.0, "naive_ms": 2.0, "images_per_s": 1.0, "rounds": 3}
    return Row(**(values | given))


def _inference(n: int, batch: int, fused_ms: float, **given: Any) -> Any:
    case = {"network": "net", "num_models": n, "batch": batch, "dtype": "float32", "macs": 100 * n}
    return _row(**{"name": "inference", "shape": f"n = {n}, batch {batch}", "fused_ms": fused_ms, "case": case} | given)


def _back_to_back(**given: Any) -> Any:
    p99 = {"fused": 3.0, "onnxruntime": 9.0, "openvino": 6.0}
    values = {"naive_ms": math.nan, "others_ms": {"onnxruntime": 4.0, "openvino": 5.0}, "p99_ms": p99, "fused_ms": 2.0}
    return _row(**({"name": "back to back"} | values | given))


def test_rows_in_which_one_side_is_measured_again(tmp_path: Path) -> None:
    from table import read_rows, save

    save(tmp_path / "table", [_back_to_back()], {})
    save(tmp_path / "table", [_back_to_back(fused_ms=1.0, others_ms={}, p99_ms={"fused": 2.5})], {})
    (row,) = read_rows(json.loads((tmp_path / "table.json").read_text()))
    assert (row.fused_ms, row.others_ms) == (1.0, {"onnxruntime": 4.0, "openvino": 5.0})
    assert row.p99_ms == {"fused": 2.5, "onnxruntime": 9.0, "openvino": 6.0}
    assert "1.000 / 2.500 | 4.000 / 9.000" in (tmp_path / "table.md").read_text()


def test_slower_than_naive_is_marked() -> None:
    from table import text

    _, faster, slower = text([_row(fused_ms=fused) for fused in (1.0, 4.0)])
    assert "2.00" in faster
    assert "SLOWER" not in faster
    assert "0.50" in slower
    assert "SLOWER" in slower


def test_the_fastest_naive_side_counts() -> None:
    from table import markdown, text

    rows = [
        _row(backend="cuda", others_ms={"eager": 8.0, "channels_last": 1.5}, floor_ms=0.25),
        _row(backend="triton", fused_ms=4.0),
    ]
    assert [row.ratio for row in rows] == [1.5, 0.5]
    head, first, second = (line.split() for line in text(rows))
    assert " ".join(head[2:]) == ("backend fused ms naive ms naive eager ms channels-last ms images/s ratio of peak")
    assert first[-6:] == ["2.000", "8.000", "1.500", "1", "1.50", "25%"]
    assert second[-4:] == ["2.000", "1", "0.50", "SLOWER"]
    table = [line for line in markdown(rows, {}, "").splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1, table


def test_tables_grow_on_the_same_machine_and_commit(tmp_path: Path) -> None:
    from table import save

    here = {"gpu": "A", "commit": "1", "date": "today"}
    save(tmp_path / "table", [_row(), _row(shape="2 x 2", backend="cuda", others_ms={"eager": 9.0})], here)
    save(tmp_path / "table", [_row(fused_ms=0.5), _row(shape="3 x 3")], here | {"date": "tomorrow"})
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["shape"], row["fused_ms"]) for row in rows] == [("2 x 2", 1.0), ("1 x 1", 0.5), ("3 x 3", 1.0)]
    assert rows[0]["others_ms"] == {"eager": 9.0}
    save(tmp_path / "table", [_row()], here | {"commit": "2"})
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 1


def test_failed_sides_stand_in_the_table(tmp_path: Path) -> None:
    from table import read_rows, save, summary

    nan = float("nan")
    failed = {"triton": "ValueError: why", "compiled": "no compiler"}
    rows = [
        _row(backend="cuda", others_ms={"eager": 3.0}, failed=failed),
        _row(backend="triton", fused_ms=nan, images_per_s=nan, others_ms={"eager": 3.0}, failed=failed),
    ]
    save(tmp_path / "table", rows, {})
    document = (tmp_path / "table.md").read_text()
    lines = [line.split("|")[3:-1] for line in document.splitlines() if line.startswith("| op")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["cuda", "1.000", "2.000", "3.000", "failed", "1", "2.00", ""],
        ["triton", "failed", "2.000", "3.000", "failed", "", "", ""],
    ]
    assert "- op, 1 x 1: triton: ValueError: why" in document
    assert summary(rows).endswith("slower than another side in 0; 2 sides failed")
    record = json.loads((tmp_path / "table.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert [row.failed for row in read_rows(record)] == [failed, failed]


def test_earlier_cells_stay_beside_new_ones(tmp_path: Path) -> None:
    """A second run with fewer sides, or that is cut off, loses no cell."""
    from table import read_rows, save

    nan = float("nan")
    save(tmp_path / "table", [_row(backend="cuda", others_ms={"eager": 3.0}, failed={"compiled": "why"})], {})
    save(tmp_path / "table", [_row(backend="cuda", fused_ms=nan, images_per_s=nan, naive_ms=2.5)], {})
    (row,) = read_rows(json.loads((tmp_path / "table.json").read_text()))
    assert (row.fused_ms, row.naive_ms, row.images_per_s, row.others_ms) == (1.0, 2.5, 1.0, {"eager": 3.0})
    assert row.failed == {"compiled": "why"}
    save(tmp_path / "table", [_row(backend="cuda", others_ms={"compiled": 4.0}, failed={"eager": "now"})], {})
    (row,) = read_rows(json.loads((tmp_path / "table.json").read_text()))
    assert row.others_ms == {"compiled": 4.0}
    assert row.failed == {"eager": "now"}


def test_small_tables() -> None:
    from derived import BUSY_CORE, small_tables
    from table import markdown, text

    rows = [
        *(_inference(n, batch, n * batch * (1.0 if n == 4 else 1.2)) for n in (2, 4) for batch in (8, 64)),
        _inference(4, 8, 40.0, name="anytime"),
        _row(name="op call", shape="an op", fused_ms=0.012),
        _row(name="op call", shape="an op", fused_ms=0.004, backend="dispatcher"),
        _row(name="training step", memory_mib={"fused": 1000.4, "naive": 2000.0}),
        _row(name=BUSY_CORE, others_ms={"a": 1.5, "b": 3.0}, p99_ms={"fused": 4.0, "a": 8.0, "b": 3.0}),
        *(_back_to_back(shape=f"n = {n}", fused_ms=2.0 * n) for n in (1, 4)),
        _back_to_back(shape="alone", others_ms={}, p99_ms={"fused": 3.0}),
    ]
    tables = {table.title.partition(":")[0].partition(",")[0]: table for table in small_tables(rows)}
    assert {title: list(table.lines) for title, table in tables.items()} == {
        "The first n models against all": [("net", batch, "2 of 4", "60.0%", "50.0%", "+20%") for batch in ("8", "64")],
        "Time per image at batch 64 against batch 8": [
            ("net", n, ms, ms, "1.00") for n, ms in (("2", "2.400"), ("4", "4.000"))
        ],
        "Anytime": [("net", "8", "40.000", "32.000", "1.25")],
        "Calls back to back": [
            ("n = 1", "2.000 / 3.000", "4.000 / 9.000", "5.000 / 6.000", "2.00", "2.00"),
            ("n = 4", "8.000 / 3.000", "4.000 / 9.000", "5.000 / 6.000", "0.50", "2.00"),
            ("alone", "2.000 / 3.000", "", "", "", ""),
        ],
        "An op call on tiny inputs": [("an op", "12.0", "4.0", "8.0", "2000.0")],
        "Memory of a training step at its peak": [("1 x 1", "1,000", "2,000")],
        "The same while another process spins on one of the cores": [
            ("1 x 1", "1.000 / 4.000", "1.500 / 8.000", "3.000 / 3.000", "1.50", "0.75")
        ],
    }
    assert small_tables([_row()]) == []
    document = markdown(rows, {}, "")
    assert all(f"## {table.title}" in document for table in tables.values())
    assert not any(line.startswith(("| op call |", "| back to back |")) for line in document.splitlines())
    assert "| training step |" in document
    assert "backend" not in text(rows[:4])[0]


def test_plots(tmp_path: Path) -> None:
    from plot import save_plots, time_per_image
    from table import save

    others = {"onnxruntime": 3.0, "frozen": 4.0}
    rows = [_inference(n, batch, 2.0 * batch, others_ms=others, floor_ms=1.0) for n in (1, 2) for batch in (1, 8)]
    batch_1, batch_8 = time_per_image(rows, {}).get_axes()
    lines = {line.get_label(): list(line.get_ydata()) for line in batch_8.get_lines()}
    assert lines == {
        "this package": [2, 2],
        "ONNX Runtime": [3 / 8, 3 / 8],
        "torch.compile + freezing": [0.5, 0.5],
        "naive (PyTorch)": [0.25, 0.25],
        "at the measured peak": [0.125, 0.125],
    }
    assert (batch_1.get_title(), batch_8.get_title()) == ("batch 1", "batch 8")
    save(tmp_path / "cpu", rows, {})
    assert [path.name for path in save_plots(tmp_path / "cpu.json")] == ["cpu-net.png", "cpu-net.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-net.png", "cpu-net.svg", "cpu.json", "cpu.md"]
    save(tmp_path / "ops", [_row()], {})
    assert save_plots(tmp_path / "ops.json") == [], "no inference, no plot"
