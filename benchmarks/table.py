"""The tables at the end of a run, on the terminal, in Markdown and in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from math import isfinite, isnan, nan
from pathlib import Path
from typing import Any

from comparison import Row
from derived import Line, is_in_large_table, small_tables

from hne.files import to_json, write_text

_TEXT_COLUMNS = ("name", "shape", "backend", "network", "op", "")  # all other columns are numbers
TITLES = {  # of sides; a side without a title is shown by its name
    "eager": "naive eager",
    "channels_last": "channels-last",
    "channels_last_compiled": "channels-last, compiled",
    "frozen": "torch.compile + freezing",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


def header(rows: Sequence[Row]) -> tuple[str, ...]:
    """Titles of the columns that have a value in some row."""
    return (
        "name",
        "shape",
        *(["backend"] if any(row.backend for row in rows) else []),
        "fused ms",
        "naive ms",
        *(f"{TITLES.get(name, name)} ms" for name in _others(rows)),
        "images/s",
        "ratio",
        *(["of peak"] if any(row.floor_ms for row in rows) else []),
        "",
    )


def cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    """Format a row, by the columns of :func:`header`."""
    others = (_cell(row, name, row.others_ms.get(name, nan)) for name in _others(rows))
    share = [] if row.of_peak is None else ["" if isnan(row.of_peak) else f"{row.of_peak:.0%}"]
    return (
        row.name,
        row.shape,
        *([row.backend] if any(row.backend for row in rows) else []),
        _cell(row, row.backend, row.fused_ms),
        _cell(row, "naive", row.naive_ms),
        *others,
        "" if isnan(row.images_per_s) else f"{row.images_per_s:,.0f}",
        "" if isnan(row.ratio) else f"{row.ratio:.2f}",
        *(share or ([""] if any(row.floor_ms for row in rows) else [])),
        "SLOWER" if row.ratio < 1 else "",
    )


def _cell(row: Row, side: str, ms: float) -> str:
    """Format a time, or say that the side failed; empty if it was not measured."""
    if isfinite(ms):
        return f"{ms:.3f}"
    return "failed" if side in row.failed else ""


def _others(rows: Sequence[Row]) -> list[str]:
    fused = {row.backend for row in rows}
    names = (name for row in rows for name in (*row.others_ms, *row.failed))
    return [name for name in dict.fromkeys(names) if name != "naive" and name not in fused]


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each side that failed, with the reason."""
    lines = (f"{row.name}, {row.shape}: {side or 'fused'}: {why}" for row in rows for side, why in row.failed.items())
    return list(dict.fromkeys(lines))


def machine_line(machine: dict[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in machine.items())


def summary(rows: Sequence[Row]) -> str:
    slower, failed = sum(row.ratio < 1 for row in rows), len(failures(rows))
    note = f"; {failed} sides failed" if failed else ""
    return f"{len(rows)} comparisons, fused slower than another side in {slower}{note}"


def text(rows: Sequence[Row]) -> list[str]:
    """Format the large table for the terminal."""
    return aligned(header(rows), [cells(row, rows) for row in rows])


def aligned(titles: Line, lines: Sequence[Line]) -> list[str]:
    """Align the columns for the terminal: text left, numbers right."""
    lines = [titles, *lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return ["  ".join(map(_aligned, line, widths, titles)).rstrip() for line in lines]


def _aligned(cell: str, width: int, title: str) -> str:
    return cell.ljust(width) if title in _TEXT_COLUMNS else cell.rjust(width)


def markdown(rows: Sequence[Row], machine: dict[str, str], note: str, remarks: Sequence[str] = ()) -> str:
    """Format the document: machine, summary, large table, small tables."""
    large = [row for row in rows if is_in_large_table(row)]
    lines = [
        "# Fused against naive",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
        "",
        f"Medians of alternating rounds; ratio = fastest other side / fused. {summary(large)}. {note}".rstrip(),
        "",
        *(f"- {remark}" for remark in remarks),
        *([""] if remarks else []),
        *_markdown_table(header(large), [cells(row, large) for row in large]),
    ]
    if failed := failures(rows):
        lines += ["", "## Sides that failed", "", *(f"- {line}" for line in failed)]
    for table in small_tables(rows):
        lines += ["", f"## {table.title}", "", *_markdown_table(table.header, table.lines)]
    return "\n".join(lines) + "\n"


def _markdown_table(titles: Line, lines: Sequence[Line]) -> list[str]:
    return [
        "| " + " | ".join(titles) + " |",
        "|" + "|".join("---" if title in _TEXT_COLUMNS else "---:" for title in titles) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def save(
    path: Path, rows: Sequence[Row], machine: dict[str, str], note: str = "", remarks: Sequence[str] = ()
) -> list[Path]:
    """Write ``path`` with the suffixes .md and .json; return both paths.

    Earlier rows of the same machine and commit stay, unless they were measured again; so do earlier cells of a row that
    was measured again with fewer sides. ``remarks`` are lines about this run, for the top of the table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(path.name + ending) for ending in (".md", ".json")]
    earlier = {_key(row): row for row in _earlier_rows(written[1], machine, note)}
    fresh = {_key(row) for row in rows}
    rows = [
        *(row for key, row in earlier.items() if key not in fresh),
        *(_completed(row, earlier[_key(row)]) if _key(row) in earlier else row for row in rows),
    ]
    write_text(written[0], markdown(rows, machine, note, remarks))
    record = {"machine": machine, "note": note, "remarks": list(remarks), "rows": [row.record() for row in rows]}
    write_text(written[1], to_json(record, written[1], indent=1) + "\n")
    return written


def _key(row: Row) -> tuple[str, str, str]:
    return row.name, row.shape, row.backend


def _completed(row: Row, earlier: Row) -> Row:
    """A row with the earlier cells of sides that it has not measured; those that failed now stay failed."""
    old = {"naive": earlier.naive_ms, earlier.backend: earlier.fused_ms, **earlier.others_ms}
    known = {side: ms for side, ms in old.items() if side not in row.failed and isfinite(ms)}
    measured = {"naive": row.naive_ms, row.backend: row.fused_ms, **row.others_ms}
    measured = known | {side: ms for side, ms in measured.items() if isfinite(ms)}
    fused_ms, naive_ms = measured.pop(row.backend, nan), measured.pop("naive", nan)
    images_per_s = earlier.images_per_s if isnan(row.images_per_s) and isfinite(fused_ms) else row.images_per_s
    working = {*measured, *(["naive"] if isfinite(naive_ms) else []), *([row.backend] if isfinite(fused_ms) else [])}
    failed = {side: why for side, why in (earlier.failed | row.failed).items() if side not in working}
    return replace(
        row,
        fused_ms=fused_ms,
        naive_ms=naive_ms,
        others_ms=measured,
        images_per_s=images_per_s,
        p99_ms=earlier.p99_ms | row.p99_ms,
        failed=failed,
    )


def _earlier_rows(path: Path, machine: dict[str, str], note: str) -> list[Row]:
    """Read the rows of an earlier run with the same note, machine and commit."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if (record["machine"] | {"date": ""}, record["note"]) != (machine | {"date": ""}, note):
        return []
    return read_rows(record)


def read_rows(record: dict[str, Any]) -> list[Row]:
    """Parse the rows of a JSON file."""
    names = [f.name for f in fields(Row)]
    absent = dict.fromkeys(("fused_ms", "naive_ms", "images_per_s"), nan)  # of sides that failed
    return [Row(**absent | {name: row[name] for name in names if name in row}) for row in record["rows"]]
