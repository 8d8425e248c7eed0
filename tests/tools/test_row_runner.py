"""Tables whose rows may fail, hang or end their process: every row gets a result."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from row_runner import RowRunner
from rows import Cells
from timed_steps import Check, Failure, RanOut

_WORKER = """
import argparse, os, sys, time
sys.path.insert(0, {tools!r})
import rows

def fail(): raise ValueError("two\\nlines")
def hang(): time.sleep(60)
def crash(): os.abort()
def leave(): print("last words", file=sys.stderr, flush=True); os._exit(5)
def good(): return {{"ms": "1.0"}}
def wrong(): return {{"result": "WRONG"}}
lost = []
def lose(): lost.append(1); raise RuntimeError("illegal memory access")

parser = argparse.ArgumentParser()
rows.add_arguments(parser)
row = lambda name, f, group=None: rows.Row(name, group or name, f, seconds=1.0)
rows.serve([{rows}], parser.parse_args(), lambda: not lost)
{end}
"""
TOOLS = str(Path(__file__).parents[2] / "tools")
Table = Callable[..., tuple[dict[str, Cells], str]]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Run a worker with these rows; return the rows written, and the summary or the error."""

    def run(*rows: str, seconds: float = 60, end: str = "") -> tuple[dict[str, Cells], str]:
        script = tmp_path / "worker.py"
        script.write_text(_WORKER.format(tools=TOOLS, rows=", ".join(rows), end=end))
        check = Check(seconds, tmp_path / "results")
        written: dict[str, Cells] = {}
        try:
            summary = RowRunner(check, [sys.executable, str(script)], written.__setitem__).run()
        except (Failure, RanOut) as error:
            summary = f"{type(error).__name__}: {error}"
        return written, summary

    return run


def test_every_row_is_written(table: Table) -> None:
    written, summary = table("row('a', good)", "row('b', good)")
    assert written == {name: {"result": "ok", "ms": "1.0"} for name in "ab"}
    assert summary == "2 ok of 2 rows"


def test_no_row_stops_the_table(table: Table) -> None:
    names = ("fail", "hang", "crash", "leave", "lose", "wrong", "good")
    written, summary = table(*(f"row('{name}', {name})" for name in names))
    assert list(written) == list(names)
    assert {name: cells["result"] for name, cells in written.items()} == {
        "fail": "FAILED", "hang": "HUNG", "crash": "DIED", "leave": "DIED", "lose": "FAILED", "wrong": "WRONG",
        "good": "ok",
    }  # fmt: skip
    assert written["fail"]["note"] == "ValueError: two lines"
    assert written["hang"]["note"] == "no result after 1 s"
    assert written["crash"]["note"].startswith("ended by SIGABRT")
    assert written["leave"]["note"] == "ended with status 5: last words"
    assert summary.startswith("Failure: 2 FAILED, 1 HUNG, 2 DIED, 1 WRONG, 1 ok of 7 rows")


@pytest.mark.parametrize("fault", ["hang", "crash", "lose"])
def test_rows_like_two_that_ended_their_worker_are_skipped(table: Table, fault: str) -> None:
    written, _ = table(*(f"row('{i}', {fault}, 'op')" for i in range(4)), "row('other', good)")
    results = [cells["result"] for cells in written.values()]
    assert results[2:] == ["skipped", "skipped", "ok"]
    assert "skipped" not in results[:2]


def test_an_error_that_leaves_the_device_usable_skips_nothing(table: Table) -> None:
    written, _ = table(*(f"row('{i}', fail, 'op')" for i in range(4)))
    assert [cells["result"] for cells in written.values()] == ["FAILED"] * 4


def test_the_time_of_the_step_ends_the_table(table: Table) -> None:
    written, summary = table("row('a', good)", "rows.Row('slow', '', hang, 60.0)", "row('b', good)", seconds=4)
    assert {name: cells["result"] for name, cells in written.items()} == {"a": "ok", "slow": "ran out"}
    assert summary == "RanOut: 1 ok, 1 ran out of 3 rows"


def test_a_worker_that_does_not_start(table: Table) -> None:
    written, summary = table("1 / 0")
    assert written == {}
    assert "before its first row" in summary
    assert "ZeroDivisionError" in summary


def test_a_worker_that_fails_after_its_last_row(table: Table) -> None:
    """As under a memory checker, whose exit status tells of errors."""
    written, summary = table("row('a', good)", end="print('2 errors'); sys.exit(99)")
    assert written["a"]["result"] == "ok"
    assert summary == "Failure: 1 ok of 1 rows; then the worker ended with status 99: 2 errors"
