"""``python benchmarks/cycles.py OLD NEW``: builds of the CPU library compared in processor cycles, on one thread.

A side is the folder of a built library (``_C.abi3.so``), or an engine: ``onnxruntime``, ``openvino``. Each runs in a
process of its own, and all take turns. Counted are the cycles that the process itself spends in user mode, so that time
given to other processes does not count. A neighbour on the same physical core or in the shared cache still costs
cycles: look at the least ones, and repeat.

A table gives for each case the cycles, divided by the fewest that its multiply-adds can take with AVX2 (16 float32 a
cycle), and the speed, divided by that of the first side: by the least cycles, and the median of all rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from worker import FUSED, make_side, write_files

import hne_kernels as K
from hne import FusedHNE
from hne.reporting import show_table

ROOT = Path(__file__).parent.parent
_PER_CYCLE = 16  # multiply-adds
_SYSCALL = {"x86_64": 298, "aarch64": 241}  # perf_event_open
_CYCLES, _SIZE, _USER_ONLY = 0, 128, 0b1100000  # the hardware event, the size of its attributes, and flags of them
_CALLS = 3  # least cycles of so many measurements in a turn


class CounterError(RuntimeError):
    """The processor's counter cannot be read."""


def open_counter() -> Callable[[], int]:
    """A function that returns the cycles that this thread has spent in user mode.

    Raises:
        CounterError: The system gives no access to the counter.
    """
    number = _SYSCALL.get(platform.machine())
    if number is None or sys.platform != "linux":
        raise CounterError(f"cycles are counted on Linux with x86-64 or arm64, this is {sys.platform}")
    attributes = struct.pack("<IIQ", 0, _SIZE, _CYCLES) + bytes(24) + struct.pack("<Q", _USER_ONLY)
    library = ctypes.CDLL(None, use_errno=True)
    file: int = library.syscall(number, attributes.ljust(_SIZE, b"\0"), 0, -1, -1, 0)
    if file < 0:
        reason = os.strerror(ctypes.get_errno())
        raise CounterError(f"perf_event_open: {reason} (see /proc/sys/kernel/perf_event_paranoid)")
    return lambda: int.from_bytes(os.read(file, 8), "little")


class Case(NamedTuple):
    """Something to compute."""

    name: str
    macs: int
    call: Callable[[], object]


def products() -> list[Case]:
    """1x1 convolutions of eight branches, with the channels and maps of HNE-ResNet's layers; one 3x3 convolution."""

    def case(inputs: int, outputs: int, side: int, kernel: int = 1) -> Case:
        x, bias = torch.randn(8, 1, side, side, inputs), torch.randn(8, outputs)
        weight = K.pack_weight(torch.randn(8, outputs, inputs, kernel, kernel))
        macs = 8 * side * side * kernel * kernel * inputs * outputs
        name = f"{kernel}x{kernel} {inputs} > {outputs}, {side}x{side}"
        return Case(name, macs, lambda: K.fused_conv2d(x, weight, bias, padding=kernel // 2))

    sizes = ((256, 64, 8), (64, 256, 8), (128, 32, 16), (32, 128, 16), (64, 16, 32), (16, 64, 32), (24, 144, 14))
    return [*(case(*size) for size in sizes), case(32, 32, 14, 3)]


def networks(engine: str | None, folder: Path) -> list[Case]:
    """The first n members of networks, computed by this package or an engine."""
    cases = []
    for preset, size, batches in (
        ("hne_resnet50_cifar", 32, ((1, 1), (4, 1), (16, 1), (1, 8), (4, 8))),
        ("hne_mobilenetv2_075", 224, ((8, 1),)),
    ):
        torch.manual_seed(0)
        model = FusedHNE.from_preset(preset, num_classes=100).eval()
        for n, batch in batches:
            files = write_files(folder / preset, model, n, size)
            side = make_side(engine or FUSED, files, batch)
            cases.append(Case(f"{preset} n = {n}, batch {batch}", model.macs(n, size) * batch, side))
    return cases


def serve(name: str, folder: Path) -> None:
    """Print the cases of a side as JSON; then the cycles of the case that each line of the standard input names."""
    torch.set_num_threads(1)
    engine = None if Path(name).is_dir() else name
    cases = {case.name: case for case in [*(products() if engine is None else []), *networks(engine, folder)]}
    cycles = open_counter()
    with torch.inference_mode():
        for case in cases.values():
            case.call()
        print(json.dumps({case.name: case.macs for case in cases.values()}), flush=True)
        for line in sys.stdin:
            case = cases[line.rstrip("\n")]
            repeats, counts = max(1, round(3e7 / case.macs)), []
            for _ in range(_CALLS):
                start = cycles()
                for _ in range(repeats):
                    case.call()
                counts.append((cycles() - start) / repeats)
            print(min(counts), flush=True)


class Side:
    """A process that measures the cases of a build or an engine."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))}
        if Path(name).is_dir():
            environ["HNE_EXTENSION_DIR"] = str(Path(name).resolve())
        command = [sys.executable, __file__, "--serve", name, str(folder)]
        self.process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.macs: dict[str, int] = json.loads(self._line())
        self.counts: dict[str, list[float]] = {case: [] for case in self.macs}

    def measure(self, case: str) -> None:
        """A turn of a case; nothing if the side does not have it."""
        if case in self.macs:
            assert self.process.stdin is not None
            print(case, file=self.process.stdin, flush=True)
            self.counts[case].append(float(self._line()))

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process has ended with code {self.process.wait()}")
        return line


def compare(names: Sequence[str], rounds: int, only: str) -> None:
    """Measure in turns, the sides of every second round in reverse order, and print a table."""
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(name, Path(folder)) for name in names]
        cases = [case for case in sides[0].macs if only in case]
        for number in tqdm(range(rounds), unit="round", leave=False):
            for case in cases:
                for side in reversed(sides) if number % 2 else sides:
                    side.measure(case)
        for side in sides:
            side.process.communicate()  # closes its standard input, which ends it
    rows = []
    for case in cases:
        row = [case]
        for side in sides:
            counts, first, least = side.counts.get(case), sides[0].counts[case], side.macs.get(case, 0) / _PER_CYCLE
            if not counts:
                row += ["", ""]
                continue
            row.append(f"{min(counts) / least:.3f} / {statistics.median(counts) / least:.3f}")
            ratios = [before / after for before, after in zip(first, counts, strict=True)]
            row.append(f"{min(first) / min(counts):.3f} / {statistics.median(ratios):.3f}")
        rows.append(row)
    columns = [f"{column} ({number})" for number in range(1, len(sides) + 1) for column in ("cycles", "speed")]
    caption = "\n".join(f"({number}) {side.name}" for number, side in enumerate(sides, 1))
    show_table(["case", *columns], rows, caption=f"{caption}\ncycles by those of the multiply-adds: least / median")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs="+", metavar="SIDE", help="folder of a built library, onnxruntime or openvino")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each side (default: 10)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose names contain this text")
    arguments = parser.parse_args()
    try:
        open_counter()
    except CounterError as error:
        parser.error(str(error))
    compare(arguments.sides, arguments.rounds, arguments.only)


if __name__ == "__main__":
    serve(sys.argv[2], Path(sys.argv[3])) if sys.argv[1:2] == ["--serve"] else main()
