"""Steps with a time limit each: commands are stopped when it ends, and their output goes to a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE = 15  # seconds for a stopped step to report its partial results


class Failure(Exception):
    """A step failed; the message is the reason, in one line."""


class Skipped(Exception):
    """A step cannot run on this machine; the message is the reason, in one line."""


class RanOut(Exception):
    """A step exceeded its time; the message is its progress, in one line."""


@dataclass
class Outcome:
    """Outcome of a step."""

    result: str  # passed, FAILED, skipped, ran out
    seconds: float
    note: str


class Check:
    """One run of the steps.

    Args:
        seconds: total time of all steps.
        results: folder of the results.
        expression: selects benchmarks, as pytest's ``-k`` does.
    """

    def __init__(self, seconds: float, results: Path, expression: str = "") -> None:
        self.results, self.expression = results, expression
        self._end = time.monotonic() + seconds
        self._step_end = self._end
        results.mkdir(parents=True, exist_ok=True)

    def step(self, function: Callable[[Check], str], limit: float | None) -> Outcome:
        """Run a step for at most ``limit`` seconds; None for all remaining time."""
        start = time.monotonic()
        self._step_end = self._end if limit is None else min(self._end, start + limit)
        try:
            result, note = "passed", function(self)
        except Failure as failure:
            result, note = "FAILED", str(failure)
        except Skipped as reason:
            result, note = "skipped", str(reason)
        except RanOut as done:
            result, note = "ran out", str(done)
        return Outcome(result, round(time.monotonic() - start, 1), note)

    def left(self) -> float:
        """Remaining seconds of the step."""
        return self._step_end - time.monotonic()

    def run(self, *command: str, seconds: float | None = None, **environ: str) -> str:
        """Run a command in the root of the checkout; return its output and append it to ``check.log``.

        Raises:
            Failure: the command could not be started, or ended with an error.
            RanOut: it was interrupted after ``seconds``, or at the end of the step's time.
        """
        limit = self.left() if seconds is None else min(seconds, self.left())
        if limit <= 0:
            raise RanOut("no time was left for it")
        print("$", " ".join(command), flush=True)
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            try:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environ},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    # In the background of a shell this process ignores interrupts, and its children would inherit that.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
            except OSError as error:
                raise Failure(str(error)) from None
            ran_out = _wait(process, limit)
            output.seek(0)
            text = output.read()
        with (self.results / "check.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{text}\n")
        lines = text.strip().splitlines() or ["no output"]
        print("\n".join(lines[-25:]), flush=True)
        if ran_out:
            raise RanOut(f"stopped after {limit:.0f} s: {lines[-1]}")
        if process.returncode:
            raise Failure(f"exit status {process.returncode}: {lines[-1]}")
        return text


def _wait(process: subprocess.Popen[bytes], limit: float) -> bool:
    """Wait for a process; after ``limit`` seconds end it with all its children, and return True."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(limit)
        return False
    process.send_signal(signal.SIGINT)  # pytest then reports its results so far
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True
