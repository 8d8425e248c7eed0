"""The worker side of a table: computes its rows in order, and writes each one to a journal at once.

:mod:`row_runner` starts workers and reads their journals.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOST = 3  # exit status of a worker that can compute no further row

Cells = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        name: unique within the table.
        group: rows of the same code. After two of them have ended their worker, the others are skipped.
        compute: returns the cells of the row, by column; an exception becomes a cell.
        seconds: time limit.
    """

    name: str
    group: str
    compute: Callable[[], Cells]
    seconds: float = 60.0


def faults(stage: str) -> list[Row]:
    """Rows that fail, hang and end their process: they show that the table survives it."""

    def fail() -> Cells:
        raise ValueError("this row\nfails on purpose")

    def hang() -> Cells:
        time.sleep(600)
        return {}

    def end() -> Cells:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    return [
        Row(f"{stage} fault: fails", "fault", fail),
        Row(f"{stage} fault: hangs", "fault", hang, seconds=2),
        Row(f"{stage} fault: ends its process", "fault", end),
        Row(f"{stage} fault: is skipped", "fault", fail),
    ]


def one_line(error: BaseException, limit: int = 240) -> str:
    """Type and message of an exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`row_runner.run_rows` passes to a worker."""
    parser.add_argument("--journal", type=Path, required=True, help="file for the rows, a JSON object per line")
    parser.add_argument("--first", type=int, default=0, help="number of the first row to compute")
    parser.add_argument("--skip", action="append", default=[], metavar="GROUP", help="rows of this group are skipped")


def serve(rows: Sequence[Row], args: argparse.Namespace, device_works: Callable[[], bool] = lambda: True) -> None:
    """Compute the rows from ``args.first`` on.

    Args:
        rows: the whole table, the same in each worker.
        args: see :func:`add_arguments`.
        device_works: asked after a failed row; if it returns False, the process ends with the status ``LOST``.
    """
    with args.journal.open("a") as journal:

        def say(**entry: Any) -> None:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()

        say(total=len(rows))
        for row in rows[args.first :]:
            if row.group in args.skip:
                say(done=row.name, cells={"result": "skipped", "note": "rows like this one ended their process"})
                continue
            say(begin=row.name, group=row.group, seconds=row.seconds)
            try:
                cells = {"result": "ok"} | row.compute()
            except Exception as error:
                cells = {"result": "FAILED", "note": one_line(error)}
            say(done=row.name, cells=cells)
            if cells["result"] == "FAILED" and not device_works():
                sys.exit(LOST)
