"""``pytest --benchmark``: what it collects, checks, prints and writes. (How fast things are is no test's business.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_graphs import emulate
from networks import TREES, build, images

import hne_kernels as K
from hne import Bottleneck, Conv, FusedHNE, Hierarchy, NaiveHNE

ROOT = Path(__file__).parents[2]

pytest.importorskip("pytest_benchmark")


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Tiny work: waking threads would be most of it. With the worker's name, pytest-benchmark would not measure.
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_benchmarks_are_collected_instead_of_the_tests() -> None:
    result = _pytest("--benchmark", "--collect-only", "-q")
    assert result.returncode == 0, result.stdout + result.stderr
    files = {line.partition("::")[0] for line in result.stdout.splitlines() if "::" in line}
    assert files == {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("bench_*.py")}


def test_tests_are_collected_without_the_flag() -> None:
    result = _pytest("--collect-only", "-q", "-k", "bench_ or test_tests_are_collected")
    assert result.returncode == 0, result.stdout + result.stderr
    collected = [line for line in result.stdout.splitlines() if "::" in line]
    assert collected == ["tests/benchmarks/test_benchmarks.py::test_tests_are_collected_without_the_flag"]


def test_table(tmp_path: Path) -> None:
    """The row on the terminal, in both files, and in what pytest-benchmark keeps."""
    result = _pytest(
        *("--benchmark", "--benchmark-quick", "-k", "bench_prefix_mean"),
        *("--benchmark-save-table", str(tmp_path / "new" / "table"), "--benchmark-json", str(tmp_path / "full.json")),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 comparisons, fused slower than another side in" in result.stdout
    assert "peak in float32, measured: " in result.stdout
    saved = json.loads((tmp_path / "new" / "table.json").read_text())
    assert {"cpu", "threads", "torch", "commit", "date"} <= saved["machine"].keys()
    assert "quick" in saved["note"]
    full = json.loads((tmp_path / "full.json").read_text())
    assert full["machine_info"]["hne"].items() <= saved["machine"].items()
    kept = {tuple(bench["extra_info"][key] for key in ("name", "shape")): bench for bench in full["benchmarks"]}
    document = (tmp_path / "new" / "table.md").read_text()
    for row in saved["rows"]:
        assert row["ratio"] == pytest.approx(row["naive_ms"] / row["fused_ms"])
        bench = kept[row["name"], row["shape"]]
        assert row["fused_ms"] == pytest.approx(bench["stats"]["median"] * 1e3)
        assert bench["extra_info"]["naive_ms"] == row["naive_ms"]
        numbers = f"{row['fused_ms']:.3f} | {row['naive_ms']:.3f}"
        assert f"| {row['name']} | {row['shape']} | {numbers}" in document
        assert row["name"] in result.stdout
    assert {row["name"] for row in saved["rows"]} == {"prefix_mean forward", "prefix_mean backward"}


@pytest.fixture
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test import from the folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def _row(**given: object) -> Any:
    from comparison import Row

    values = {"name": "op", "shape": "1 x 1", "fused_ms": 1.0, "naive_ms": 2.0, "images_per_s": 1.0, "rounds": 3}
    return Row(**(values | given))


@pytest.mark.usefixtures("_benchmarks")
def test_slower_than_naive_is_marked() -> None:
    from table import text

    _, faster, slower = text([_row(fused_ms=fused) for fused in (1.0, 4.0)])
    assert "2.00" in faster
    assert "SLOWER" not in faster
    assert "0.50" in slower
    assert "SLOWER" in slower


@pytest.mark.usefixtures("_benchmarks")
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


@pytest.mark.usefixtures("_benchmarks")
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


@pytest.mark.usefixtures("_benchmarks")
def test_sides_that_disagree_are_not_timed() -> None:
    from comparison import check_agreement

    right = torch.tensor([1000.0, 1.0])
    check_agreement((right + 0.05, right), (right, right))
    with pytest.raises(AssertionError, match=r"result 1: fused and naive differ by 0\.2"):
        check_agreement((right, right + 0.2), (right, right))
    with pytest.raises(AssertionError, match="differ by nan"):
        check_agreement(right * float("nan"), right)
    with pytest.raises(AssertionError, match="shape"):
        check_agreement(right[:1], right)
    check_agreement(right * 1.04, right, "bfloat16")
    with pytest.raises(AssertionError, match=r"more than 0\.05 of"):
        check_agreement(right * 1.06, right, "bfloat16")


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every side that is compared anywhere, tiny and on the CPU: all agree, and have a place in the table."""
    result = _pytest(
        *("--benchmark", "--benchmark-workload", "rehearsal", "--benchmark-quick"),
        *("--benchmark-save-table", str(tmp_path / "table")),
        *("-k", "(inference or training) and bfloat16 or 2-2-float32 or anytime or hierarchical or conv2d and stem"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    sides = {row["name"]: set(row.get("others_ms", {})) for row in rows}  # of inference, those of the float32 row
    compiled = {"compiled", "channels_last", "channels_last_compiled"}
    installed = {name for name in ("onnxruntime", "openvino") if find_spec(name)}
    assert sides["inference"] == compiled | {"eager", "frozen"} | installed
    assert sides["training step"] == compiled | {"eager"}
    assert sides["anytime"] == set()
    assert sides["branch_conv2d backward"] == sides["fused_conv2d"] == compiled
    assert sides["hierarchical_distillation_loss both ways"] == {"compiled"}
    assert all(row["of_peak"] > 0 for row in rows if row["name"] != "op call")
    assert {row["backend"] for row in rows if row["name"] == "op call"} == {"cpp", "dispatcher"}
    for title in ("Anytime, through all models", "An op call on tiny inputs"):
        assert title in (tmp_path / "table.md").read_text()
        assert title in result.stdout
    table = [line for line in result.stdout.splitlines() if line.startswith("inference ")]
    assert len(table) == 2, "both dtypes"


def test_no_comparison_begins_beyond_the_budget() -> None:
    result = _pytest("--benchmark", "--benchmark-quick", "--benchmark-budget", "0", "-k", "bench_prefix_mean")
    assert "4 skipped" in result.stdout, result.stdout
    assert "the budget of 0 s is used up" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpus_workload_needs_one() -> None:
    result = _pytest("--benchmark", "--benchmark-workload", "gpu", "--collect-only", "-q")
    assert result.returncode != 0
    assert "no backend can serve a GPU here (cuda: " in result.stdout + result.stderr


@pytest.mark.usefixtures("_benchmarks")
def test_work_of_an_op() -> None:
    import roofline

    x, weight = torch.ones(2, 3, 8, 8, 16), torch.ones(4, 5, 16, 3, 3)

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return K.branch_conv2d(x, weight, padding=1, replicate=2)

    result, products = 4 * 3 * 8 * 8 * 5 * 4, 2 * 4 * 3 * 8 * 8 * 5 * 16 * 9
    work = roofline.of_op(function, {"x": x, "weight": weight})
    assert work == roofline.Work(x.nbytes + weight.nbytes + result, products)
    work = roofline.of_op(function, {"x": x, "weight": weight}, ["x", "weight"])
    assert work == roofline.Work(2 * (x.nbytes + weight.nbytes) + result, 2 * products)
    assert work.floor_seconds(roofline.Rates(work.bytes / 3, work.flops)) == pytest.approx(3)


@pytest.mark.usefixtures("_benchmarks")
def test_work_of_a_model() -> None:
    """Of a network small enough to count by hand: two branches of one bottleneck over a shared convolution."""
    import roofline

    model = FusedHNE(Hierarchy((1, 2)), [[Conv(4)], [Bottleneck(6, 2, stride=2)]], num_classes=5)
    per_image = (3 * 64 + 4 * 64) + (4 * 64 + 2 * 6 * 16)
    filters = 4 * 3 * 9 + 2 * (4 * 2 + 2 * 9 + 2 * 6 + 4 * 6) + 2 * 6 * 5
    work = roofline.of_inference(model, 2, 10, 8, 2)
    assert work == roofline.Work((10 * per_image + filters) * 2, 2 * 10 * model.macs(2, 8))
    expand, depthwise, project = 4 * 64 + 2 * 2 * 64, 2 * 2 * 64 + 2 * 2 * 16, 2 * 2 * 16 + 2 * 6 * 16
    per_image += expand + depthwise + project  # the shortcut is there already, in place of the whole bottleneck
    work = roofline.of_training(model, 10, 8, 2)
    assert work == roofline.Work(3 * 10 * per_image * 2 + 8 * filters, 6 * 10 * model.macs(2, 8))


@pytest.mark.usefixtures("_benchmarks")
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_channels_last_is_the_same_network(tree: Hierarchy, rng: torch.Generator) -> None:
    import channels_last

    model = build(NaiveHNE, tree, rng)
    other = channels_last.of(model)
    x = images(rng)
    with torch.no_grad():
        for n in range(1, tree.num_models + 1):
            torch.testing.assert_close(other(x, n), model(x, n))


@pytest.mark.usefixtures("_benchmarks")
def test_meter_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With emulated graphs, streams and events: what is timed is the replay, after the cache was overwritten."""
    from meters import GpuMeter

    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 3.0

    emulate(monkeypatch)
    for name, stand_in in {
        "Event": Event,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=64),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    meter = GpuMeter(torch.device("cpu"))
    monkeypatch.setattr(meter, "_flushing", SimpleNamespace(zero_=lambda: happened.append("flush")))
    x = torch.ones(3)
    calls = []

    def side() -> torch.Tensor:
        calls.append(1)
        return x * 2

    with meter.running():
        replay = meter.prepare(side)
        assert len(calls) == GpuMeter.WARM_UPS + 1
        x.fill_(5)
        assert replay().tolist() == [10, 10, 10]
        assert meter.seconds(replay, 2) == 0.003
    assert len(calls) == GpuMeter.WARM_UPS + 1, "only what was captured runs again"
    assert happened == ["flush", "event", "event"] * 2


@pytest.mark.usefixtures("_benchmarks")
def test_rates_are_measured() -> None:
    import roofline
    from meters import HostMeter

    rates = roofline.measure(HostMeter(), torch.device("cpu"), torch.float32, megabytes=1, sizes=(16, 32))
    assert 0 < rates.bytes_per_s < 1e13
    assert 0 < rates.flops_per_s < 1e15
    assert str(roofline.Rates(2e9, 3e9)) == "3 GFLOP/s, 2 GB/s copied"
    assert str(roofline.Rates(float("inf"), 3e9)) == "3 GFLOP/s"
    assert roofline.Work(bytes=8, flops=6).floor_seconds(roofline.Rates(float("inf"), 3)) == 2


@pytest.mark.usefixtures("_benchmarks")
def test_a_turn_begins_with_calls_that_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from meters import HostMeter

    now, happened = [0.0], []

    def side() -> None:
        happened.append("call")
        now[0] += HostMeter.WARM_UP * 0.4

    monkeypatch.setattr("time.sleep", lambda seconds: happened.append("rest"))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert HostMeter().seconds(side, 2) == pytest.approx(HostMeter.WARM_UP * 0.4)
    assert happened == ["rest", *["call"] * (3 + 2)]
    happened.clear()
    assert HostMeter().seconds(side, 1, warm=False) == pytest.approx(HostMeter.WARM_UP * 0.4)
    assert happened == ["rest", "call"]


@pytest.mark.usefixtures("_benchmarks")
def test_turns_take_as_long_for_every_side() -> None:
    from comparison import Watch, compare

    seconds = {"fused": 0.01, "naive": 1.0, "quick": 0.0001}
    turns: list[tuple[str, int, bool]] = []

    class Meter:
        turn, before_turn = 0.05, 0.03

        def prepare(self, call: Any) -> Any:
            return call

        def seconds(self, call: Any, calls: int, *, warm: bool = True) -> float:
            name = call.__name__
            turns.append((name, calls, warm))
            return seconds[name] + (0 if warm else 0.1)  # a first call is slow

    def side(name: str) -> Any:
        def call() -> torch.Tensor:
            return torch.ones(2)

        call.__name__ = name
        return call

    def pedantic(target: Any, teardown: Any, rounds: int) -> None:
        for _ in range(rounds):
            target()
            teardown()

    benchmark: Any = SimpleNamespace(pedantic=pedantic, disabled=False, extra_info={})
    meter: Any = Meter()
    naive = {"naive": side("naive"), "quick": side("quick")}
    (row,) = compare(
        benchmark, {"": side("fused")}, naive, meter=meter, watch=Watch(), name="", shape="", images=1,
        precision="float32", floor_ms=None, seconds=6.45,
    )  # fmt: skip
    assert row.rounds == 5, "6.45 s at 50 + 1100 + 50 ms and three times 30 ms a round"
    assert turns[-3:] == [("fused", 5, True), ("naive", 1, False), ("quick", 500, True)]
    assert row.fused_ms == pytest.approx(10)
    assert row.others_ms == pytest.approx({"quick": 0.1})


def _inference(n: int, batch: int, fused_ms: float, **given: Any) -> Any:
    case = {"network": "net", "num_models": n, "batch": batch, "dtype": "float32", "macs": 100 * n}
    return _row(**{"name": "inference", "shape": f"n = {n}, batch {batch}", "fused_ms": fused_ms, "case": case} | given)


@pytest.mark.usefixtures("_benchmarks")
def test_small_tables() -> None:
    from derived import small_tables
    from table import markdown, text

    rows = [
        *(_inference(n, batch, n * batch * (1.0 if n == 4 else 1.2)) for n in (2, 4) for batch in (8, 64)),
        _inference(4, 8, 40.0, name="anytime"),
        _row(name="op call", shape="an op", fused_ms=0.012),
        _row(name="op call", shape="an op", fused_ms=0.004, backend="dispatcher"),
        _row(name="training step", memory_mib={"fused": 1000.4, "naive": 2000.0}),
    ]
    tables = {table.title.partition(":")[0].partition(",")[0]: table for table in small_tables(rows)}
    assert {title: list(table.lines) for title, table in tables.items()} == {
        "The first n models against all": [("net", batch, "2 of 4", "60.0%", "50.0%", "+20%") for batch in ("8", "64")],
        "Time per image at batch 64 against batch 8": [
            ("net", n, ms, ms, "1.00") for n, ms in (("2", "2.400"), ("4", "4.000"))
        ],
        "Anytime": [("net", "8", "40.000", "32.000", "1.25")],
        "An op call on tiny inputs": [("an op", "12.0", "4.0", "8.0", "2000.0")],
        "Memory of a training step at its peak": [("1 x 1", "1,000", "2,000")],
    }
    assert small_tables([_row()]) == []
    document = markdown(rows, {}, "")
    assert all(f"## {table.title}" in document for table in tables.values())
    assert "op call" not in document.partition("##")[0], "it has a table of its own"
    assert "backend" not in text(rows[:4])[0]


@pytest.mark.usefixtures("_benchmarks")
def test_peers_compute_the_exported_graph(tmp_path: Path, rng: torch.Generator) -> None:
    import peers
    from comparison import check_agreement

    from hne.inference import EnsembleMean, write_onnx

    installed = [name for name in peers.PEERS if peers.missing(name) is None]
    if not installed:
        pytest.skip("no inference engine is installed")
    ensemble = EnsembleMean(build(NaiveHNE, TREES["doubling"], rng, torch.float32), 2).eval()
    x = images(rng, dtype=torch.float32)
    with torch.no_grad():
        expected = ensemble(x)
        write_onnx(ensemble, x[:2], tmp_path / "graph.onnx")
    for name in installed:
        side = peers.PEERS[name](tmp_path / "graph.onnx", x)
        check_agreement(side(), expected)
        x.neg_()  # it reads the images that it was given
        with pytest.raises(AssertionError):
            check_agreement(side(), expected)
        x.neg_()


@pytest.mark.usefixtures("_benchmarks")
def test_what_is_missing_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "openvino" else "there")
    assert peers.missing("onnxruntime") is None
    assert peers.missing("openvino") == "openvino is not installed: pip install -e '.[peers]'"
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert (peers.missing("openvino") or "").startswith("openvino and onnx and onnxscript are not installed")


@pytest.mark.slow
@pytest.mark.usefixtures("_benchmarks")
def test_freezing_folds_batch_norms(rng: torch.Generator) -> None:
    import channels_last
    import peers
    from torch._inductor.utils import run_and_get_code

    model = channels_last.of(build(NaiveHNE, TREES["single"], rng, torch.float32))
    x = images(rng, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), peers.freezing():
        result, code = run_and_get_code(torch.compile(model, dynamic=False), x)
    torch.testing.assert_close(result, model(x))
    assert "batch_norm" not in "".join(code)


@pytest.mark.usefixtures("_benchmarks")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_at_the_peak() -> None:
    import memory

    def call() -> None:
        first = torch.ones(8 << 20)
        del first
        torch.ones(12 << 20)

    assert 46 <= memory.peak_mib(call) < 78, "one at a time, 32 and 48 MiB"


@pytest.mark.usefixtures("_benchmarks")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
def test_memory_of_a_training_step() -> None:
    import memory
    from bench_model import _memory_of_step
    from workload import TINY

    small, large = (memory.in_fresh_process(_memory_of_step, "fused", TINY, batch, {}, 1) for batch in (64, 1024))
    assert 0 <= small < large


@pytest.mark.usefixtures("_benchmarks")
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
