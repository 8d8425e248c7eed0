"""What a launch makes a GPU do: blocks are followed through the machine code, and their warps simulated.

Occupancy follows from registers, shared memory and threads. The time of a wave of blocks is that in which one scheduler
of a multiprocessor issues the instructions of its warps in order, with the stalls and scoreboards that the compiler has
written into the machine code, and with latencies and widths of the pipes from published microbenchmarks.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import multiprocessing
import pickle
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from block_trace import Launch, Trace, Unsupported, follow
from cost_launches import FOLDER, Recorded, Region
from machine_code import Function, Instruction


@dataclass(frozen=True)
class Machine:
    """An H100 SXM. Rates are those of a large copy and of published microbenchmarks, not of this machine."""

    name: str = "H100"
    multiprocessors: int = 132
    clock: float = 1.755e9
    schedulers: int = 4
    registers: int = 65536  # of a multiprocessor
    threads: int = 2048
    blocks: int = 32
    shared: int = 228 * 1024
    shared_reserved: int = 1024  # of each block
    memory_bytes_per_s: float = 3.0e12
    cache_bytes_per_s: float = 5.5e12
    cache_bytes: int = 35_000_000  # of 50 MB: both halves may hold a copy of the same data
    cache_latency: int = 280  # cycles
    memory_latency: int = 620
    launch_s: float = 1.5e-6  # between dependent kernels of a graph
    programmatic_launch_s: float = 0.8e-6  # where the next kernel's blocks are already there
    host_launch_s: float = 19e-6  # an operation launched by Python, forward and backward of autograd included


H100 = Machine()

# --- machine code ----------------------------------------------------------------------------------------------------

# Cycles that an instruction of a warp keeps its pipe, in each of the four parts of a multiprocessor.
_ALU, _FMA, _HEAVY, _SPECIAL, _MEMORY, _TENSOR, _UNIFORM, _BRANCH, _DOUBLE, _NONE = range(10)
_PIPES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"), (_FMA, 1)),
    **dict.fromkeys(("IMAD",), (_HEAVY, 2)),
    **dict.fromkeys(("MUFU", "F2I", "I2F", "F2F", "FRND", "POPC", "FLO"), (_SPECIAL, 8)),
    **dict.fromkeys(("HMMA", "IMMA"), (_TENSOR, 6)),
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP"), (_DOUBLE, 2)),
    **dict.fromkeys(("BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "NOP", "BAR"), (_BRANCH, 1)),
    **dict.fromkeys(("LDGDEPBAR", "DEPBAR", "MEMBAR", "ACQBULK", "PREEXIT"), (_NONE, 1)),
}
_FIRST_CACHE = 38  # latency
_MEMORY_NAMES = {
    "LD",
    "ST",
    "LDG",
    "STG",
    "LDS",
    "STS",
    "LDL",
    "STL",
    "LDSM",
    "STSM",
    "LDGSTS",
    "LDC",
    "SHFL",
    "RED",
    "ATOMG",
}
_LATENCIES = {
    **dict.fromkeys(("LD", "LDS", "LDSM", "LDC", "ULDC"), 30),
    **dict.fromkeys(("MUFU", "F2I", "I2F", "F2F", "SHFL", "S2R", "S2UR", "R2UR", "VOTE"), 24),
    **dict.fromkeys(("STS", "STG", "STSM"), 10),
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP"), 16),
}
KINDS = ("wide global", "scalar global", "shared", "matrix", "division", "branch", "other")


def kind_of(instruction: Instruction) -> str:
    """The column of the table that an instruction is counted in."""
    name = instruction.name
    if name in ("LDG", "STG", "LDGSTS", "UBLKCP", "UTMALDG", "RED", "ATOMG"):
        return "scalar global" if instruction.width < 4 else "wide global"
    if name in ("LD", "ST", "LDS", "STS", "LDSM", "STSM"):
        return "shared"
    if name in ("HMMA", "HGMMA", "IMMA"):
        return "matrix"
    if name in ("I2F", "F2I") or (name == "MUFU" and "RCP" in instruction.modifiers):
        return "division"
    return "branch" if name in ("BRA", "CALL", "RET", "BAR", "BSSY", "BSYNC", "EXIT") else "other"


def blocks_per_multiprocessor(function: Function, threads: int, shared: int, machine: Machine = H100) -> int:
    """Blocks that fit at the same time: by threads, registers and shared memory."""
    warps = -(-threads // 32)
    registers = -(-function.usage.registers * 32 // 256) * 256  # of a warp
    by_registers = machine.registers // machine.schedulers // max(registers, 1) * machine.schedulers // warps
    # cuobjdump counts the reserved part among the kernel's own.
    memory = -(-(max(function.usage.shared, machine.shared_reserved) + shared) // 128) * 128
    return min(machine.blocks, machine.threads // (32 * warps), by_registers, machine.shared // memory)


# --- simulation ------------------------------------------------------------------------------------------------------

_FIELDS = 10


def _library() -> ctypes.CDLL:
    """The simulation, compiled for the host."""
    source = Path(__file__).resolve().parent / "issue_simulation.cpp"
    output = FOLDER / "libissue_simulation.so"
    if not output.exists() or output.stat().st_mtime < source.stat().st_mtime:
        output.parent.mkdir(parents=True, exist_ok=True)
        command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-o", str(output), str(source)]
        subprocess.run(command, check=True)
    library = ctypes.CDLL(str(output))
    library.hne_simulate_issue.restype = ctypes.c_int64
    return library


def _scheduling(trace: Trace, latency: int) -> np.ndarray:
    """The properties of each instruction that the simulation reads."""
    table = np.zeros((len(trace.function.instructions), _FIELDS), np.int32)
    for index, i in enumerate(trace.function.instructions):
        name = i.name
        if name in _MEMORY_NAMES:
            pipe, cycles = _MEMORY, 4  # of the multiprocessor's one memory pipe
            if requests := trace.shared_requests[index]:
                cycles = math.ceil(4 * trace.shared_passes[index] / requests)
            if (access := trace.global_accesses.get(index)) and access.requests:
                cycles = max(cycles, math.ceil(access.sectors / access.requests))  # four sectors in a cycle
        elif name.startswith("U") or name in ("S2UR", "R2UR"):
            pipe, cycles = _UNIFORM, 2
        else:
            pipe, cycles = _PIPES.get(name, (_ALU, 2))
        waits = latency if name in ("LDG", "LDGSTS", "LDL", "ATOMG", "RED") else _LATENCIES.get(name, 0)
        if name == "LDG" and (access := trace.global_accesses.get(index)) and access.sectors:
            waits = _FIRST_CACHE + round(access.missed / access.sectors * (latency - _FIRST_CACHE))
        kind = {"BAR": 1, "LDGSTS": 2, "LDGDEPBAR": 3, "DEPBAR": 4}.get(name, 0)
        pending = int(i.operands[1], 16) if name == "DEPBAR" else 0
        row = (i.stall, i.write_barrier, i.read_barrier, i.wait, pipe, cycles, waits, 12, kind, pending)
        table[index] = row
    return table


def simulate(trace: Trace, resident: int, latency: int, machine: Machine = H100) -> int:
    """Cycles that a multiprocessor takes for ``resident`` blocks that all do what ``trace`` says."""
    places = [(block, warp) for block in range(resident) for warp in range(trace.warps)]
    instructions = np.zeros(trace.warps, np.int64)
    for first, last, bits in trace.segments:
        for warp in range(trace.warps):
            instructions[warp] += (last - first + 1) * (bits >> warp & 1)
    shares = [places[part :: machine.schedulers] for part in range(machine.schedulers)]
    chosen = max(shares, key=lambda share: sum(instructions[warp] for _, warp in share))
    traces, begins, ends, position = [], {}, {}, 0
    for warp in sorted({warp for _, warp in chosen}):
        parts = [np.arange(a, b + 1, dtype=np.int32) for a, b, bits in trace.segments if bits >> warp & 1]
        whole = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        traces.append(whole)
        begins[warp], ends[warp] = position, position + len(whole)
        position += len(whole)
    code = np.ascontiguousarray(_scheduling(trace, latency))
    joined = np.ascontiguousarray(np.concatenate(traces))
    first_ = np.array([begins[warp] for _, warp in chosen], np.int64)
    last_ = np.array([ends[warp] for _, warp in chosen], np.int64)
    blocks = np.array([block for block, _ in chosen], np.int32)

    def pointer(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    cycles: int = _library().hne_simulate_issue(
        pointer(code),
        pointer(joined),
        pointer(first_),
        pointer(last_),
        pointer(blocks),
        ctypes.c_int64(len(chosen)),
        ctypes.c_int64(1 << 40),
    )
    return cycles


# --- a launch --------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What one launch does, apart from the contents of the caches. Bytes are those of the whole grid."""

    resident: int  # blocks of a multiprocessor
    registers: int
    instructions: float  # of a warp, on average
    kinds: dict[str, float]  # instructions of a warp by kind
    cache_bytes: float  # requested from the second cache
    cycles: dict[str, int]  # of the busiest multiprocessor, with data in the second cache and in device memory
    reads: list[tuple[int, float]]  # number of the parameter's pointer, bytes
    writes: list[tuple[int, float]]
    assumed: int = 0  # branches that depend on data
    tail: float = 0.0  # share of the time in which multiprocessors have nothing to do


def pointers(launch: Recorded, regions: Sequence[Region]) -> list[Region]:
    """The tensors that the parameters of a launch point into."""
    found: list[Region] = []
    words = launch.parameters[: len(launch.parameters) // 8 * 8]
    for value in np.frombuffer(words, np.uint64):
        for region in reversed(regions):  # the latest: memory is used again
            if region.bytes and region.address <= int(value) < region.address + region.bytes:
                if region not in found:
                    found.append(region)
                break
    return found


def sampled(blocks: int, machine: Machine = H100) -> list[int]:
    """Numbers of the blocks that are followed: one in the middle, and the one before it on its multiprocessor."""
    middle = blocks // 2
    before = middle - machine.multiprocessors
    return [before if before >= 0 else 0, middle] if middle else [0]


def examine(function: Function, launch: Recorded, regions: Sequence[Region], machine: Machine = H100) -> Work:
    """Follow some blocks of a launch.

    Raises:
        Unsupported: the machine code cannot be followed, or accesses memory that the launch has no pointer to.
        ValueError: a block does not fit on a multiprocessor.
    """
    resident = blocks_per_multiprocessor(function, launch.threads, launch.shared, machine)
    if resident == 0:
        raise ValueError(f"{function.name}: a block of {launch.shared} bytes of shared memory does not fit")
    given = Launch(launch.kernel, launch.blocks, launch.threads, launch.shared, launch.parameters)
    traces: list[Trace] = []
    for block in sampled(launch.blocks, machine):
        # The second block finds in the first cache what the block before has loaded, if one was there.
        warm = traces and launch.blocks // 2 >= machine.multiprocessors
        traces.append(follow(function, given, block, traces[0].loaded if warm else ()))
    scale = launch.blocks / len(traces)
    total: Counter[str] = Counter()
    cache_bytes = 0.0
    reads: Counter[int] = Counter()
    writes: Counter[int] = Counter()
    starts = np.array([region.address for region in regions], np.int64)
    ends = np.array([region.address + region.bytes for region in regions], np.int64)
    for trace in traces:
        for index, count in trace.executed.items():
            total[kind_of(function.instructions[index])] += count
        loaded: list[np.ndarray] = []
        for access in trace.global_accesses.values():
            touched = np.unique(np.concatenate(access.touched)) if access.touched else np.zeros(0, np.int64)
            if access.kind == "load":
                loaded.append(touched)
                cache_bytes += 32 * (access.sectors - sum(map(len, access.touched)))  # unknown addresses
            else:
                cache_bytes += 32 * access.sectors
        # A block's first cache holds what it has loaded.
        cache_bytes += 32 * len(np.unique(np.concatenate(loaded))) if loaded else 0
        for names, bucket in ((("load", "copy"), reads), (("store",), writes)):
            parts = [part for a in trace.global_accesses.values() if a.kind in names for part in a.touched]
            if not parts:
                continue
            sectors = np.unique(np.concatenate(parts)) * 32
            left = np.ones(len(sectors), bool)
            for number in range(len(regions)):
                inside = left & (sectors + 31 >= starts[number]) & (sectors < ends[number])
                bucket[number] += 32 * int(inside.sum())
                left &= ~inside
            if left.any():  # the machine code was not followed rightly
                places = ", ".join(hex(place) for place in sectors[left][:3])
                raise Unsupported(f"{function.name}: accesses outside of the launch's tensors, at {places}")
    middle = traces[-1]
    cycles, tail = {}, 0.0
    for name, latency in (("cache", machine.cache_latency), ("memory", machine.memory_latency)):
        on_busiest = -(-launch.blocks // machine.multiprocessors)
        waves, rest = divmod(on_busiest, resident)
        full = simulate(middle, resident, latency, machine) if waves else 0
        last = simulate(middle, rest, latency, machine) if rest else 0
        cycles[name] = waves * full + last
        tail = 1 - launch.blocks / (on_busiest * machine.multiprocessors)
    warps = sum(trace.warps for trace in traces)
    return Work(
        resident,
        function.usage.registers,
        sum(total.values()) / warps,
        {kind: total[kind] / warps for kind in KINDS},
        cache_bytes * scale,
        cycles,
        [(number, min(count * scale, regions[number].bytes)) for number, count in reads.items() if count],
        [(number, min(count * scale, regions[number].bytes)) for number, count in writes.items() if count],
        assumed=sum(len(trace.assumed) for trace in traces),
        tail=tail,
    )


def _key(function: Function, launch: Recorded, regions: Sequence[Region]) -> tuple[object, ...]:
    """Equal for launches that do the same: pointers count by their alignment and by which of them are equal."""
    parameters = bytearray(launch.parameters)
    for at in range(0, len(parameters) // 8 * 8, 8):
        value = int.from_bytes(parameters[at : at + 8], "little")
        for number, region in enumerate(regions):
            if region.address <= value < region.address + region.bytes:
                place = 1 << 60 | number << 16 | value % 256
                parameters[at : at + 8] = place.to_bytes(8, "little")
                break
    sizes = tuple(region.bytes for region in regions)
    return launch.kernel, function.digest, launch.blocks, launch.threads, launch.shared, bytes(parameters), sizes


class Memory:
    """What was found about launches, kept on disk until the model or the machine code changes."""

    def __init__(self, path: Path | None = FOLDER / "launches.pickle") -> None:
        self._path, self._works = path, dict[str, Work]()
        tools = Path(__file__).resolve().parent
        sources = ("block_trace.py", "cost_work.py", "issue_simulation.cpp", "machine_code.py")
        self._version = hashlib.sha256(b"".join((tools / name).read_bytes() for name in sources)).hexdigest()
        if path is not None and path.exists():
            version, works = pickle.loads(path.read_bytes())
            if version == self._version:
                self._works = works

    def examine(
        self, jobs: Sequence[tuple[Function, Recorded, list[Region]]], machine: Machine, workers: int
    ) -> list[Work]:
        """The work of each launch; launches that do the same are examined once, several at a time."""
        names = [hashlib.sha256(repr((_key(*job), machine)).encode()).hexdigest() for job in jobs]
        missing = {name: job for name, job in zip(names, jobs, strict=True) if name not in self._works}
        if missing:
            _jobs[:] = [(*job, machine) for job in missing.values()]
            _library()  # before the workers start
            with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
                for done, (name, work) in enumerate(
                    zip(missing, pool.map(_examine, range(len(_jobs))), strict=True), 1
                ):
                    self._works[name] = work
                    if done % 50 == 0 or done == len(missing):
                        self._save()
        return [self._works[name] for name in names]

    def _save(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_bytes(pickle.dumps((self._version, self._works)))


_jobs: list[tuple[Function, Recorded, list[Region], Machine]] = []  # forked workers inherit them


def _examine(index: int) -> Work:
    return examine(*_jobs[index])
