"""Steps with a time limit each: commands are stopped when it ends, and their output goes to a log."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE = 15.0  # seconds for a stopped step to report its partial results


class Failure(Exception):
    """A step failed; the message is the reason, in one line."""


class Skipped(Exception):
    """A step cannot run on this machine; the message is the reason, in one line."""


class RanOut(Exception):
    """A step exceeded its time; the message is its progress, in one line."""


@dataclass
class Outcome:
    """Outcome of a step."""

    result: str  # passed, FAILED, skipped, ran out, interrupted
    seconds: float
    note: str


class Process:
    """A running command whose output goes to the log."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path, position: int) -> None:
        self._popen, self._log, self._position = popen, log, position

    @property
    def returncode(self) -> int:
        return self._popen.returncode

    def poll(self) -> int | None:
        return self._popen.poll()

    def output(self) -> str:
        """Output so far."""
        with self._log.open("rb") as log:
            log.seek(self._position)
            return log.read().decode(errors="replace")

    def last_line(self) -> str:
        return (self.output().strip().splitlines() or [""])[-1]

    def wait(self, limit: float) -> bool:
        """Wait for the end; after ``limit`` seconds interrupt the command, then kill it, and return False."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(limit)
            return True
        self._popen.send_signal(signal.SIGINT)  # pytest then reports its results so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(GRACE)
        self.kill()
        return False

    def kill(self) -> None:
        """Kill the command with all its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()


class Check:
    """One run of the steps.

    Args:
        seconds: total time of all steps.
        results: folder of the results.
        log: file name of the log in that folder.
    """

    def __init__(self, seconds: float, results: Path, log: str = "check.log") -> None:
        self.results, self.log = results, results / log
        self._end = time.monotonic() + seconds
        self._step_end = self._end
        self._saved = 0.0  # seconds that earlier steps did not use
        results.mkdir(parents=True, exist_ok=True)

    def step(self, function: Callable[[Check], str], share: float | None) -> Outcome:
        """Run a step for at most ``share`` seconds and what earlier steps have left; None for all remaining time."""
        start = time.monotonic()
        self._step_end = self._end if share is None else min(self._end, start + share + self._saved)
        try:
            result, note = "passed", function(self)
        except Failure as failure:
            result, note = "FAILED", str(failure)
        except Skipped as reason:
            result, note = "skipped", str(reason)
        except RanOut as done:
            result, note = "ran out", str(done)
        except KeyboardInterrupt:
            result, note = "interrupted", "the results so far are kept"
        except Exception as error:  # a fault of the check itself must not cost the other steps
            result, note = "FAILED", f"{type(error).__name__}: {error}"
        self._saved = self._step_end - time.monotonic()
        return Outcome(result, round(time.monotonic() - start, 1), note.replace(f"{ROOT}/", ""))

    def left(self) -> float:
        """Remaining seconds of the step."""
        return self._step_end - time.monotonic()

    @contextlib.contextmanager
    def start(self, *command: str, **environ: str) -> Iterator[Process]:
        """Start a command in the root of the checkout; at the end of the block it is killed if it still runs.

        Raises:
            Failure: it could not be started.
        """
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            position = log.tell()
            try:
                popen = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environ},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    # In the background of a shell this process ignores interrupts, and its children would inherit that.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
            except OSError as error:
                raise Failure(str(error)) from None
        process = Process(popen, self.log, position)
        try:
            yield process
        finally:
            process.kill()

    def run(self, *command: str, seconds: float | None = None, **environ: str) -> str:
        """Run a command and return its output.

        Raises:
            Failure: the command could not be started, or ended with an error.
            RanOut: it was interrupted after ``seconds``, or at the end of the step's time.
        """
        limit = self.left() if seconds is None else min(seconds, self.left())
        if limit <= 0:
            raise RanOut("no time was left for it")
        print("$", " ".join(command), flush=True)
        with self.start(*command, **environ) as process:
            in_time = process.wait(limit)
            text = process.output()
        lines = text.strip().splitlines() or ["no output"]
        print("\n".join(lines[-25:]), flush=True)
        if not in_time:
            raise RanOut(f"stopped after {limit:.0f} s: {lines[-1]}")
        if process.returncode:
            raise Failure(f"exit status {process.returncode}: {lines[-1]}")
        return text
