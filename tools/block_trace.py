"""Follows the threads of a block through a kernel's machine code, on the host and without the tensors' contents.

Integers, addresses and predicates are computed as the GPU does, from the parameters of a recorded launch. Values that
come from memory are unknown, and so is everything computed from them: the kernels' control flow and addresses do not
depend on it. All threads advance together, those at the lowest address first, so that they meet again where they can; a
barrier holds a thread until all others are at it or have ended.

The result counts instructions of warps, sectors of device memory and passes through shared memory, and records the
order of execution for a simulation of the time.

An instruction that is not implemented, and a loop whose end depends on unknown values, are errors.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from machine_code import BYTES, Function, Instruction
from numpy.typing import NDArray

WARP = 32
SECTOR = 32  # bytes that device memory and the caches move at least
PARAMETERS = 0x210  # address of the parameters in constant memory, sm_90

Array = NDArray[Any]
Value = tuple[Any, Any]  # 32 bits per thread, and which threads' are unknown: an array, or None
_U32, _U64 = np.uint32, np.uint64
_LOW = _U64(0xFFFFFFFF)
_SHARED_WINDOW = 0x10000  # upper half of the generic addresses of shared memory; no tensor is there
_MOST_STEPS = 3_000_000


class Unsupported(Exception):
    """The machine code cannot be followed; the message says where and why."""


@dataclass
class Launch:
    """A recorded launch of a kernel."""

    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes requested at launch
    parameters: bytes
    programmatic: bool = False  # may begin before the kernel ahead of it has ended


@dataclass
class Access:
    """Accesses of one block to device memory by one instruction."""

    kind: str  # load, store, copy (to shared memory, past the first cache), bulk
    width: int
    sectors: int = 0  # summed over its executions
    requests: int = 0  # by warps
    missed: int = 0  # sectors of loads that the block had not loaded before
    touched: list[Array] = field(default_factory=list)  # numbers of the sectors


@dataclass
class Trace:
    """What a block did."""

    function: Function
    warps: int
    executed: Counter[int] = field(default_factory=Counter)  # instructions of warps, by index
    segments: list[tuple[int, int, int]] = field(default_factory=list)  # first and last index, bit mask of the warps
    global_accesses: dict[int, Access] = field(default_factory=dict)  # by index
    shared_passes: Counter[int] = field(default_factory=Counter)  # by index, summed over its executions
    shared_requests: Counter[int] = field(default_factory=Counter)
    loaded: set[int] = field(default_factory=set)  # sectors that loads have brought to the first cache
    assumed: set[int] = field(default_factory=set)  # addresses of branches that depend on unknown values


def known_all(*unknown: Any) -> bool:
    return all(u is None for u in unknown)


def _either(*unknown: Any) -> Any:
    result = None
    for u in unknown:
        if u is not None:
            result = u if result is None else result | u
    return result


class Block:
    """The threads of one block."""

    def __init__(self, function: Function, launch: Launch, block: int, loaded: Iterable[int]) -> None:
        self.function, self.launch = function, launch
        self.threads = -(-launch.threads // WARP) * WARP
        self.warps = self.threads // WARP
        n = self.threads
        self.R = np.zeros((256, n), _U32)
        self.R_unknown: list[Any] = [None] * 256
        self.UR = np.zeros((64, n), _U32)
        self.UR_unknown: list[Any] = [None] * 64
        self.P = np.zeros((8, n), bool)
        self.P[7] = True
        self.P_unknown: list[Any] = [None] * 8
        self.UP = np.zeros((8, n), bool)
        self.UP[7] = True
        self.UP_unknown: list[Any] = [None] * 8
        self.every = np.ones(n, bool)
        self.lane = np.arange(n, dtype=_U32) % _U32(WARP)
        constants = bytearray(PARAMETERS) + launch.parameters
        struct.pack_into("<6I", constants, 0, launch.threads, 1, 1, launch.blocks, 1, 1)
        struct.pack_into("<I", constants, 0x28, 0x00FFFDE0)  # the stack
        self.constants = np.frombuffer(bytes(constants) + bytes(-len(constants) % 16 + 16), np.uint8)
        self.special = {
            "SR_TID.X": np.arange(n, dtype=_U32),
            "SR_CTAID.X": np.full(n, block, _U32),
            "SR_LANEID": self.lane,
            "SR_NTID.X": np.full(n, launch.threads, _U32),
            "SR_NCTAID.X": np.full(n, launch.blocks, _U32),
            "SRZ": np.zeros(n, _U32),
        }
        for name in ("TID.Y", "TID.Z", "CTAID.Y", "CTAID.Z", "CgaCtaId", "CLUSTER_CTARANK", "CgaSize"):
            self.special[f"SR_{name}"] = np.zeros(n, _U32)
        self.special["SR_SWINHI"] = np.full(n, _SHARED_WINDOW, _U32)
        self.trace = Trace(function, self.warps)
        self.mask: Any = None  # threads that execute; None for all
        self.jump: Any = None  # set by control flow
        self.patterns: dict[Any, int] = {}
        self.loaded = set(loaded)  # sectors in the first cache

    # --- registers ---------------------------------------------------------------------------------------------------

    def write(self, values: Array, flags: list[Any], index: int, value: Any, unknown: Any, mask: Any) -> None:
        if mask is None:
            values[index] = value
            flags[index] = unknown
            return
        np.copyto(values[index], value, where=mask)
        old = flags[index]
        if unknown is None and old is None:
            return
        new = np.where(mask, False if unknown is None else unknown, False if old is None else old)
        flags[index] = new if new.any() else None

    def run(self) -> Trace:
        """Execute until all threads have ended."""
        code = compiled(self.function)
        live = self.every.copy()
        live[self.launch.threads :] = False
        waiting = np.zeros(self.threads, bool)
        pc = np.zeros(self.threads, np.int64)
        trace, steps = self.trace, 0
        while True:
            runnable = live & ~waiting
            if not runnable.any():
                if not live.any():
                    trace.loaded = self.loaded
                    return trace
                waiting[:] = False
                continue
            here = int(pc[runnable].min())
            mask = runnable & (pc == here)
            others = runnable & ~mask
            meeting = int(pc[others].min()) if others.any() else -1
            full = bool(mask.all())
            self.mask = None if full else mask
            warps = mask.reshape(-1, WARP).any(1)
            count, bits = int(warps.sum()), int(sum(1 << int(w) for w in np.flatnonzero(warps)))
            first = here
            while True:
                self.jump = None
                code[here](self)
                steps += 1
                if self.jump is not None or here + 1 == meeting:
                    break
                here += 1
            trace.segments.append((first, here, bits))
            for index in range(first, here + 1):
                trace.executed[index] += count
            if steps > _MOST_STEPS:
                raise Unsupported(f"{self.function.name}: more than {_MOST_STEPS} steps")
            if self.jump is None:
                pc[mask] = here + 1
                continue
            kind, taken, target = self.jump
            taken = mask if taken is None else mask & taken
            pc[mask] = here + 1
            if kind == "exit":
                live &= ~taken
            elif kind == "barrier":
                waiting |= taken
            elif isinstance(target, int):
                pc[taken] = target
            else:
                pc[taken] = target[taken]

    # --- memory ------------------------------------------------------------------------------------------------------

    def effective(self, guard: Any) -> Any:
        """The mask of a guarded instruction."""
        if guard is None:
            return self.mask
        return guard if self.mask is None else guard & self.mask

    def touch_global(self, index: int, kind: str, width: int, address: Array, unknown: Any, mask: Any) -> None:
        access = self.trace.global_accesses.get(index)
        if access is None:
            access = self.trace.global_accesses[index] = Access(kind, width)
        active = self.every if mask is None else mask
        if unknown is not None:  # an address from memory: a sector for each thread
            access.sectors += int(active.sum())
            access.missed += int(active.sum())
            access.requests += int(active.reshape(-1, WARP).any(1).sum())
            return
        sector = (address >> _U64(5)).astype(np.int64)
        rows = np.where(active, sector, -1).reshape(-1, WARP)
        if width > SECTOR:
            raise Unsupported("wider than a sector")
        last = np.where(active, (address + _U64(width - 1)) >> _U64(5), -1).astype(np.int64).reshape(-1, WARP)
        if not np.array_equal(rows, last):
            rows = np.concatenate([rows, last], 1)
        rows = np.sort(rows, 1)
        new = (rows >= 0) & np.concatenate([np.ones((rows.shape[0], 1), bool), rows[:, 1:] != rows[:, :-1]], 1)
        access.sectors += int(new.sum())
        access.requests += int((rows[:, -1] >= 0).sum())
        touched = rows[new]
        access.touched.append(touched)
        if kind == "load":
            before = len(self.loaded)
            self.loaded.update(touched.tolist())
            access.missed += len(self.loaded) - before

    def touch_shared(self, index: int, width: int, address: Array, unknown: Any, mask: Any) -> None:
        """Count passes: in one, each of the 32 banks of 4 bytes serves one address."""
        width = max(width, 4)
        lanes = WARP * 4 // width  # of a pass without conflicts
        groups = 128 // width
        active = self.every if mask is None else mask
        requests = int(active.reshape(-1, WARP).any(1).sum())
        self.trace.shared_requests[index] += requests
        if unknown is not None:
            self.trace.shared_passes[index] += requests * (WARP // lanes)
            return
        place = (address // _U32(width)).astype(np.int64)
        place = np.where(active, place - (int(place[0]) // 32 * 32), -(1 << 40))
        key = (width, place.tobytes())
        passes = self.patterns.get(key)
        if passes is None:
            rows = np.sort(place.reshape(-1, lanes), 1)
            new = rows > -(1 << 39)
            new[:, 1:] &= rows[:, 1:] != rows[:, :-1]
            number = np.repeat(np.arange(rows.shape[0]), lanes).reshape(rows.shape)
            counts = np.bincount((number * groups + rows % groups)[new], minlength=rows.shape[0] * groups)
            passes = int(counts.reshape(-1, groups).max(1).sum())
            self.patterns[key] = passes
        self.trace.shared_passes[index] += passes


# --- operands --------------------------------------------------------------------------------------------------------

_REGISTER = re.compile(r"^([-~!|]*)(U?)R(\d+|Z)\|?(?:\.(?:reuse|64|H0_H0|H1_H1|U16|U8|F32|X4|X8|X16|B\d))*$")
_CONSTANT = re.compile(r"^([-~|]*)c\[0x0\]\[(?:(U?R\d+)\+?)?(0x[0-9a-f]+)?\]\|?(?:\.\w+)*$")
_PREDICATE = re.compile(r"^(!?)(U?)P(\d|T)$")
_ADDRESS = re.compile(r"\[(?:(R\d+|RZ)(?:\.U32|\.64|\.X4|\.X8|\.X16)?)?\+?(UR\d+|URZ)?\+?(-?0x[0-9a-f]+)?\]")

Getter = Callable[[Block], Value]


def is_predicate(text: str) -> bool:
    return _PREDICATE.match(text) is not None


def predicate(text: str) -> Getter:
    match = _PREDICATE.match(text)
    assert match, text
    negated, uniform, number = match.groups()
    index = 7 if number == "T" else int(number)

    def get(block: Block) -> Value:
        values, flags = (block.UP, block.UP_unknown) if uniform else (block.P, block.P_unknown)
        return (~values[index] if negated else values[index]), flags[index]

    return get


def immediate(text: str) -> int | None:
    """The bits of a number, as an integer or a float32."""
    try:
        return int(text, 0) & 0xFFFFFFFF
    except ValueError:
        pass
    named = {"+INF": 0x7F800000, "-INF": 0xFF800000, "INF": 0x7F800000, "+QNAN": 0x7FFFFFFF, "-QNAN": 0xFFFFFFFF}
    if text in named:
        return named[text]
    try:
        return int(np.float32(float(text)).view(_U32))
    except ValueError:
        return None


def register_of(text: str) -> tuple[bool, int] | None:
    """Whether it is uniform, and its number; 255 and 63 are zero."""
    match = _REGISTER.match(text)
    if match is None:
        return None
    _, uniform, number = match.groups()
    return bool(uniform), (63 if uniform else 255) if number == "Z" else int(number)


def source(text: str, offset: int = 0, *, floating: bool = False) -> Getter:
    """Reads 32 bits; ``offset`` 1 is the upper half of a pair. Signs apply to integers, or to floats."""
    text = text.removesuffix(".reuse")
    if match := _REGISTER.match(text):
        signs, uniform, number = match.groups()
        zero = number == "Z"
        index = 0 if zero else int(number) + offset

        def read(block: Block) -> Value:
            if zero:
                value, unknown = block.special["SRZ"], None
            elif uniform:
                value, unknown = block.UR[index], block.UR_unknown[index]
            else:
                value, unknown = block.R[index], block.R_unknown[index]
            return _signed(value, signs, floating), unknown

        return read
    if match := _CONSTANT.match(text):
        signs, indexed, place = match.groups()
        at = int(place or "0", 16) + 4 * offset
        if indexed is None:

            def constant(block: Block) -> Value:
                value = block.constants[at : at + 4].view(_U32)[0]
                return _signed(np.broadcast_to(value, (block.threads,)), signs, floating), None

            return constant
        base = source(indexed)

        def gathered(block: Block) -> Value:
            value, unknown = base(block)
            places = value.astype(np.int64) + at
            places = np.where((places >= 0) & (places + 4 <= block.constants.size), places, 0)
            words = sum(block.constants[places + i].astype(_U32) << _U32(8 * i) for i in range(4))
            return _signed(words, signs, floating), unknown

        return gathered
    bits = immediate(text)
    if bits is None:
        raise Unsupported(f"the operand {text!r}")
    whole = bits if offset == 0 else (0xFFFFFFFF if bits >> 31 and not floating else 0)
    return lambda block: (np.full(block.threads, whole, _U32), None)


def _signed(value: Any, signs: str, floating: bool) -> Any:
    if "~" in signs:
        value = ~value
    if floating:
        if "|" in signs:
            value = value & _U32(0x7FFFFFFF)
        return value ^ _U32(0x80000000) if "-" in signs else value
    if "|" in signs:
        value = np.abs(value.view(np.int32)).view(_U32)
    return (~value + _U32(1)) if "-" in signs else value


def _wide(getter: Getter, text: str) -> Callable[[Block], tuple[Any, Any]]:
    """The operand of a sum, in 64 bits; a negated one is its complement plus one, which carries for zero."""
    negated = text.startswith("-") and _REGISTER.match(text.removesuffix(".reuse")) is not None
    plain = source(text.removeprefix("-")) if negated else getter

    def get(block: Block) -> tuple[Any, Any]:
        value, unknown = plain(block)
        if negated:
            return (~value).astype(_U64) + _U64(1), unknown
        return value.astype(_U64), unknown

    return get


def destination(text: str, offset: int = 0) -> Callable[[Block, Any, Any, Any], None]:
    """Writes a register or a predicate."""
    if match := _PREDICATE.match(text):
        _, uniform, number = match.groups()
        if number == "T":
            return lambda block, value, unknown, mask: None
        index = int(number)
        if uniform:
            return lambda block, value, unknown, mask: block.write(
                block.UP, block.UP_unknown, index, value, unknown, mask
            )
        return lambda block, value, unknown, mask: block.write(block.P, block.P_unknown, index, value, unknown, mask)
    found = register_of(text)
    if found is None:
        raise Unsupported(f"the destination {text!r}")
    uniform_register, number_ = found
    if number_ == (63 if uniform_register else 255):
        return lambda block, value, unknown, mask: None
    index = number_ + offset
    if uniform_register:
        return lambda block, value, unknown, mask: block.write(block.UR, block.UR_unknown, index, value, unknown, mask)
    return lambda block, value, unknown, mask: block.write(block.R, block.R_unknown, index, value, unknown, mask)


# --- instructions ----------------------------------------------------------------------------------------------------

Action = Callable[[Block, Any], None]  # the mask of threads that take part


def _float(value: Any) -> Any:
    return np.ascontiguousarray(value).view(np.float32)


def _bits(value: Any) -> Any:
    return np.asarray(value, np.float32).view(_U32)


def _split(operands: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Destinations (a register with the predicates beside it) and sources."""
    outputs = []
    rest = list(operands)
    if is_predicate(rest[0]):  # LOP3 P0, RZ, ...
        outputs.append(rest.pop(0))
    outputs.append(rest.pop(0))
    while rest and is_predicate(rest[0]) and not rest[0].startswith("!"):
        outputs.append(rest.pop(0))
    return outputs, rest


def _integer(make: Callable[[Instruction, list[str]], Callable[[Block], Value]]) -> Any:
    """An instruction with one register as a result."""

    def build(instruction: Instruction) -> Action:
        compute = make(instruction, list(instruction.operands[1:]))
        put = destination(instruction.operands[0])

        def act(block: Block, mask: Any) -> None:
            value, unknown = compute(block)
            put(block, value, unknown, mask)

        return act

    return build


def _elementwise(function: Callable[..., Any], count: int) -> Any:
    def make(_: Instruction, sources: list[str]) -> Callable[[Block], Value]:
        getters = [source(text) for text in sources[:count]]

        def compute(block: Block) -> Value:
            found = [get(block) for get in getters]
            return function(*(value for value, _ in found)), _either(*(unknown for _, unknown in found))

        return compute

    return _integer(make)


def _sum(instruction: Instruction) -> Action:
    """IADD3 and its kin, with carries in and out."""
    outputs, sources = _split(instruction.operands)
    if instruction.name in ("IADD3", "UIADD3", "VIADD", "IADD"):
        count = min(3, sum(not is_predicate(text) for text in sources))
    else:
        count = 2
    terms = [_wide(source(text), text) for text in sources[:count]]
    carries = [predicate(text) for text in sources[count:]] if "X" in instruction.modifiers else []
    puts = [destination(text) for text in outputs]

    def act(block: Block, mask: Any) -> None:
        total, unknown = terms[0](block)
        for term in terms[1:]:
            value, also = term(block)
            total, unknown = total + value, _either(unknown, also)
        for carry in carries:
            value, also = carry(block)
            total, unknown = total + value.astype(_U64), _either(unknown, also)
        puts[0](block, (total & _LOW).astype(_U32), unknown, mask)
        for number, put in enumerate(puts[1:], 1):
            put(block, (total >> _U64(32)) >= _U64(number), unknown, mask)

    return act


def _multiply(instruction: Instruction) -> Action:
    """IMAD and UIMAD, with all results and carries."""
    outputs, sources = _split(instruction.operands)
    words = instruction.modifiers
    wide, high, signed = "WIDE" in words, "HI" in words, "U32" not in words
    a, b = source(sources[0]), source(sources[1])
    negated_pair = (wide or high) and sources[2].startswith("-")
    addend_text = sources[2].removeprefix("-") if negated_pair else sources[2]
    c = source(addend_text)
    c_high = source(addend_text, 1) if wide or high else None
    carry = predicate(sources[3]) if "X" in words else None
    if carry is None and len(sources) > 3:
        raise Unsupported(f"{instruction.opcode} with four sources")
    put, put_high = destination(outputs[0]), destination(outputs[0], 1) if wide else None
    put_carry = [destination(text) for text in outputs[1:]]

    def act(block: Block, mask: Any) -> None:
        (x, x_unknown), (y, y_unknown), (z, z_unknown) = a(block), b(block), c(block)
        unknown = _either(x_unknown, y_unknown, z_unknown)
        extra: Any = _U64(0)
        if carry is not None:
            bit, also = carry(block)
            extra, unknown = bit.astype(_U64), _either(unknown, also)
        if not wide and not high:
            put(block, x * y + z + extra.astype(_U32), unknown, mask)
            return
        if signed:
            product = (x.view(np.int32).astype(np.int64) * y.view(np.int32).astype(np.int64)).view(_U64)
        else:
            product = x.astype(_U64) * y.astype(_U64)
        assert c_high is not None
        upper, also = c_high(block)
        unknown = _either(unknown, also)
        addend = z.astype(_U64) | upper.astype(_U64) << _U64(32)
        if negated_pair:
            addend = ~addend + _U64(1)
        total = product + addend
        carried = total < product
        if carry is not None:
            total = total + extra
            carried = carried | (total < extra)
        if high:
            put(block, (total >> _U64(32)).astype(_U32), unknown, mask)
        else:
            put(block, (total & _LOW).astype(_U32), unknown, mask)
            assert put_high is not None
            put_high(block, (total >> _U64(32)).astype(_U32), unknown, mask)
        for put_one in put_carry:
            put_one(block, carried, unknown, mask)

    return act


def _lea(instruction: Instruction) -> Action:
    outputs, sources = _split(instruction.operands)
    words = instruction.modifiers
    a = source(sources[0])
    b = _wide(source(sources[1]), sources[1])
    high, extended = "HI" in words, "SX32" in words
    sources = sources[2:]
    c = source(sources.pop(0)) if high and not extended else None
    if not is_predicate(sources[0]):
        shift = int(sources.pop(0), 0)
    else:
        raise Unsupported(f"{instruction.opcode} without a shift")
    carry = predicate(sources[0]) if "X" in words else None
    puts = [destination(text) for text in outputs]

    def act(block: Block, mask: Any) -> None:
        (x, unknown), (y, also) = a(block), b(block)
        unknown = _either(unknown, also)
        wide = x.astype(_U64)
        if high:
            if extended:
                wide = x.view(np.int32).astype(np.int64).view(_U64)
            else:
                assert c is not None
                upper, also = c(block)
                unknown = _either(unknown, also)
                wide = wide | upper.astype(_U64) << _U64(32)
            shifted = ((wide << _U64(shift)) >> _U64(32)) & _LOW
        else:
            shifted = (wide << _U64(shift)) & _LOW
        total = shifted + y
        if carry is not None:
            bit, also = carry(block)
            total, unknown = total + bit.astype(_U64), _either(unknown, also)
        puts[0](block, (total & _LOW).astype(_U32), unknown, mask)
        for put in puts[1:]:
            put(block, total > _LOW, unknown, mask)

    return act


def _shift(instruction: Instruction) -> Action:
    words = instruction.modifiers
    left, high = "L" in words, "HI" in words
    signed = "S32" in words or "S64" in words
    wide = "U64" in words or "S64" in words
    a, n, c = (source(text) for text in instruction.operands[1:4])
    put = destination(instruction.operands[0])
    most = 63 if wide else 32

    def act(block: Block, mask: Any) -> None:
        (x, u0), (count, u1), (y, u2) = a(block), n(block), c(block)
        unknown = _either(u0, u1, u2)
        count = count & _U32(most if wide else 31) if "W" in words else np.minimum(count, _U32(most))
        count = count.astype(_U64)
        pair = x.astype(_U64) | y.astype(_U64) << _U64(32)
        if left:
            result = pair << count
        elif signed:
            result = (pair.view(np.int64) >> count.astype(np.int64)).view(_U64)
        else:
            result = pair >> count
        result = result >> _U64(32) if high else result & _LOW
        put(block, result.astype(_U32), unknown, mask)

    return act


def _lut(values: list[Any], table: int) -> Any:
    """A logic function of three inputs, given by its truth table."""
    a, b, c = values
    simple = {
        0xC0: lambda: a & b,
        0xFC: lambda: a | b,
        0x3C: lambda: a ^ b,
        0x33: lambda: ~b,
        0x30: lambda: a & ~b,
        0x80: lambda: a & b & c,
        0xFE: lambda: a | b | c,
        0xF8: lambda: a | (b & c),
    }
    if table in simple:
        return simple[table]()
    result = a ^ a
    for bit in range(8):
        if table >> bit & 1:
            result = result | ((a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c))
    return result


def _lop3(instruction: Instruction) -> Action:
    operands = list(instruction.operands)
    put_predicate = destination(operands.pop(0)) if is_predicate(operands[0]) else None
    put = destination(operands[0])
    getters = [source(text) for text in operands[1:4]]
    table = int(operands[4], 0)

    def act(block: Block, mask: Any) -> None:
        found = [get(block) for get in getters]
        value = _lut([v for v, _ in found], table)
        unknown = _either(*(u for _, u in found))
        put(block, value, unknown, mask)
        if put_predicate is not None:
            put_predicate(block, value != 0, unknown, mask)

    return act


def _plop3(instruction: Instruction) -> Action:
    operands = instruction.operands
    puts = [destination(text) for text in operands[:2]]
    getters = [predicate(text) for text in operands[2:5]]
    tables = [int(text, 0) for text in operands[5:7]]

    def act(block: Block, mask: Any) -> None:
        found = [get(block) for get in getters]
        values, unknown = [v for v, _ in found], _either(*(u for _, u in found))
        for put, table in zip(puts, tables, strict=True):
            put(block, _lut(values, table), unknown if table not in (0, 0xFF) else None, mask)

    return act


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
}


def _combined(instruction: Instruction, compare: Callable[[Block], Value], rest: list[str]) -> Action:
    """Write a comparison, and its negation, each combined with a predicate."""
    puts = [destination(text) for text in instruction.operands[:2]]
    other = predicate(rest[0])
    combine = next((_COMBINE[word] for word in instruction.modifiers if word in _COMBINE), np.logical_and)
    conjunction = combine is np.logical_and

    def act(block: Block, mask: Any) -> None:
        value, unknown = compare(block)
        with_value, with_unknown = other(block)
        with_value = with_value.copy()  # it may be the first destination
        for put, result in zip(puts, (value, ~value), strict=True):
            combined = combine(result, with_value)
            doubt = _either(unknown, with_unknown)
            if doubt is not None and combine is not np.logical_xor:
                # A known input may decide: false for AND, true for OR.
                sure = _decides(result, unknown, conjunction) | _decides(with_value, with_unknown, conjunction)
                doubt = doubt & ~sure
                combined = np.where(sure, not conjunction, combined)
                doubt = doubt if doubt.any() else None
            put(block, combined, doubt, mask)

    return act


def _decides(value: Any, unknown: Any, conjunction: bool) -> Any:
    deciding = ~value if conjunction else value
    return deciding if unknown is None else deciding & ~unknown


def _isetp(instruction: Instruction) -> Action:
    words = instruction.modifiers
    operands = list(instruction.operands)
    a, b = source(operands[2]), source(operands[3])
    comparison = next(word for word in words if word in _COMPARE)
    function, signed = _COMPARE[comparison], "U32" not in words
    extended = predicate(operands[5]) if "EX" in words else None

    def compare(block: Block) -> Value:
        (x, u0), (y, u1) = a(block), b(block)
        if signed:
            x, y = np.ascontiguousarray(x).view(np.int32), np.ascontiguousarray(y).view(np.int32)
        value, unknown = function(x, y), _either(u0, u1)
        if extended is not None:
            low, also = extended(block)
            unknown = _either(unknown, also)
            if comparison == "NE":
                value = value | low
            elif comparison == "EQ":
                value = value & low
            else:
                strict = _COMPARE[comparison[0] + "T"](x, y)
                value = strict | ((x == y) & low)
        return value, unknown

    return _combined(instruction, compare, operands[4:])


def _fsetp(instruction: Instruction) -> Action:
    operands = list(instruction.operands)
    a, b = source(operands[2], floating=True), source(operands[3], floating=True)
    word = instruction.modifiers[0]
    unordered = word.endswith("U") and word not in ("NU",)
    function = _COMPARE.get(word[:2])

    def compare(block: Block) -> Value:
        (x, u0), (y, u1) = a(block), b(block)
        x, y = _float(x), _float(y)
        if function is None:
            return np.zeros(block.threads, bool), block.every
        value = function(x, y)
        if unordered:
            value = value | np.isnan(x) | np.isnan(y)
        return value, _either(u0, u1)

    return _combined(instruction, compare, operands[4:])


def _select(instruction: Instruction) -> Action:
    operands = instruction.operands
    floating = instruction.name == "FSEL"
    a, b, p = (
        source(operands[1], floating=floating),
        source(operands[2], floating=floating),
        predicate(operands[3]),
    )
    put = destination(operands[0])

    def act(block: Block, mask: Any) -> None:
        (x, u0), (y, u1), (chosen, u2) = a(block), b(block), p(block)
        value = np.where(chosen, x, y)
        unknown = None
        if not known_all(u0, u1, u2):
            no = np.zeros(block.threads, bool)
            unknown = np.where(chosen, no if u0 is None else u0, no if u1 is None else u1)
            unknown = unknown if u2 is None else unknown | u2
            unknown = unknown if unknown.any() else None
        put(block, value, unknown, mask)

    return act


def _extreme(instruction: Instruction) -> Action:
    """IMNMX, VIMNMX and VIADDMNMX: the smaller of two numbers if the predicate is true, else the larger."""
    operands = list(instruction.operands)
    put = destination(operands[0])
    first = source(operands[1])
    adds = instruction.name == "VIADDMNMX"
    addend = source(operands[2]) if adds else None
    second, p = source(operands[3 if adds else 2]), predicate(operands[4 if adds else 3])
    kind = _U32 if "U32" in instruction.modifiers else np.int32
    if "RELU" in instruction.modifiers:
        raise Unsupported(instruction.opcode)

    def act(block: Block, mask: Any) -> None:
        (x, u0), (y, u1), (smaller, u2) = first(block), second(block), p(block)
        unknown = _either(u0, u1, u2)
        if addend is not None:
            value, also = addend(block)
            x, unknown = x + value, _either(unknown, also)
        x, y = np.ascontiguousarray(x).view(kind), np.ascontiguousarray(y).view(kind)
        put(block, np.where(smaller, np.minimum(x, y), np.maximum(x, y)).view(_U32), unknown, mask)

    return act


def _permute(instruction: Instruction) -> Action:
    if instruction.modifiers:
        raise Unsupported(instruction.opcode)
    a, selector, b = (source(text) for text in instruction.operands[1:4])
    put = destination(instruction.operands[0])

    def act(block: Block, mask: Any) -> None:
        (x, u0), (s, u1), (y, u2) = a(block), selector(block), b(block)
        pair = x.astype(_U64) | y.astype(_U64) << _U64(32)
        result = np.zeros(block.threads, _U64)
        for byte in range(4):
            nibble = (s >> _U32(4 * byte)).astype(_U64) & _U64(15)
            value = pair >> ((nibble & _U64(7)) * _U64(8)) & _U64(255)
            sign = np.where(value >= _U64(128), _U64(255), _U64(0))
            result |= np.where(nibble >= _U64(8), sign, value) << _U64(8 * byte)
        put(block, result.astype(_U32), _either(u0, u1, u2), mask)

    return act


def _load_constant(instruction: Instruction) -> Action:
    count = max(1, instruction.width // 4)
    narrow = instruction.width if instruction.width < 4 else 0
    signed = any(word in ("S8", "S16") for word in instruction.modifiers)
    gets = [source(instruction.operands[-1], i) for i in range(count)]
    puts = [destination(instruction.operands[0], i) for i in range(count)]

    def act(block: Block, mask: Any) -> None:
        found = [get(block) for get in gets]  # before the first register is written, which may be the index
        for (value, unknown), put in zip(found, puts, strict=True):
            if narrow:
                value = value & _U32((1 << 8 * narrow) - 1)
                if signed:
                    value = (value << _U32(32 - 8 * narrow)).view(np.int32) >> (32 - 8 * narrow)
                    value = value.view(_U32)
            put(block, value, unknown, mask)

    return act


def _all_unknown(puts: list[Callable[[Block, Any, Any, Any], None]]) -> Action:
    def act(block: Block, mask: Any) -> None:
        for put in puts:
            put(block, False, block.every, mask)  # a number, too

    return act


def _special(instruction: Instruction) -> Action:
    name = instruction.operands[1]
    count = 1 if instruction.name != "CS2R" or "32" in instruction.modifiers else 2
    puts = [destination(instruction.operands[0], i) for i in range(count)]
    if "CLOCK" in name or "GLOBALTIMER" in name:
        return _all_unknown(puts)

    def act(block: Block, mask: Any) -> None:
        if name not in block.special:
            raise Unsupported(f"the special register {name}")
        for put in puts:
            put(block, block.special[name], None, mask)

    return act


def _to_float(instruction: Instruction) -> Action:
    """I2F and I2FP."""
    words = instruction.modifiers
    if "F64" in words or "F16" in words:
        return _unknown(instruction)
    wide, signed = "U64" in words or "S64" in words, not ("U32" in words or "U64" in words)
    if instruction.name == "I2F" and "RP" in words and not wide:
        signed = "U32" not in words
    a, a_high = source(instruction.operands[1]), source(instruction.operands[1], 1)
    put = destination(instruction.operands[0])

    def act(block: Block, mask: Any) -> None:
        value, unknown = a(block)
        exact: Any
        if wide:
            upper, also = a_high(block)
            pair = value.astype(_U64) | upper.astype(_U64) << _U64(32)
            exact, unknown = (pair.view(np.int64) if signed else pair), _either(unknown, also)
        else:
            exact = np.ascontiguousarray(value).view(np.int32) if signed else value
        rounded = exact.astype(np.float32)
        if "RP" in words:
            below = rounded.astype(np.float64) < exact.astype(np.float64)
            rounded = np.where(below, np.nextafter(rounded, np.float32(np.inf)), rounded)
        put(block, _bits(rounded), unknown, mask)

    return act


def _to_integer(instruction: Instruction) -> Action:
    words = instruction.modifiers
    if "F64" in words or "F16" in words:
        return _unknown(instruction)
    wide, signed = "U64" in words or "S64" in words, not ("U32" in words or "U64" in words)
    a = source(instruction.operands[1], floating=True)
    puts = [destination(instruction.operands[0], i) for i in range(2 if wide else 1)]

    def act(block: Block, mask: Any) -> None:
        value, unknown = a(block)
        number = _float(value).astype(np.float64)
        number = np.where(np.isnan(number), 0, number)
        number = np.trunc(number) if "TRUNC" in words else np.floor(number) if "FLOOR" in words else np.rint(number)
        bits = 64 if wide else 32
        low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1)) if signed else (0.0, 2.0**bits)
        largest = (1 << bits - 1) - 1 if signed else (1 << bits) - 1
        kind = np.int64 if signed or not wide else _U64
        whole = np.where(number >= high, largest, np.clip(number, low, high * (1 - 2**-53)).astype(kind)).astype(_U64)
        for number_, put in enumerate(puts):
            put(block, (whole >> _U64(32 * number_) & _LOW).astype(_U32), unknown, mask)

    return act


def _floating(function: Callable[..., Any], count: int) -> Callable[[Instruction], Action]:
    def build(instruction: Instruction) -> Action:
        getters = [source(text, floating=True) for text in instruction.operands[1 : 1 + count]]
        put = destination(instruction.operands[0])

        def act(block: Block, mask: Any) -> None:
            found = [get(block) for get in getters]
            unknown = _either(*(u for _, u in found))
            if unknown is not None and unknown.all():
                put(block, _U32(0), unknown, mask)
                return
            put(block, _bits(function(*(_float(v) for v, _ in found))), unknown, mask)

        return act

    return build


def _mufu(instruction: Instruction) -> Action:
    if "RCP" in instruction.modifiers:
        return _floating(lambda x: np.float32(1) / x, 1)(instruction)
    if "RSQ" in instruction.modifiers:
        return _floating(lambda x: np.float32(1) / np.sqrt(x), 1)(instruction)
    return _unknown(instruction)


def _half_constant(instruction: Instruction) -> Action:
    """HFMA2 with zero factors loads two constants of 16 bits; else its result is unknown."""
    operands = instruction.operands
    if len(operands) == 5 and "RZ" in operands[1] and "RZ" in operands[2]:
        words = []
        for text in operands[3:5]:
            number = np.float32(float(text.replace("QNAN", "nan").replace("INF", "inf")))
            if "BF16_V2" in instruction.modifiers or "BF16" in instruction.modifiers:
                words.append(int(number.view(_U32)) >> 16)
            else:
                words.append(int(np.float16(number).view(np.uint16)))
        bits = _U32(words[0] << 16 | words[1])
        put = destination(operands[0])
        return lambda block, mask: put(block, bits, None, mask)
    return _unknown(instruction)


def _predicates_to_register(instruction: Instruction) -> Action:
    put = destination(instruction.operands[0])
    if instruction.operands[1] != "PR":
        raise Unsupported(f"{instruction.opcode} {instruction.operands}")
    base, selected = source(instruction.operands[2]), source(instruction.operands[3])

    def act(block: Block, mask: Any) -> None:
        (value, u0), (bits, u1) = base(block), selected(block)
        packed = sum(block.P[i].astype(_U32) << _U32(i) for i in range(7))
        chosen = int(bits[0])
        unknown = _either(u0, u1, *(block.P_unknown[i] for i in range(7) if chosen >> i & 1))
        put(block, value & ~bits | packed & bits, unknown, mask)

    return act


def _register_to_predicates(instruction: Instruction) -> Action:
    value, selected = source(instruction.operands[1].partition(".")[0]), source(instruction.operands[2])

    def act(block: Block, mask: Any) -> None:
        (word, unknown), (bits, _) = value(block), selected(block)
        for i in range(7):
            if int(bits[0]) >> i & 1:
                block.write(block.P, block.P_unknown, i, (word >> _U32(i) & _U32(1)).astype(bool), unknown, mask)

    return act


_RESULTS = {"HMMA": 4, "IMMA": 4, "DADD": 2, "DMUL": 2, "DFMA": 2}  # registers, where it is not one


def _unknown(instruction: Instruction) -> Action:
    """An instruction whose results are not followed."""
    count = _RESULTS.get(instruction.name, 1)
    if instruction.name in ("F2F", "I2F", "FRND") and instruction.modifiers[:1] == ("F64",):
        count = 2
    if instruction.name == "HMMA" and "F32" not in instruction.modifiers:
        count = 2
    puts = []
    for text in instruction.operands[:2]:
        if is_predicate(text):
            puts.append(destination(text))
        elif register_of(text) is not None:
            puts += [destination(text, i) for i in range(count)]
            break

    return _all_unknown(puts)


def _data_predicate(instruction: Instruction) -> Action:
    """A comparison of data."""
    puts = [destination(text) for text in instruction.operands[:2] if is_predicate(text)]
    return _all_unknown(puts)


def _never(instruction: Instruction) -> Action:
    """FCHK asks whether a division needs its slow path; data are taken to be ordinary."""
    put = destination(instruction.operands[0])
    return lambda block, mask: put(block, False, None, mask)


def _always(instruction: Instruction) -> Action:
    put = destination(instruction.operands[0])
    return lambda block, mask: put(block, True, None, mask)


def _elect(instruction: Instruction) -> Action:
    put = destination(instruction.operands[0])
    return lambda block, mask: put(block, block.lane == 0, None, mask)


def _address(instruction: Instruction, place: int, *, wide: bool) -> Callable[[Block], Value]:
    text = instruction.operands[place]
    match = _ADDRESS.search(text)
    if match is None:
        raise Unsupported(f"the address {text!r}")
    register, uniform, offset = match.groups()
    shift = next((n for word, n in ((".X16]", 4), (".X8", 3), (".X4", 2), (".X16", 4)) if word in text), 0)
    low, high = source(register or "RZ"), source(register or "RZ", 1)
    upair = [source(uniform or "URZ"), source(uniform or "URZ", 1)]
    displacement = int(offset or "0", 16)

    def get(block: Block) -> Value:
        value, unknown = low(block)
        if not wide:
            base, also = upair[0](block)
            return (value << _U32(shift)) + base + _U32(displacement & 0xFFFFFFFF), _either(unknown, also)
        upper, also = high(block)
        total = value.astype(_U64)
        if ".U32" not in text:
            total = total | upper.astype(_U64) << _U64(32)
            unknown = _either(unknown, also)
        if uniform is not None and ("UR" in text.partition("[")[2]):
            (a, u0), (b, u1) = upair[0](block), upair[1](block)
            total = total + (a.astype(_U64) | b.astype(_U64) << _U64(32))
            unknown = _either(unknown, u0, u1)
        return total + _U64(displacement & 0xFFFFFFFFFFFFFFFF), unknown

    return get


def _descriptor_free(text: str) -> str:
    """``desc[UR8][R8.64+0x10]`` without the descriptor."""
    return re.sub(r"^desc\[UR\d+\]", "", text)


def _memory(instruction: Instruction) -> Action:
    """Loads and stores of device, shared and local memory."""
    name, width = instruction.name, instruction.width
    operands = tuple(_descriptor_free(text) for text in instruction.operands)
    instruction = Instruction(instruction.address, instruction.guard, instruction.opcode, operands)
    index = instruction.address // BYTES
    place = next(i for i, text in enumerate(operands) if "[" in text)
    if name in ("LDSM", "STSM"):
        matrices = int(instruction.modifiers[-1])
        address = _address(instruction, place, wide=False)
        puts = [destination(operands[0], i) for i in range(matrices)] if name == "LDSM" else []

        def matrix(block: Block, mask: Any) -> None:
            value, unknown = address(block)
            block.touch_shared(index, 16, value, unknown, mask)
            for put in puts:
                put(block, 0, block.every, mask)

        return matrix
    if name == "LDGSTS":
        to, from_ = _address(instruction, 0, wide=False), _address(instruction, 1, wide=True)
        enabled = predicate(operands[2]) if len(operands) > 2 else None

        def copy(block: Block, mask: Any) -> None:
            value, unknown = to(block)
            block.touch_shared(index, width, value, unknown, mask)
            value, unknown = from_(block)
            if enabled is not None:
                chosen, also = enabled(block)
                if also is None:
                    mask = chosen if mask is None else mask & chosen
            block.touch_global(index, "copy", width, value, unknown, mask)

        return copy
    is_global = name in ("LDG", "STG", "RED", "ATOMG", "ATOM", "LD", "ST")
    address = _address(instruction, place, wide=is_global)
    loads = name in ("LDG", "LDS", "LDL", "LD", "ATOMG", "ATOM", "ATOMS")
    puts = [destination(operands[0], i) for i in range(max(1, width // 4))] if loads else []

    def access(block: Block, mask: Any) -> None:
        value, unknown = address(block)
        if name in ("LD", "ST"):  # a generic address
            here = value >> _U64(32) == _U64(_SHARED_WINDOW)
            inside = here if mask is None else here & mask
            if inside.any():
                block.touch_shared(index, width, value.astype(_U32), unknown, inside)
            outside = ~here if mask is None else ~here & mask
            if outside.any():
                block.touch_global(index, "load" if loads else "store", width, value, unknown, outside)
        elif is_global:
            block.touch_global(index, "load" if loads else "store", width, value, unknown, mask)
        elif name[-1] == "S":
            block.touch_shared(index, width, value, unknown, mask)
        for put in puts:
            put(block, 0, block.every, mask)

    return access


def _nothing(_: Instruction) -> Action:
    return lambda block, mask: None


def _barrier(instruction: Instruction) -> Action:
    def act(block: Block, mask: Any) -> None:
        block.jump = ("barrier", mask, 0)

    return act


def _exit(instruction: Instruction) -> Action:
    def act(block: Block, mask: Any) -> None:
        block.jump = ("exit", mask, 0)

    return act


def _return(instruction: Instruction) -> Action:
    register, place = " ".join(instruction.operands).split()
    get, offset = source(register), int(place, 16)

    def act(block: Block, mask: Any) -> None:
        value, unknown = get(block)
        if unknown is not None and (unknown.any() if mask is None else (unknown & mask).any()):
            raise Unsupported("an unknown return address")
        block.jump = ("go", mask, (value.astype(np.int64) + offset) // BYTES)

    return act


def _branch(instruction: Instruction) -> Action:
    target = instruction.target
    if target is None or "DIV" in instruction.modifiers:
        if "DIV" in instruction.modifiers:  # taken where the threads of a warp have parted
            return lambda block, mask: None
        raise Unsupported(f"the branch {instruction.opcode} {instruction.operands}")
    conditions = [predicate(text) for text in instruction.operands[:-1] if is_predicate(text)]
    goal = target // BYTES

    def act(block: Block, mask: Any) -> None:
        for condition in conditions:
            value, unknown = condition(block)
            if unknown is not None:
                raise Unsupported("a branch on an unknown second predicate")
            mask = value if mask is None else mask & value
        if mask is None or mask.any():
            block.jump = ("go", mask, goal)

    return act


_BUILDERS: dict[str, Callable[[Instruction], Action]] = {
    **dict.fromkeys(("IADD3", "UIADD3", "VIADD", "IADD"), _sum),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply),
    **dict.fromkeys(("LEA", "ULEA"), _lea),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("LOP3", "ULOP3"), _lop3),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _plop3),
    **dict.fromkeys(("ISETP", "UISETP"), _isetp),
    **dict.fromkeys(("SEL", "USEL", "FSEL"), _select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIADDMNMX", "UIMNMX"), _extreme),
    **dict.fromkeys(("PRMT", "UPRMT"), _permute),
    **dict.fromkeys(("MOV", "UMOV", "R2UR"), _elementwise(lambda x: x, 1)),
    **dict.fromkeys(("IABS",), _elementwise(lambda x: np.abs(x.view(np.int32)).view(_U32), 1)),
    **dict.fromkeys(("LDC", "ULDC", "LDCU"), _load_constant),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("I2F", "I2FP"), _to_float),
    "F2I": _to_integer,
    "MUFU": _mufu,
    "FADD": _floating(lambda a, b: a + b, 2),
    "FMUL": _floating(lambda a, b: a * b, 2),
    "FFMA": _floating(lambda a, b, c: a * b + c, 3),
    "FSETP": _fsetp,
    "FCHK": _never,
    "P2R": _predicates_to_register,
    "R2P": _register_to_predicates,
    "ELECT": _elect,
    **dict.fromkeys(("HFMA2",), _half_constant),
    **dict.fromkeys(("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDSM", "STSM", "LDGSTS", "RED"), _memory),
    **dict.fromkeys(("LD", "ST", "ATOMG"), _memory),
    **dict.fromkeys(
        ("HMMA", "FMNMX", "F2FP", "F2F", "HADD2", "HMUL2", "HMNMX2", "DADD", "DMUL", "DFMA", "SHFL", "MOVM", "FRND"),
        _unknown,
    ),
    **dict.fromkeys(("DSETP", "HSETP2", "VOTE", "VOTEU", "B2R"), _data_predicate),
    **dict.fromkeys(
        (
            *("NOP", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "YIELD", "BMOV", "LDGDEPBAR", "DEPBAR", "MEMBAR", "FENCE"),
            *("ERRBAR", "CCTL", "PREEXIT", "ACQBULK", "NANOSLEEP", "CGAERRBAR", "UCGABAR_ARV", "UCGABAR_WAIT"),
            "WARPGROUP",
            "ENDCOLLECTIVE",
        ),
        _nothing,
    ),
    "BAR": _barrier,
    "EXIT": _exit,
    "RET": _return,
    **dict.fromkeys(("BRA", "CALL"), _branch),
}


def _guarded(instruction: Instruction, function: Function) -> Callable[[Block], None]:
    builder = _BUILDERS.get(instruction.name)
    where = f"{function.name} at {instruction.address:#x}: {instruction.opcode} {', '.join(instruction.operands)}"
    if builder is None:

        def fail(block: Block) -> None:
            raise Unsupported(f"{where}: not implemented")

        return fail
    try:
        action = builder(instruction)
    except (Unsupported, StopIteration, ValueError, IndexError) as error:
        message = f"{where}: {error or 'operands'}"

        def refuse(block: Block) -> None:
            raise Unsupported(message)

        return refuse
    if not instruction.guard or instruction.guard in ("PT", "UPT"):
        return lambda block: action(block, block.mask)
    guard = predicate(instruction.guard)
    flows = instruction.name in ("BRA", "EXIT", "CALL", "RET", "BAR")
    calls = flows and instruction.name == "BRA" and _skips_a_call(instruction, function)

    def execute(block: Block) -> None:
        value, unknown = guard(block)
        if flows and unknown is not None:
            doubtful = unknown if block.mask is None else unknown & block.mask
            if doubtful.any():
                block.trace.assumed.add(instruction.address)
                if instruction.target is not None and instruction.target <= instruction.address:
                    raise Unsupported(f"{where}: a loop that ends by a value from memory")
                value = np.where(unknown, calls, value)
        mask = block.effective(value)
        if mask is None or not flows or mask.any():
            action(block, mask)

    return execute


def _skips_a_call(instruction: Instruction, function: Function) -> bool:
    """Whether a branch goes around a call, the slow path of a division or a logarithm, which data rarely need."""
    start, target = instruction.address // BYTES + 1, instruction.target
    if target is None or target <= instruction.address:
        return False
    return any(other.name == "CALL" for other in function.instructions[start : target // BYTES])


_COMPILED: dict[str, list[Callable[[Block], None]]] = {}


def compiled(function: Function) -> list[Callable[[Block], None]]:
    """The actions of a kernel's instructions."""
    key = function.symbol + function.digest
    if key not in _COMPILED:
        _COMPILED[key] = [_guarded(instruction, function) for instruction in function.instructions]
    return _COMPILED[key]


def follow(function: Function, launch: Launch, block: int, loaded: Iterable[int] = ()) -> Trace:
    """Execute one block.

    Args:
        function: the machine code.
        launch: grid and parameters.
        block: number of the block.
        loaded: sectors that earlier blocks have left in the multiprocessor's first cache.

    Raises:
        Unsupported: an instruction is unknown, or a loop ends by a value from memory.
    """
    with np.errstate(all="ignore"):
        try:
            return Block(function, launch, block, loaded).run()
        except Unsupported as error:
            raise Unsupported(f"{function.name}, block {block}: {error}") from None
