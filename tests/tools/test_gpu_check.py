"""``make gpu-check``: its calls, its results, and a rehearsal of each call on the CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import counter_steps
import gpu_check
import gpu_machine
import pytest
import smoke_steps
import suite_steps
import torch
from gpu_machine import GpuCheck
from placements import SEED
from predicted_rows import Predictions, sources
from timed_steps import Check, Failure, Outcome, RanOut, Skipped

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "tools" / "gpu_check.py")

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


def _suite(folder: Path, here: str = "pass", sleep: float = 0) -> tuple[list[str], Path]:
    file = folder / "test_some.py"
    file.write_text(_TESTS.format(here=here, sleep=sleep))
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", "-c", "/dev/null"]
    return [*command, f"--junitxml={report}", str(file)], report


def test_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, report = _suite(tmp_path, "pytest.skip('no hat')")
    subprocess.run(command, capture_output=True, check=True)
    note = suite_steps.counted(report, ("cuda", "triton"), complete=True)
    assert note == "4 passed, 0 failed, 1 skipped, 2 on cuda, 1 on triton"
    assert "skipped 1: no hat" in capsys.readouterr().out
    with pytest.raises(Failure, match="0 on cpp"):
        suite_steps.counted(report, ("cpp",), complete=True)
    command, report = _suite(tmp_path, "assert False")
    subprocess.run(command, capture_output=True, check=False)
    with pytest.raises(Failure, match=r"1 failed, .*first: .*test_here"):
        suite_steps.counted(report, (), complete=True)
    assert "test_here" in capsys.readouterr().out
    with pytest.raises(Failure, match="left no report"):
        suite_steps.counted(tmp_path / "none.xml", (), complete=True)


def test_a_stopped_suite_is_counted_so_far(tmp_path: Path) -> None:
    check = Check(60, tmp_path / "results")
    command, report = _suite(tmp_path, sleep=120)
    with pytest.raises(RanOut):
        check.run(*command, seconds=8)
    assert suite_steps.counted(report, ("cpp",), complete=False) == "4 passed, 0 failed, 0 skipped, 0 on cpp"


@pytest.mark.parametrize("call", ["all", *gpu_check.CALLS])
@pytest.mark.parametrize("seconds", [560, 300])
def test_the_shares_of_a_call_end_before_its_time(call: str, seconds: float) -> None:
    steps = gpu_check.planned(call, seconds)
    assert sum(step.share for step in steps) < seconds
    assert [step.name for step in steps[:2]] == ["machine", "build"]
    assert all(step.share > 0 for step in steps)


def test_all_calls_have_different_steps() -> None:
    names = [step.name for step in gpu_check.planned("all", 560)]
    assert len(names) == len(set(names)) == 2 + sum(map(len, gpu_check.CALLS.values()))


def test_help_names_every_step() -> None:
    result = subprocess.run([sys.executable, PROGRAM, "--help"], capture_output=True, text=True, check=True)
    assert all(f"\n  {step.name} " in result.stdout for step in gpu_check.planned("all", 560))
    assert "examples:" in result.stdout


def _check(monkeypatch: pytest.MonkeyPatch, folder: Path, **machine: Any) -> GpuCheck:
    facts = {"gpu": "GPU X", "capability": [9, 0], "torch": "2", "cuda": "13"} | machine
    monkeypatch.setattr(gpu_machine, "ask", lambda *_, **__: (facts, ""))
    return GpuCheck(60, folder, call="first")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = _check(monkeypatch, tmp_path, gpu="")
    steps = gpu_check.planned("first", 60)
    done = gpu_check.run(check, steps)
    assert list(done) == ["machine"]
    assert done["machine"].result == "FAILED"
    assert "a GPU that torch can use" in done["machine"].note
    lines = gpu_check.report(check, steps, done)
    assert sum("not begun" in line for line in lines) == len(steps) - 1
    assert any(line.startswith("next: install what is missing (missing: a GPU that torch") for line in lines)


def test_a_package_that_does_not_load_leaves_commit_and_date(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HNE_COMMIT", "abc1234")
    monkeypatch.setattr(
        gpu_machine, "_DESCRIBE", "import sys; sys.modules['hne_kernels'] = None; " + gpu_machine._DESCRIBE
    )
    facts = GpuCheck(60, tmp_path, call="first", device="cpu").facts()
    assert facts["torch"] == torch.__version__
    assert "backends" not in facts
    assert facts["commit"] not in ("", "unknown")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["date"])


def test_the_next_thing_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = _check(monkeypatch, tmp_path)
    passed = Outcome("passed", 1, "")
    assert gpu_check.advices(check, {"machine": passed}) == ["GPU_CHECK=second"]
    check.write_row("cuda-ops", "row 1", {"result": "HUNG", "note": "no result"})
    (advice,) = gpu_check.advices(check, {"machine": passed})
    assert "does not end" in advice
    assert "row 1" in advice
    found = gpu_check.advices(check, {"build": Outcome("FAILED", 1, ""), "vast": Outcome("ran out", 1, "")})
    assert "compiler's output is in first.log" in found[0]
    assert "vast" in found[-1]


def test_a_result_is_on_disk_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = _check(monkeypatch, tmp_path)
    check.write_row("ops", "row 1", {"result": "ok", "ms": "1.5", "note": "a\tb"})
    check.write_row("ops", "row 2", {"result": "FAILED"})
    head, first, second = (line.split("\t") for line in (tmp_path / "first.tsv").read_text().splitlines())
    assert tuple(head) == gpu_machine.COLUMNS
    assert dict(zip(head, first, strict=True)) | {"ms": "1.5", "note": "a b", "result": "ok"} == dict(
        zip(head, first, strict=True)
    )
    assert second[1:3] == ["row 2", "FAILED"]


_PREDICTED = {"cuda bfloat16 op: a": {"ms": 0.5, "kernel": "gemm"}, "cuda network": {"ms": 1.0, "kernel": ""}}


def test_predictions_beside_measured_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = _check(monkeypatch, tmp_path)
    check.predictions = Predictions(_PREDICTED, {}, sources())
    kept = tmp_path / "tools" / "gpu_calibration.json"
    kept.parent.mkdir()
    monkeypatch.setattr(smoke_steps, "CALIBRATION", kept)
    check.write_row("cuda-ops", "cuda bfloat16 op: a", {"result": "ok", "ms": "2.0"})
    check.write_row("cuda-ops", "cuda network", {"result": "ok", "ms": "1.5"})
    check.write_row("cuda-ops", "cuda bfloat16 op: a", {"result": "HUNG"})
    head, first, _, third = (line.split("\t") for line in (tmp_path / "first.tsv").read_text().splitlines())
    assert dict(zip(head, first, strict=True))["predicted ms"] == "0.5"
    assert dict(zip(head, third, strict=True))["predicted ms"] == ""
    note = smoke_steps.calibrate(check)
    assert note == "measured over predicted time: median 2.75, most of gemm 4.00"
    written = json.loads((tmp_path / "gpu_calibration.json").read_text())
    assert written == {"everything": 2.75, "kernels": {"gemm": 4.0}, "source": "calibrated on GPU X"}
    assert json.loads(kept.read_text()) == written
    assert gpu_check.slower_than_predicted(check) == [("cuda bfloat16 op: a", 4.0)]
    done = {"machine": Outcome("passed", 1, ""), "calibrate": Outcome("passed", 1, note)}
    hung, slow, commit = gpu_check.advices(check, done)
    assert "-k 'cuda and op'" in hung
    assert "1 rows take more than 2 times the prediction: read the counters of gemm" in slow
    assert "commit tools/gpu_calibration.json" in commit
    check.rows[1]["step"] = "cuda-network"
    assert "       1.5      (1.000)  cuda network" in gpu_check.report(check, [], done)


def test_predictions_of_other_sources_do_not_calibrate_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = _check(monkeypatch, tmp_path)
    check.predictions = Predictions(_PREDICTED, {}, "others")
    kept = tmp_path / "tools" / "gpu_calibration.json"
    kept.parent.mkdir()
    monkeypatch.setattr(smoke_steps, "CALIBRATION", kept)
    with pytest.raises(Skipped, match="no measured row"):
        smoke_steps.calibrate(check)
    check.write_row("cuda-ops", "cuda network", {"result": "ok", "ms": "1.5"})
    assert "other kernel sources" in smoke_steps.calibrate(check)
    assert not kept.exists()
    assert "other kernel sources" in gpu_check.advices(check, {})[0]


def test_without_ncu_each_kernel_that_matters_has_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check = _check(monkeypatch, tmp_path)
    monkeypatch.setattr(counter_steps.shutil, "which", lambda _: None)
    check.predictions = Predictions({}, {"gemm": 2.0, "norm": 1.0}, "")
    with pytest.raises(Skipped, match="ncu"):
        counter_steps.counters(check)
    assert [(row["row"], row["result"]) for row in check.rows] == [("gemm", "skipped"), ("norm", "skipped")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_that_interrupt(number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: GpuCheck) -> str:
        os.kill(os.getpid(), number)
        time.sleep(60)
        return "not interrupted"

    _check(monkeypatch, tmp_path)
    step = gpu_check.Step("waits", interrupted, 50)
    monkeypatch.setattr(gpu_check, "planned", lambda *_: [step, gpu_check.Step("next", interrupted, 5)])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "first", "--device", "cpu", "--results", str(tmp_path)])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert gpu_check.main() == 130
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    steps = json.loads((tmp_path / "first.json").read_text())["steps"]
    assert {name: outcome["result"] for name, outcome in steps.items()} == {"waits": "interrupted"}


# --- rehearsals on the CPU ------------------------------------------------------------------------------------------


def _environ() -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return environ | {"OMP_NUM_THREADS": "1"}


def _rehearse(call: str, results: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [
        sys.executable,
        PROGRAM,
        call,
        "--device",
        "cpu",
        "--results",
        str(results),
        "--seconds",
        "900",
        *options,
    ]
    result = subprocess.run(command, env=_environ(), capture_output=True, text=True, timeout=3000, check=False)
    return result, json.loads((results / f"{call}.json").read_text())


def in_turn(number: int) -> pytest.MarkDecorator:
    """Of the three calls, each of which takes minutes, a run rehearses one."""
    return pytest.mark.skipif((SEED + number) % 3 != 0, reason="the rehearsals take turns: one of three in a run")


@pytest.mark.slow
@in_turn(0)
def test_rehearsal_of_the_first_call_with_faults(tmp_path: Path) -> None:
    """In each table of ops a row fails, one hangs and one ends its process; all other rows are there, and right."""
    result, record = _rehearse("first", tmp_path, "--faults")
    assert result.returncode == 1, result.stdout + result.stderr
    assert {"torch", "commit", "date", "backends"} <= record["machine"].keys()
    rows = {(row["step"], row["row"]): row for row in record["rows"]}
    for table in ("cpp-ops", "reference-ops"):
        faults = ("fails", "hangs", "ends its process", "is skipped")
        results = [rows[table, f"ops fault: {fault}"]["result"] for fault in faults]
        assert results == ["FAILED", "HUNG", "DIED", "skipped"], table
    others = {key: row for key, row in rows.items() if "fault" not in key[1]}
    # On some processors PyTorch sums 16-bit values in 16 bits: the reference's errors are its own.
    judged = [row for key, row in others.items() if not key[1].startswith("reference bfloat16")]
    assert {row["result"] for row in judged} == {"ok"}, [row for row in judged if row["result"] != "ok"]
    assert {row["result"] for row in others.values()} <= {"ok", "WRONG"}
    for op in ("branch_conv2d", "fused_bottleneck", "branch_norm_conv2d-dense", "hierarchical_distillation_loss"):
        for dtype, limit in (("float32", 1e-4), ("bfloat16", 3e-2)):
            row = others["cpp-ops", f"cpp {dtype} {op}: odd"]
            assert float(row["error"]) < limit
            assert float(row["ms"]) > 0
    assert others["cpp-networks", "cpp network, float32"]["error"]
    assert others["eager", "channels-last training step, autocast bfloat16, batch 2"]["ms"]
    table = (tmp_path / "first.tsv").read_text()
    assert len(table.splitlines()) == 1 + len(rows)
    outcomes = {name: outcome["result"] for name, outcome in record["steps"].items()}
    assert outcomes.pop("calibrate") == "skipped", "no prediction is for a CPU"
    assert set(outcomes.values()) == {"passed", "FAILED"}
    assert "next: a kernel that does not end" in result.stdout[-6000:]


@pytest.mark.slow
@in_turn(1)
def test_rehearsal_of_the_second_call(tmp_path: Path) -> None:
    result, record = _rehearse("second", tmp_path)
    steps = record["steps"]
    assert result.returncode == 0, result.stdout + result.stderr
    assert {name: outcome["result"] for name, outcome in steps.items()} == dict.fromkeys(
        ("machine", "build", "tests-cuda", "tests-triton", "vast", "memcheck"), "passed"
    ) | dict.fromkeys(("counters", "racecheck"), "skipped")
    assert "not on the PATH" in steps["counters"]["note"]
    assert " 0 failed" in steps["tests-cuda"]["note"]
    assert "on cpp" in steps["tests-cuda"]["note"]
    assert "on reference" in steps["tests-triton"]["note"]
    assert {row["row"] for row in record["rows"]} >= {"cpp bfloat16 branch_conv2d", "reference float32 prefix_mean"}


@pytest.mark.slow
@in_turn(2)
def test_rehearsal_of_the_third_call(tmp_path: Path) -> None:
    result, record = _rehearse("third", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    skipped = {name for name, outcome in record["steps"].items() if outcome["result"] == "skipped"}
    assert skipped == {"inference-128-compiled"}, "another batch than that of inference-1-compiled"
    assert {outcome["result"] for outcome in record["steps"].values()} == {"passed", "skipped"}
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    sides = {row["name"]: set(row.get("others_ms", ())) for row in rows}
    assert sides["training step"] == {"eager", "channels_last", "compiled", "channels_last_compiled"}
    assert sides["inference"] >= {"eager", "channels_last", "compiled", "channels_last_compiled"}
    assert "comparisons, fused slower" in record["steps"]["others"]["note"]


@pytest.mark.slow
def test_an_interruption_leaves_rows_and_a_summary(tmp_path: Path) -> None:
    command = [sys.executable, PROGRAM, "first", "--device", "cpu", "--results", str(tmp_path), "--seconds", "3000"]
    process = subprocess.Popen(command, env=_environ(), stdout=subprocess.PIPE, text=True)
    table, end = tmp_path / "first.tsv", time.monotonic() + 300
    while time.monotonic() < end and not (table.exists() and "cpp-ops" in table.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    record = json.loads((tmp_path / "first.json").read_text())
    assert record["steps"]["rates"]["result"] == "passed"
    assert record["steps"]["cuda-ops"]["result"] == "interrupted"
    assert any(row["step"] == "cpp-ops" for row in record["rows"])
    assert "not begun" in output
