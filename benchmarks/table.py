"""The table at the end of a run, on the terminal and as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from comparison import Row

HEADER = ("name", "shape", "fused ms", "naive ms", "images/s", "ratio", "")


def cells(row: Row) -> tuple[str, ...]:
    slower = "SLOWER" if row.ratio < 1 else ""
    return (
        row.name,
        row.shape,
        f"{row.fused_ms:.3f}",
        f"{row.naive_ms:.3f}",
        f"{row.images_per_s:,.0f}",
        f"{row.ratio:.2f}",
        slower,
    )


def machine_line(machine: dict[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in machine.items())


def summary(rows: Sequence[Row]) -> str:
    slower = sum(row.ratio < 1 for row in rows)
    return f"{len(rows)} comparisons, fused slower than naive in {slower}"


def text(rows: Sequence[Row]) -> list[str]:
    """Aligned columns, names on the left and numbers on the right."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return [
        "  ".join(
            cell.rjust(width) if 2 <= column <= 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def markdown(rows: Sequence[Row], machine: dict[str, str], note: str) -> str:
    """A document: machine, table, how many are slower."""
    lines = [
        "# Fused against naive",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
        "",
        f"Medians of alternating rounds; ratio = naive / fused. {summary(rows)}. {note}".rstrip(),
        "",
        "| " + " | ".join(HEADER) + "|",
        "|---|---|---:|---:|---:|---:|---|",
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def save(path: Path, rows: Sequence[Row], machine: dict[str, str], note: str = "") -> list[Path]:
    """Write ``path`` with the endings .md and .json; returns both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_name(path.name + ending) for ending in (".md", ".json")]
    written[0].write_text(markdown(rows, machine, note))
    record = {"machine": machine, "note": note, "rows": [row.record() for row in rows]}
    written[1].write_text(json.dumps(record, indent=1) + "\n")
    return written
