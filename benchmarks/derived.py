"""Small tables, derived from the rows of the large table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

from comparison import Row

CALL, DISPATCHER = "op call", "dispatcher"  # rows of bench_calls.py: their name, and their second side
BACK_TO_BACK = "back to back"  # rows of bench_processes.py
BUSY_CORE, BUSY_THREADS = "a process spins on a core", "an engine's threads spin"  # rows of bench_contention.py

Line = tuple[str, ...]


@dataclass(frozen=True)
class SmallTable:
    """A title, column titles, and lines."""

    title: str
    header: Line
    lines: Sequence[Line]


def is_in_large_table(row: Row) -> bool:
    """Whether the large table shows a row; the others have a small table only."""
    return row.name not in (CALL, BACK_TO_BACK, BUSY_CORE, BUSY_THREADS)


def small_tables(rows: Sequence[Row]) -> list[SmallTable]:
    """Make the small tables that have rows, from the rows whose fused side works."""
    rows = [row for row in rows if isfinite(row.fused_ms)]
    tables = [
        SmallTable(
            "The first n models against all: time and multiply-adds",
            ("network", "batch", "n", "time", "MACs", "deviation"),
            list(_members(rows)),
        ),
        SmallTable(
            "Time per image at batch 64 against batch 8",
            ("network", "n", "batch 8 ms", "batch 64 ms", "64 / 8"),
            list(_batches(rows)),
        ),
        SmallTable(
            "Anytime, through all models, against one call for all",
            ("network", "batch", "anytime ms", "one call ms", "anytime / one call"),
            list(_anytime(rows)),
        ),
        *(
            SmallTable(f"{title}: p50 / p99 in ms", *_processes(rows, name))
            for name, title in (
                (BACK_TO_BACK, "Calls back to back, each side in a process of its own"),
                (BUSY_CORE, "The same while another process spins on one of the cores"),
                (BUSY_THREADS, "The same after a call of ONNX Runtime in the same process, whose threads still spin"),
            )
        ),
        SmallTable(
            "An op call on tiny inputs, microseconds",
            ("op", "call", "its dispatcher and kernel", "beside them", "plain PyTorch"),
            list(_calls(rows)),
        ),
        SmallTable("Memory of a training step at its peak, MiB", *_memory(rows)),
    ]
    return [table for table in tables if table.lines]


Setting = tuple[str, str, str]  # backend, network, dtype


def _by_case(rows: Sequence[Row], name: str) -> dict[tuple[Setting, int, int], Row]:
    """Index the rows called ``name`` by setting, batch size and number of models."""
    return {
        ((row.backend, row.case["network"], row.case["dtype"]), row.case["batch"], row.case["num_models"]): row
        for row in rows
        if row.name == name and row.case
    }


def _title(setting: Setting) -> str:
    backend, network, dtype = setting
    return ", ".join([network, *([] if dtype == "float32" else [dtype]), *([backend] if backend else [])])


def _members(rows: Sequence[Row]) -> Iterator[Line]:
    inference = _by_case(rows, "inference")
    for (setting, batch, n), row in inference.items():
        largest = max(models for *same, models in inference if same == [setting, batch])
        whole = inference[setting, batch, largest]
        if n < largest:
            time, macs = row.fused_ms / whole.fused_ms, row.case["macs"] / whole.case["macs"]
            shares = f"{time:.1%}", f"{macs:.1%}", f"{time / macs - 1:+.0%}"
            yield _title(setting), str(batch), f"{n} of {largest}", *shares


def _batches(rows: Sequence[Row]) -> Iterator[Line]:
    inference = _by_case(rows, "inference")
    for (setting, batch, n), row in inference.items():
        many = inference.get((setting, 64, n))
        if batch == 8 and many is not None:
            few_ms, many_ms = row.fused_ms / 8, many.fused_ms / 64
            yield _title(setting), str(n), f"{few_ms:.3f}", f"{many_ms:.3f}", f"{many_ms / few_ms:.2f}"


def _anytime(rows: Sequence[Row]) -> Iterator[Line]:
    inference = _by_case(rows, "inference")
    for case, row in _by_case(rows, "anytime").items():
        if case in inference:
            whole = inference[case].fused_ms
            setting, batch, _ = case
            yield _title(setting), str(batch), f"{row.fused_ms:.3f}", f"{whole:.3f}", f"{row.fused_ms / whole:.2f}"


def _processes(rows: Sequence[Row], name: str) -> tuple[Line, list[Line]]:
    rows = [row for row in rows if row.name == name]
    others = list(dict.fromkeys(side for row in rows for side in row.others_ms))
    lines = []
    for row in rows:
        median = {"fused": row.fused_ms, **row.others_ms}
        cells = [f"{median[s]:.3f} / {row.p99_ms[s]:.3f}" if s in median else "" for s in ("fused", *others)]
        ratios = [
            f"{min(ms[side] for side in row.others_ms) / ms['fused']:.2f}" if row.others_ms else ""
            for ms in (median, row.p99_ms)
        ]
        lines.append((row.shape, *cells, *ratios))
    return ("shape", "fused", *others, "ratio of p50", "ratio of p99"), lines


def _calls(rows: Sequence[Row]) -> Iterator[Line]:
    rows = [row for row in rows if row.name == CALL]
    dispatcher = {row.shape: row.fused_ms for row in rows if row.backend == DISPATCHER}
    for row in rows:
        if row.backend != DISPATCHER and row.shape in dispatcher:
            times = (row.fused_ms, dispatcher[row.shape], row.fused_ms - dispatcher[row.shape], row.naive_ms)
            yield row.shape, *(f"{ms * 1e3:.1f}" for ms in times)


def _memory(rows: Sequence[Row]) -> tuple[Line, list[Line]]:
    rows = [row for row in rows if row.memory_mib]
    sides = list(dict.fromkeys(side for row in rows for side in row.memory_mib))
    lines = [(row.shape, *(f"{row.memory_mib[s]:,.0f}" if s in row.memory_mib else "" for s in sides)) for row in rows]
    return ("shape", *sides), lines
