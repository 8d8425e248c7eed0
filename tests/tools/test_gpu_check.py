"""``make gpu-check``: time limits, counting of tests, result files. (The steps themselves need a GPU.)"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu_check  # noqa: E402
from gpu_check import Check, Failure, Outcome, RanOut, Skipped  # noqa: E402

_TESTS = """
import time
import pytest

@pytest.mark.parametrize("place", ["cuda-float32", "triton-float32", "cuda-bfloat16"])
def test_quick(place):
    pass

def test_here():
    {here}

def test_later():
    time.sleep({sleep})
"""


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(60, tmp_path / "results")


def _suite(folder: Path, here: str = "pass", sleep: float = 0) -> tuple[list[str], Path]:
    file = folder / "test_some.py"
    file.write_text(_TESTS.format(here=here, sleep=sleep))
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", "-c", "/dev/null"]
    return [*command, f"--junitxml={report}", str(file)], report


def test_outcomes(check: Check) -> None:
    def fails(_: Check) -> str:
        raise Failure("wrong")

    def cannot(_: Check) -> str:
        raise Skipped("no tool")

    def dawdles(check: Check) -> str:
        return check.run(sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")

    assert check.step(lambda _: "fine", 5).result == "passed"
    assert check.step(fails, 5).note == "wrong"
    assert check.step(cannot, 5).result == "skipped"
    start = time.monotonic()
    outcome = check.step(dawdles, 2)
    assert outcome.result == "ran out"
    assert "stopped after 2 s" in outcome.note
    assert time.monotonic() - start < 30
    assert check.step(lambda c: f"{c.left():.0f}", None).note > "20", "the next step has its own time"


def test_no_step_has_more_than_is_left(tmp_path: Path) -> None:
    check = Check(0, tmp_path)
    outcome = check.step(lambda c: c.run(sys.executable, "-c", ""), 100)
    assert (outcome.result, outcome.note) == ("ran out", "no time was left for it")


def test_an_error_is_told_in_its_last_line(check: Check) -> None:
    with pytest.raises(Failure, match="exit status 1: ValueError: why"):
        check.run(sys.executable, "-c", "raise ValueError('why')")
    with pytest.raises(Failure, match="No such file"):
        check.run("/no/such/program")
    assert "ValueError: why" in (check.results / "check.log").read_text()


def test_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, report = _suite(tmp_path, "pytest.skip('no hat')")
    subprocess.run(command, capture_output=True, check=True)
    note = gpu_check.counted(report, ("cuda", "triton"), complete=True)
    assert note == "4 passed, 0 failed, 1 skipped, 2 on cuda, 1 on triton"
    assert "skipped 1: no hat" in capsys.readouterr().out
    with pytest.raises(Failure, match="0 on cpp"):
        gpu_check.counted(report, ("cpp",), complete=True)
    command, report = _suite(tmp_path, "assert False")
    subprocess.run(command, capture_output=True, check=False)
    with pytest.raises(Failure, match=r"1 failed, .*first: .*test_here"):
        gpu_check.counted(report, (), complete=True)
    with pytest.raises(Failure, match="left no report"):
        gpu_check.counted(tmp_path / "none.xml", (), complete=True)


def test_a_stopped_suite_is_counted_so_far(check: Check, tmp_path: Path) -> None:
    command, report = _suite(tmp_path, sleep=120)
    with pytest.raises(RanOut):
        check.run(*command, seconds=8)
    assert gpu_check.counted(report, ("cpp",), complete=False) == "4 passed, 0 failed, 0 skipped, 0 on cpp"


def test_results_of_several_calls_are_one(tmp_path: Path) -> None:
    path, here = tmp_path / "check.json", {"gpu": "A", "commit": "1", "date": "today"}
    gpu_check.save(path, here, {"build": Outcome("passed", 1, ""), "memcheck": Outcome("ran out", 1, "")})
    gpu_check.save(path, here | {"date": "tomorrow"}, {"memcheck": Outcome("passed", 2, "")})
    steps = json.loads(path.read_text())["steps"]
    assert {name: step["result"] for name, step in steps.items()} == {"build": "passed", "memcheck": "passed"}
    gpu_check.save(path, here | {"commit": "2"}, {"build": Outcome("passed", 1, "")})
    assert list(json.loads(path.read_text())["steps"]) == ["build"]


def test_all_steps_together_end_in_ten_minutes() -> None:
    shares = [share for _, share in gpu_check.STEPS.values() if share is not None]
    assert sum(shares) + 60 < 560, "the benchmarks have a minute at least"


def test_help_names_every_step() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(f"\n  {name} " in result.stdout for name in gpu_check.STEPS)
    assert "examples:" in result.stdout


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--results", str(tmp_path)])
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["machine", "FAILED"]
    assert "a GPU that torch can use" in lines[0]
    assert sum("not begun" in line for line in lines) == len(gpu_check.STEPS) - 1
