"""Steps of ``make gpu-check``: time limits, outcomes, the log."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from timed_steps import Check, Failure, Skipped


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(60, tmp_path / "results")


def test_outcomes(check: Check) -> None:
    def fails(_: Check) -> str:
        raise Failure("wrong")

    def cannot(_: Check) -> str:
        raise Skipped("no tool")

    def has_a_fault(_: Check) -> str:
        raise KeyError("name")

    def is_interrupted(_: Check) -> str:
        raise KeyboardInterrupt

    assert check.step(lambda _: "fine", 5).result == "passed"
    assert check.step(fails, 5).note == "wrong"
    assert check.step(cannot, 5).result == "skipped"
    assert check.step(has_a_fault, 5).note == "KeyError: 'name'"
    assert check.step(is_interrupted, 5).result == "interrupted"


def test_a_step_is_stopped_at_its_time(check: Check) -> None:
    def dawdles(check: Check) -> str:
        return check.run(sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")

    start = time.monotonic()
    outcome = check.step(dawdles, 2)
    assert outcome.result == "ran out"
    assert "stopped after 2 s" in outcome.note
    assert time.monotonic() - start < 30
    assert check.step(lambda c: f"{c.left():.0f}", None).note > "20", "the next step has its own time"


def test_the_next_step_has_the_time_that_is_left(check: Check) -> None:
    assert check.step(lambda c: f"{c.left():.0f}", 10).note == "10"
    assert check.step(lambda c: f"{c.left():.0f}", 20).note == "30", "the first took no time"
    assert check.step(lambda c: f"{c.left():.0f}", 100).note == "60", "never more than the total"


def test_no_step_has_more_than_is_left(tmp_path: Path) -> None:
    check = Check(0, tmp_path)
    outcome = check.step(lambda c: c.run(sys.executable, "-c", ""), 100)
    assert (outcome.result, outcome.note) == ("ran out", "no time was left for it")


def test_an_error_is_told_in_its_last_line(check: Check) -> None:
    with pytest.raises(Failure, match="exit status 1: ValueError: why"):
        check.run(sys.executable, "-c", "raise ValueError('why')")
    with pytest.raises(Failure, match="No such file"):
        check.run("/no/such/program")
    assert "ValueError: why" in check.log.read_text()


def test_nothing_outlives_a_step(check: Check, tmp_path: Path) -> None:
    """An interruption kills the command with its children."""
    child = "import time, pathlib; time.sleep(3); pathlib.Path('{}').touch()".format(tmp_path / "alive")
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", "{child}"])'

    def interrupted(check: Check) -> str:
        with check.start(sys.executable, "-c", parent):
            time.sleep(1)
            raise KeyboardInterrupt

    assert check.step(interrupted, 30).result == "interrupted"
    time.sleep(4)
    assert not (tmp_path / "alive").exists()
