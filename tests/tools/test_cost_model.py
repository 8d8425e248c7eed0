"""The cost model: what it counts, and its predictions beside measured rows."""

from __future__ import annotations

import json
import math
import struct
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "cuda_emulation"))

import build_steps
import cost_table
import cost_work
import counter_steps
import predicted_rows
from block_trace import Launch, follow
from cost_launches import Call, Recorded, Recording, Region, emulation, record
from cost_prediction import Cache, Calibration, MissingKernel, Prediction, predict
from cuda_resources import Usage
from machine_code import Function
from predicted_rows import Predictions

_LOADS = (
    # address, instruction, scoreboard that it sets (7: none), scoreboards that it waits for
    ("LDC.64 R2, c[0x0][0x210]", 7, 0),
    ("S2R R0, SR_TID.X", 0, 0),
    ("S2R R1, SR_CTAID.X", 0, 0),
    ("IMAD R0, R1, 0x100, R0", 7, 1),
    ("IMAD.WIDE R4, R0, 0x10, R2", 7, 0),
    ("LDG.E.128 R8, desc[UR4][R4.64]", 1, 0),
    ("LDC.64 R2, c[0x0][0x218]", 7, 0),
    ("IMAD.WIDE R4, R0, 0x10, R2", 7, 0),
    ("STG.E.128 desc[UR4][R4.64], R8", 7, 2),
    ("EXIT", 7, 0),
)


def _copy_kernel() -> Function:
    """Copies 16 bytes a thread from one tensor to another."""
    lines = []
    for i, (text, sets, waits) in enumerate(_LOADS):
        control = (4 | sets << 5 | 7 << 8 | waits << 11) << 41
        lines += [f"        /*{16 * i:04x}*/   {text} ;   /* 0x{0:016x} */", f"   /* 0x{control:016x} */"]
    return Function("copy", "copy<BFloat16, 8>", "\n".join(lines), Usage(32, 0, 1024))


_FROM, _TO = 1 << 30, 1 << 31


def _recording(blocks: int, kernel: str = "copy<BFloat16, 8>") -> Recording:
    size = blocks * 256 * 16
    regions = [Region(_FROM, size, True), Region(_TO, size, True)]
    launch = Recorded("copy", kernel, blocks, 256, 0, struct.pack("<2Q", _FROM, _TO))
    return Recording([launch], [regions])


def _predicted(blocks: int, calibration: Calibration | None = None) -> Prediction:
    code = {"copy<BFloat16, 8>": _copy_kernel()}
    (found,) = predict(_recording(blocks), code, cost_work.Memory(None), calibration=calibration)
    return found


def test_a_copy_takes_the_time_of_its_bytes() -> None:
    found = _predicted(1 << 15)  # 134 MB each way, more than the cache holds
    assert found.must_bytes == found.cache_bytes == 2 * (1 << 27)
    assert found.memory_bytes == pytest.approx(2 * (1 << 27), rel=0.15)
    assert found.bound == "memory"
    assert found.seconds == pytest.approx(2 * (1 << 27) / 3.0e12, rel=0.2)
    assert found.instructions == len(_LOADS)
    assert found.kinds["wide global"] == 2
    assert found.resident == 8


def test_a_small_copy_stays_in_the_cache_and_takes_its_launch() -> None:
    found = _predicted(8)
    assert found.memory_bytes == 0
    assert found.bound == "launch"
    # A block loads once and stores once, each with the latency of the cache.
    assert 280 / 1.755e9 < found.busy_s < 800 / 1.755e9


def test_the_simulation_waits_for_scoreboards_and_issues_one_instruction_a_cycle() -> None:
    launch = Launch("copy", 64, 256, 0, struct.pack("<2Q", _FROM, _TO))
    trace = follow(_copy_kernel(), launch, 0)
    alone = cost_work.simulate(trace, 1, 280)
    assert cost_work.simulate(trace, 1, 620) - alone == 340
    assert alone < cost_work.simulate(trace, 8, 280) < 8 * alone, "blocks hide each other's latency"


def test_a_kernel_without_machine_code_is_an_error() -> None:
    with pytest.raises(MissingKernel, match="no machine code of the kernel other"):
        predict(_recording(8, "other"), {}, cost_work.Memory(None))


def test_what_the_second_cache_holds() -> None:
    cache = Cache(1 << 20)
    small, large = Region(0, 1 << 19), Region(1 << 24, 1 << 22)
    assert cache.access([(small, 1 << 19)], []) == 1 << 19
    assert cache.access([(small, 1 << 19)], []) == 0
    assert cache.access([], [(small, 1 << 19)]) == 0, "a write stays there"
    assert cache.access([(large, 1 << 22)], []) == (1 << 22) + (1 << 19), "until other memory takes its place"
    assert cache.access([(small, 1 << 19)], []) == 1 << 19


def test_the_calibration_scales_a_kernel(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    Calibration({"copy": 1.5}, 2.0, "calibrated on X").save(path)
    factors = Calibration.load(path)
    plain, scaled = _predicted(1 << 15), _predicted(1 << 15, factors)
    assert scaled.memory_s == pytest.approx(1.5 * plain.memory_s)
    assert scaled.launch_s == plain.launch_s
    assert factors.factor("another<1>") == 2.0
    assert Calibration.load(tmp_path / "none.json").source == "uncalibrated"


def test_tables_are_labelled_predictions() -> None:
    call, launches = Call("resnet", 128, False), [_predicted(1 << 15), _predicted(8)]
    head, columns, row, total = cost_table.table(call, launches, Calibration())
    assert head.startswith("PREDICTION for an H100 (uncalibrated), resnet, inference, batch 128")
    assert row.split()[0] == total.split()[0] == "2"
    assert len(columns) - len("kernel") == row.index("copy<8>") == total.index("total")
    lines = cost_table.markdown([(call, launches)], Calibration())
    assert "resnet, inference, batch 128" in lines[2]
    assert "not measured" in lines[-1]


# --- predictions beside measured rows --------------------------------------------------------------------------------


def _predictions() -> Predictions:
    rows = {
        "cuda bfloat16 op: a": {"ms": 0.5, "kernel": "gemm", "backward ms": 1.0, "backward kernel": ""},
        "cuda bfloat16 op: b": {"ms": 1.0, "kernel": "gemm"},
        "cuda network": {"ms": 2.0, "kernel": ""},
    }
    return Predictions(rows, {"gemm": 3.0, "norm": 1.0, "copy": 2.0, "small": 0.1}, "x")


def test_predictions_are_kept_and_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    _predictions().save(path)
    found = Predictions.load(path)
    assert found == _predictions()
    assert found.of_row("cuda float16 op: a")["ms"] == 0.5
    assert found.of_row("cuda float32 op: a") == {}
    assert found.most_important == ["gemm", "copy", "norm"]
    assert "other kernel sources" in found.note
    found.sources = predicted_rows.sources()
    assert found.note == ""
    assert "no predictions" in Predictions.load(tmp_path / "none.json").note


def test_calibration_by_measured_rows() -> None:
    rows = [
        {"row": "cuda bfloat16 op: a", "result": "ok", "ms": "1.0", "backward ms": "3.0"},
        {"row": "cuda bfloat16 op: b", "result": "ok", "ms": "8.0"},
        {"row": "cuda network", "result": "WRONG", "ms": "9.0"},
        {"row": "triton op", "result": "ok", "ms": "9.0"},
    ]
    found = predicted_rows.calibration(rows, _predictions(), "calibrated on X")
    assert found is not None
    assert found["kernels"] == {"gemm": pytest.approx(math.sqrt(2 * 8))}
    assert found["everything"] == 3.0
    assert predicted_rows.calibration(rows[2:], _predictions(), "") is None


# --- hardware counters, and a library that was built before -----------------------------------------------------------


def test_counters_of_a_report() -> None:
    report = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","gemm","dram__bytes.sum","Mbyte","1,000.5"
"0","gemm","gpu__time_duration.sum","usecond","10"
"1","gemm","gpu__time_duration.sum","usecond","20"
"1","gemm","unknown","",""
"""
    assert counter_steps.parse(report) == ["memory 1000 Mbyte", "time 15 usecond"]
    assert counter_steps.parse("==ERROR== no permission") == []


def _checkout(folder: Path, source: str = "kernel") -> Path:
    (folder / "csrc" / "cuda").mkdir(parents=True, exist_ok=True)
    (folder / "csrc" / "cuda" / "op.cu").write_text(source)
    return folder


def test_a_library_that_was_built_before_fits_by_its_hash(tmp_path: Path) -> None:
    root = _checkout(tmp_path)
    assert build_steps.kept_library("2.11.0+cpu", "9.0a", root) is None
    folder = build_steps.cuda_folder("2.11.0+cpu", "usual", root)
    folder.mkdir(parents=True)
    (folder / "_C_cuda.so").touch()
    assert build_steps.kept_library("2.11.0+cu130", "9.0a", root) == folder / "_C_cuda.so"
    assert build_steps.kept_library("2.11.0+cu130", "12.0", root) is None, (
        "the usual targets have no machine code for it"
    )
    assert build_steps.kept_library("2.12.0", "9.0a", root) is None
    own = build_steps.cuda_folder("2.11.0", "12.0", root)
    own.mkdir()
    (own / "_C_cuda.so").touch()
    assert build_steps.kept_library("2.11.0", "12.0", root) == own / "_C_cuda.so"
    _checkout(tmp_path, "another kernel")
    assert build_steps.kept_library("2.11.0+cu130", "9.0a", root) is None


def test_predictions_of_the_repository_are_of_the_smoke_table() -> None:
    """Each row with a prediction has the name of a row of the table."""
    found = Predictions.load()
    if not found.rows:
        pytest.skip("tools/gpu_predictions.json was not written yet")
    assert json.dumps(found.rows)
    assert all(name.startswith("cuda ") and values["ms"] > 0 for name, values in found.rows.items())
    assert {"cuda inference, bfloat16, batch 128", "cuda graphed inference, bfloat16, batch 1"} <= set(found.rows)


@pytest.mark.slow
def test_recorded_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of a network launches kernels whose names, parameters and tensors are known.

    The kernels are compiled once for this test and for those of their results (tests/kernels/test_cuda.py).
    """
    build = import_module("build")
    sanitized = build.build_sanitized()
    monkeypatch.setattr(build, "build", lambda folder, flags: sanitized)
    for name, value in build.sanitized_environ().items():
        monkeypatch.setenv(name, value)
    library = emulation()
    assert library == sanitized
    recording = record(Call("resnet", 1, False), library)
    ours = [launch for launch in recording.launches if launch.kernel]
    assert len(ours) >= 5
    for launch, regions in zip(recording.launches, recording.regions, strict=True):
        if launch.kernel:
            assert launch.op.startswith(("fused_", "prefix_", "branch_"))
            assert launch.threads % 32 == 0
            assert len([region for region in cost_work.pointers(launch, regions) if region.external]) >= 2
        else:
            assert launch.op.startswith("torch ")
            assert launch.writes
    assert not any(launch.op in ("torch view", "torch permute", "torch new_empty") for launch in recording.launches)
