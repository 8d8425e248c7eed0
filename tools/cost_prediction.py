"""Predicts the time of a kernel on an H100 from its machine code, grid and memory. No figure here was measured.

Of a block of each launch the machine code is followed (:mod:`block_trace`). The time of a kernel is the longest of

- device memory: bytes that the second cache does not hold, at the speed of a copy,
- the second cache: sectors that the blocks request and the first cache does not hold,
- the multiprocessors: waves of blocks, each as long as its warps take to issue their instructions and to wait for them,

and a fixed time for the launch. The model ignores: clusters and the distance of cache slices, conflicts between reads
and writes of device memory, misses of the instruction and constant caches, the first cache's limited size, and waits
for atomic operations. Copies by the bulk engine are counted by their bytes only.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cost_launches import Recorded, Recording, Region
from cost_work import H100, Machine, Memory, Work, pointers
from machine_code import Function
from predicted_rows import CALIBRATION

# --- the second cache ------------------------------------------------------------------------------------------------

_PAGE = 1 << 16


class Cache:
    """Which memory the second cache holds: the pages used last."""

    def __init__(self, size: int) -> None:
        self._size, self._used = size, 0.0
        self._pages: OrderedDict[int, list[float]] = OrderedDict()  # page: bytes held, and bytes to be written back

    def access(self, reads: Iterable[tuple[Region, float]], writes: Iterable[tuple[Region, float]]) -> float:
        """Access parts of tensors side by side; return the bytes that move to or from device memory."""
        touches = []
        for region, count, is_write in [
            *((region, count, False) for region, count in reads),
            *((region, count, True) for region, count in writes),
        ]:
            if not region.bytes or not count:
                continue
            first, last = region.address // _PAGE, (region.address + region.bytes - 1) // _PAGE
            share = count / (last - first + 1)
            for page in range(first, last + 1):
                touches.append(((page - first + 0.5) / (last - first + 1), page, share, is_write))
        touches.sort()
        moved = 0.0
        for _, page, count, is_write in touches:
            held = self._pages.pop(page, None)
            if held is None:
                held = [0.0, 0.0]
            if count > held[0]:
                moved += 0 if is_write else count - held[0]
                self._used += count - held[0]
                held[0] = count
            if is_write:
                held[1] = max(held[1], count)
            self._pages[page] = held
            while self._used > self._size and len(self._pages) > 1:
                _, (old, dirty) = self._pages.popitem(last=False)
                self._used -= old
                moved += dirty
        return moved


# --- a call ----------------------------------------------------------------------------------------------------------


@dataclass
class Prediction:
    """The predicted cost of one launch. Times in seconds."""

    op: str
    kernel: str  # empty for an operation of PyTorch
    must_bytes: float  # inputs and outputs of the op, once
    memory_bytes: float  # that move to or from device memory
    cache_bytes: float
    memory_s: float
    cache_s: float
    busy_s: float  # of the multiprocessors
    launch_s: float
    issue_s: float = 0.0  # if every scheduler issued an instruction in every cycle
    resident: int = 0
    registers: int = 0
    blocks: int = 0
    threads: int = 0
    shared: int = 0
    instructions: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)
    tail: float = 0.0

    @property
    def seconds(self) -> float:
        return self.launch_s + max(self.memory_s, self.cache_s, self.busy_s)

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {"memory": self.memory_s, "cache": self.cache_s, "issue": self.busy_s, "launch": self.launch_s}
        return max(times, key=lambda name: times[name])


class MissingKernel(Exception):
    """A kernel that was launched is not in the machine code; the message names it."""


@dataclass
class Calibration:
    """Measured time over predicted time, by kernel and for all others; all 1 until a GPU has measured them."""

    kernels: dict[str, float] = field(default_factory=dict)
    everything: float = 1.0
    source: str = "uncalibrated"

    @classmethod
    def load(cls, path: Path = CALIBRATION) -> Calibration:
        if not path.exists():
            return cls()
        record = json.loads(path.read_text())
        return cls(record["kernels"], record["everything"], record["source"])

    def save(self, path: Path = CALIBRATION) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    def factor(self, kernel: str) -> float:
        return self.kernels.get(kernel.partition("<")[0], self.everything)


def predict(
    recording: Recording,
    code: dict[str, Function],
    memory: Memory,
    machine: Machine = H100,
    calibration: Calibration | None = None,
    workers: int = 1,
) -> list[Prediction]:
    """The cost of each launch of a call that is repeated.

    Raises:
        MissingKernel: there is no machine code of a launched kernel.
        Unsupported: the machine code of a kernel cannot be followed.
    """
    calibration = calibration or Calibration()
    jobs = []
    for launch, known in zip(recording.launches, recording.regions, strict=True):
        if not launch.kernel:
            continue
        if launch.kernel not in code:
            raise MissingKernel(f"no machine code of the kernel {launch.kernel}: build the CUDA library again")
        jobs.append((code[launch.kernel], launch, pointers(launch, known)))
    works = iter(zip(jobs, memory.examine(jobs, machine, workers), strict=True))
    found_works: list[tuple[Recorded, list[Region], Work | None]] = []
    for launch in recording.launches:
        if launch.kernel:
            (_, _, regions), work = next(works)
            found_works.append((launch, regions, work))
        else:
            found_works.append((launch, [], None))
    cache = Cache(machine.cache_bytes)
    for _ in range(2):  # the caches hold what the call before has left there
        found = []
        seen: set[tuple[int, Region]] = set()
        for launch, regions, work_or_none in found_works:
            found.append(_predicted(launch, regions, work_or_none, cache, seen, machine, code))
    for prediction in found:
        factor = calibration.factor(prediction.kernel or prediction.op)
        prediction.memory_s *= factor
        prediction.cache_s *= factor
        prediction.busy_s *= factor
    return found


def _predicted(
    launch: Recorded,
    regions: list[Region],
    work: Work | None,
    cache: Cache,
    seen: set[tuple[int, Region]],
    machine: Machine,
    code: dict[str, Function],
) -> Prediction:
    if work is None:
        reads, writes = [(r, float(r.bytes)) for r in launch.reads], [(r, float(r.bytes)) for r in launch.writes]
    else:
        reads = [(regions[number], count) for number, count in work.reads]
        writes = [(regions[number], count) for number, count in work.writes]
    must = 0.0
    for region, count in (*reads, *writes):
        if count and region.external and (launch.call, region) not in seen:
            seen.add((launch.call, region))
            must += count
    moved = cache.access(reads, writes)
    if work is None:
        total = sum(count for _, count in (*reads, *writes))
        return Prediction(
            launch.op,
            "",
            total,
            moved,
            total,
            moved / machine.memory_bytes_per_s,
            total / machine.cache_bytes_per_s,
            0.0,
            machine.launch_s,
        )
    touched = sum(count for _, count in reads)
    from_memory = min(1.0, moved / touched) if touched else 0.0
    cycles = work.cycles["cache"] + from_memory * (work.cycles["memory"] - work.cycles["cache"])
    slots = machine.multiprocessors * machine.schedulers
    waits = any(i.name == "ACQBULK" for i in code[launch.kernel].instructions)
    return Prediction(
        launch.op,
        launch.kernel,
        must,
        moved,
        work.cache_bytes,
        moved / machine.memory_bytes_per_s,
        work.cache_bytes / machine.cache_bytes_per_s,
        cycles / machine.clock,
        machine.programmatic_launch_s if waits else machine.launch_s,
        work.instructions * launch.blocks * -(-launch.threads // 32) / (slots * machine.clock),
        work.resident,
        work.registers,
        launch.blocks,
        launch.threads,
        launch.shared,
        work.instructions,
        work.kinds,
        work.tail,
    )
