"""Machine code of GPU kernels (SASS): instructions with their operands and the scheduling that the compiler chose."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cuda_resources
import triton

BYTES = 16  # of an instruction

_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T0-9]) )?\s*([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;\s*(?:/\* 0x([0-9a-f]{16}) \*/)?"
)
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class Instruction:
    """One instruction. Scheduling is in clock cycles; a barrier of 7 is none."""

    address: int
    guard: str  # predicate, such as P0 or !UP1; empty if it always executes
    opcode: str  # with modifiers, such as LDG.E.128
    operands: tuple[str, ...]
    stall: int = 1  # cycles until the next instruction of the warp may issue
    write_barrier: int = 7  # scoreboard that is released when the result is there
    read_barrier: int = 7  # scoreboard that is released when the operands have been read
    wait: int = 0  # bit mask of the scoreboards that must be released first

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.opcode.split(".")[1:])

    @property
    def width(self) -> int:
        """Bytes that a thread moves in a memory access."""
        for word in self.modifiers:
            if word in ("U8", "S8", "U16", "S16", "64", "128"):
                return int(re.sub(r"\D", "", word)) // 8
        return 4

    @property
    def target(self) -> int | None:
        """Address that a branch or call goes to."""
        if self.name in ("BRA", "CALL", "BSSY") and self.operands and self.operands[-1].startswith("0x"):
            return int(self.operands[-1], 16)
        return None


@dataclass(frozen=True)
class Function:
    """A kernel's machine code, with its resources."""

    symbol: str
    name: str  # readable
    text: str  # of the disassembly
    usage: cuda_resources.Usage

    @functools.cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        return parse(self.text)

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @functools.cached_property
    def loops(self) -> tuple[tuple[int, int], ...]:
        """First and last index of each loop: the targets and places of backward branches."""
        found: dict[int, int] = {}
        for index, instruction in enumerate(self.instructions):
            target = instruction.target
            if instruction.name == "BRA" and target is not None and target < instruction.address:
                found[target // BYTES] = max(index, found.get(target // BYTES, 0))
        return tuple(sorted(found.items()))

    @functools.cached_property
    def inner_loops(self) -> tuple[tuple[int, int], ...]:
        """The loops that contain no other loop."""
        return tuple(
            (first, last)
            for first, last in self.loops
            if not any((a, b) != (first, last) and first <= a and b <= last for a, b in self.loops)
        )


def split_operands(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


def split_functions(text: str) -> dict[str, str]:
    """The disassembly of each function, by symbol."""
    parts = _FUNCTION.split(text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions of one function, from the text that ``cuobjdump -sass`` prints."""
    found: list[Instruction] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            address, guard, opcode, operands, _ = match.groups()
            found.append(Instruction(int(address, 16), guard or "", opcode, split_operands(operands)))
        elif (match := _SECOND.match(line)) and found:
            control = int(match[1], 16) >> 41
            last = found[-1]
            found[-1] = Instruction(
                last.address,
                last.guard,
                last.opcode,
                last.operands,
                stall=control & 15,
                write_barrier=control >> 5 & 7,
                read_barrier=control >> 8 & 7,
                wait=control >> 11 & 63,
            )
    return _without_padding(found)


def _without_padding(instructions: list[Instruction]) -> tuple[Instruction, ...]:
    """Without the branch to itself and the NOPs that fill a kernel's last bytes."""
    end = len(instructions)
    while end and (
        instructions[end - 1].name == "NOP" or instructions[end - 1].target == instructions[end - 1].address
    ):
        end -= 1
    return tuple(instructions[:end])


def disassemble(path: Path, target: str, folder: Path | None = None) -> str:
    """The text of ``cuobjdump -sass`` for one target, such as ``sm_90a``; ``folder`` keeps it for the next call."""
    kept = None
    if folder is not None:
        kept = folder / f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.{target}.sass"
        if kept.exists():
            return kept.read_text()
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-arch", target, str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(text)
    return text


def load(paths: Sequence[Path], target: str, folder: Path | None = None) -> dict[str, Function]:
    """All kernels for a target by readable name, from libraries or cubin files."""
    found = {}
    for path in paths:
        # A cubin file is for one target, which only its disassembly names.
        usages = {symbol: usage for kind, symbol, usage in cuda_resources.of_file(path) if kind in (target, "")}
        text = disassemble(path, target, folder) if usages else ""
        if f"code for {target}" not in text:
            continue
        code = split_functions(text)
        names = dict(zip(code, cuda_resources.readable(list(code)), strict=True))
        for symbol, part in code.items():
            found[names[symbol]] = Function(symbol, names[symbol], part, usages[symbol])
    return found
