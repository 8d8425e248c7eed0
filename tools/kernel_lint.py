"""Lint of the machine code of the kernels that take the networks' time.

``tools/hot_kernels.json`` has an entry for each: the blocks that a multiprocessor must hold, and how many faults of
each kind are allowed, with a reason where that is not zero. More faults than allowed fail, and so does a kernel of the
networks without an entry. ``python tools/kernel_lint.py --update`` lowers the numbers to what the library has, and adds
missing kernels; it never raises a number unless ``--raise`` is given too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine_code
from cost_launches import FOLDER
from cost_model import TARGET, default_code
from cost_prediction import Prediction
from cost_work import blocks_per_multiprocessor
from machine_code import Function, Instruction

TABLE = Path(__file__).resolve().parent / "hot_kernels.json"
HOT = 0.02  # a kernel with this share of a call's predicted time must have an entry

# Counted faults, with the text of the failure.
FAULTS = {
    "scalar": "16-bit accesses to device memory",
    "divisions": "divisions by run-time numbers",
    "loop_divisions": "divisions in inner loops",
    "local": "accesses to local memory",
}


@dataclass
class Entry:
    """What is allowed of a kernel."""

    kernel: str
    blocks: int  # of a multiprocessor, at least
    threads: int
    shared: int  # largest number of bytes requested at a launch of the networks
    allowed: dict[str, int] = field(default_factory=dict)  # faults by kind; missing: none
    reason: str = ""


def is_division(instruction: Instruction) -> bool:
    """Whether it belongs to a division: the estimate of a reciprocal, or a call of the routine for 64 bits."""
    return (instruction.name == "I2F" and "RP" in instruction.modifiers) or instruction.name == "CALL"


def counts(function: Function) -> dict[str, int]:
    """The faults of a kernel, by kind."""
    code = function.instructions
    inner = [i for first, last in function.inner_loops for i in code[first : last + 1]]
    return {
        "scalar": sum(i.name in ("LDG", "STG") and i.width < 4 for i in code),
        "divisions": sum(map(is_division, code)),
        "loop_divisions": sum(map(is_division, inner)),
        "local": sum(i.name in ("LDL", "STL") for i in code),
    }


def faults(function: Function, entry: Entry) -> list[str]:
    """Why a kernel fails; empty if it does not."""
    found = []
    for kind, count in counts(function).items():
        allowed = entry.allowed.get(kind, 0)
        if count > allowed:
            found.append(f"{count} {FAULTS[kind]}, allowed {allowed}")
    if any(entry.allowed.values()) and not entry.reason:
        found.append("allowed faults without a reason")
    blocks = blocks_per_multiprocessor(function, entry.threads, entry.shared)
    if blocks < entry.blocks:
        found.append(f"{blocks} blocks per multiprocessor, expected {entry.blocks}")
    return found


def load(path: Path = TABLE) -> dict[str, Entry]:
    return {row["kernel"]: Entry(**row) for row in json.loads(path.read_text())}


def save(entries: Iterable[Entry], path: Path = TABLE) -> None:
    rows = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.kernel)]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def lint(
    functions: dict[str, Function], entries: dict[str, Entry], calls: Iterable[Sequence[Prediction]] = ()
) -> list[str]:
    """All failures, one line each.

    Args:
        functions: the machine code, by name.
        entries: what is allowed.
        calls: predicted launches of the networks; each kernel with a large share of a call must have an entry.
    """
    lines = []
    for name, entry in entries.items():
        if name not in functions:
            lines.append(f"{name}: an entry of {TABLE.name}, but no kernel of the library: remove it")
        else:
            lines += [f"{name}: {fault}" for fault in faults(functions[name], entry)]
    for name in sorted(set().union(*(hot(call) for call in calls)) - set(entries)):
        lines.append(f"{name}: takes much of a network's time and has no entry in {TABLE.name}: add it (--update)")
    return lines


def hot(call: Sequence[Prediction]) -> set[str]:
    """Kernels with a large share of a call's predicted time."""
    total = sum(prediction.seconds for prediction in call)
    times: dict[str, float] = {}
    for prediction in call:
        times[prediction.kernel] = times.get(prediction.kernel, 0.0) + prediction.seconds
    return {kernel for kernel, seconds in times.items() if kernel and seconds > HOT * total}


def first_reason(found: dict[str, int]) -> str:
    """The reason of a new entry, to be replaced by a better one by whoever knows it."""
    parts = []
    if found["divisions"]:
        where = "some in inner loops" if found["loop_divisions"] else "once a block or tile, outside of inner loops"
        parts.append(f"divisions of indices, {where}")
    parts += [FAULTS[kind] for kind in ("scalar", "local") if found[kind]]
    return f"there when the entry was made: {'; '.join(parts)}" if parts else ""


def update(
    functions: dict[str, Function], calls: Iterable[Sequence[Prediction]], *, may_raise: bool, path: Path = TABLE
) -> None:
    """Write the table anew. Entries of kernels that are gone are dropped."""
    old = load(path) if path.exists() else {}
    launched: dict[str, dict[str, int]] = {}
    wanted: set[str] = set(old)
    for call in calls:
        wanted |= hot(call)
        for prediction in call:
            if prediction.kernel:
                seen = launched.setdefault(prediction.kernel, {"shared": 0, "threads": prediction.threads})
                seen["shared"] = max(seen["shared"], prediction.shared)
    entries = []
    for name in sorted(wanted & set(functions) & (set(launched) | set(old))):
        found = counts(functions[name])
        before = old.get(name)
        use = launched.get(name) or {
            "shared": before.shared if before else 0,
            "threads": before.threads if before else 0,
        }
        blocks = blocks_per_multiprocessor(functions[name], use["threads"], use["shared"])
        if before is None:
            reason = first_reason(found)
            allowed = {kind: count for kind, count in found.items() if count}
            entries.append(Entry(name, blocks, use["threads"], use["shared"], allowed, reason))
            continue
        best = {kind: count if may_raise else min(count, before.allowed.get(kind, 0)) for kind, count in found.items()}
        allowed = {kind: count for kind, count in best.items() if count}
        least = blocks if may_raise else max(blocks, before.blocks)
        entries.append(Entry(name, least, use["threads"], use["shared"], allowed, before.reason if allowed else ""))
    save(entries, path)


def main() -> int:
    from cost_launches import CALLS
    from cost_model import predictions
    from cost_prediction import Calibration

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, nargs="+", default=default_code(), help="library or cubin files")
    parser.add_argument("--update", action="store_true", help="write the table: lower numbers, add missing kernels")
    parser.add_argument("--raise", dest="may_raise", action="store_true", help="numbers may rise, blocks may fall")
    args: Any = parser.parse_args()
    functions = machine_code.load(args.code, TARGET, FOLDER / "machine_code")
    calls = [launches for _, launches in predictions(CALLS, args.code, Calibration())]
    if args.update:
        update(functions, calls, may_raise=args.may_raise)
    lines = lint(functions, load(), calls)
    print(*lines, f"{len(lines)} failures", sep="\n")
    return min(len(lines), 1)


if __name__ == "__main__":
    sys.exit(main())
