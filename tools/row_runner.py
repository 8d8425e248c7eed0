"""The supervising side of a table: a worker computes the rows, and none of them can stop the table.

A row that exceeds its time limit or ends its worker becomes a row with the reason, and a new worker continues behind
it. So does a worker whose GPU context is lost, as after an illegal memory access.
"""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rows import LOST, Cells
from timed_steps import Check, Failure, Process, RanOut

START_UP = 150.0  # seconds until a worker begins its first row: imports, and the first use of the GPU
MOST_LOSSES = 2  # workers that the rows of a group may end
_POLL = 0.05


class _Journal:
    """Reads the new entries of a growing file."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def entries(self) -> list[dict[str, Any]]:
        with self._path.open() as file:
            file.seek(self._position)
            text = file.read()
        complete = text.rpartition("\n")[0]
        self._position += len(complete.encode()) + bool(complete)
        return [json.loads(line) for line in complete.splitlines()]


class RowRunner:
    """Runs a worker until its table is complete.

    Args:
        check: gives the time limit, and runs the workers.
        command: a worker, see :func:`rows.serve`.
        write: called with the name and the cells of each row as soon as it is known.
    """

    def __init__(
        self, check: Check, command: Sequence[str], write: Callable[[str, Cells], None], **environ: str
    ) -> None:
        self._check, self._command, self._write, self._environ = check, command, write, environ
        self._results: Counter[str] = Counter()  # rows by result
        self._losses: Counter[str] = Counter()  # workers lost, by group of the row
        self._begun: dict[str, Any] = {}  # the row in progress
        self._last_group = ""  # of the last row
        self._since = 0.0  # when the row in progress began, or when the worker started
        self._total: int | None = None
        self._worker_began = False

    def run(self) -> str:
        """Compute all rows; return how many there are of each result.

        Raises:
            RanOut: the time of the step is over.
            Failure: a row is wrong or failed, or the worker does not start.
        """
        reason: str | None = None
        while not self._complete():
            reason = self._run_worker()
            if not self._worker_began:
                raise Failure(f"{self._summary()}; the worker {reason or 'ended'} before its first row")
        if bad := [name for name in self._results if name not in ("ok", "skipped")]:
            raise Failure(f"{self._summary()} ({', '.join(bad)}: see the rows)")
        if reason is not None:
            raise Failure(f"{self._summary()}; then the worker {reason}")
        return self._summary()

    def _complete(self) -> bool:
        return self._total is not None and self._results.total() >= self._total

    def _summary(self) -> str:
        counts = ", ".join(f"{count} {result}" for result, count in self._results.items()) or "no row"
        return f"{counts} of {self._total} rows" if self._total else counts

    def _done(self, name: str, cells: Cells) -> None:
        self._results[cells["result"]] += 1
        self._write(name, cells)
        self._begun, self._since = {}, time.monotonic()

    def _run_worker(self) -> str | None:
        """Run one worker from the first open row on; return why it ended early."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "journal"
            path.touch()
            journal = _Journal(path)
            skipped = [group for group, count in self._losses.items() if count >= MOST_LOSSES]
            options = ["--journal", str(path), "--first", str(self._results.total())]
            options += [word for group in skipped for word in ("--skip", group)]
            self._worker_began, self._since = False, time.monotonic()
            with self._check.start(*self._command, *options, **self._environ) as process:
                while process.poll() is None:
                    time.sleep(_POLL)
                    self._read(journal)
                    if self._check.left() <= 0:
                        process.kill()
                        self._lose("ran out", "the time of the step was over")
                        raise RanOut(self._summary())
                    limit = self._begun.get("seconds", START_UP)
                    if time.monotonic() - self._since > limit:
                        process.kill()
                        self._lose("HUNG", f"no result after {limit:g} s")
                        return f"was stopped after {limit:g} s"
                self._read(journal)
                return self._ended(process)

    def _read(self, journal: _Journal) -> None:
        for entry in journal.entries():
            if "total" in entry:
                self._total = entry["total"]
            elif "begin" in entry:
                self._begun, self._since, self._worker_began = entry, time.monotonic(), True
            else:
                group = self._begun.get("group", "")
                self._done(entry["done"], entry["cells"])
                self._worker_began = True
                self._last_group = group

    def _ended(self, process: Process) -> str | None:
        status = process.returncode
        if status == 0:
            return None
        if status == LOST:  # it said so after its row, which has the error
            self._losses[self._last_group] += 1
            return "lost its GPU"
        reason = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        last = process.last_line()
        self._lose("DIED", f"{reason}: {last}" if last else reason)
        return f"{reason}: {last}"

    def _lose(self, result: str, note: str) -> None:
        """Note the result of a row that its worker cannot tell any more."""
        if self._begun:
            self._losses[self._begun["group"]] += 1
            self._done(self._begun["begin"], {"result": result, "note": note})
