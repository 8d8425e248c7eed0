"""Predicts the time of HNE-ResNet and HNE-MobileNetV2 on an H100 from the machine code of the CUDA library.

No GPU is needed, and nothing is measured: the host code runs with kernels that only report their launch, and sample
blocks are followed through the machine code. See docs/gpu.md for what the model ignores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import cost_table
import machine_code
from cost_launches import CALLS, FOLDER, NETWORKS, ROOT, Call, Recording, emulation, record
from cost_prediction import Calibration, Prediction, predict
from cost_work import Memory

TARGET = "sm_90a"


def recorded(call: Call, library: Path) -> Recording:
    """The launches of a call; recorded once for the same sources."""
    digest = hashlib.sha256(repr(call).encode() + library.read_bytes())
    for path in sorted([*ROOT.glob("hne/**/*.py"), *ROOT.glob("hne_kernels/**/*.py"), *ROOT.glob("tools/cost_l*.py")]):
        digest.update(path.read_bytes())
    kept = FOLDER / "recordings" / digest.hexdigest()[:16]
    if not kept.exists():
        found = record(call, library)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(pickle.dumps(found))
    recording: Recording = pickle.loads(kept.read_bytes())
    return recording


def default_code() -> list[Path]:
    """The CUDA library of this checkout, if it was built."""
    return list((ROOT / "hne_kernels").glob("_C_cuda*.so"))


def predictions(
    calls: Sequence[Call], code: Sequence[Path], calibration: Calibration, target: str = TARGET
) -> Iterator[tuple[Call, list[Prediction]]]:
    """The predicted launches of each call.

    Raises:
        MissingKernel, Unsupported: a kernel is missing from the machine code, or cannot be followed there.
    """
    functions = machine_code.load(code, target, FOLDER / "machine_code")
    library, memory = emulation(), Memory()
    workers = len(os.sched_getaffinity(0))
    for call in calls:
        yield call, predict(recorded(call, library), functions, memory, calibration=calibration, workers=workers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, help="default: both")
    parser.add_argument("--batch", type=int, help="default: 1 and 128")
    parser.add_argument("--training", action="store_true", help="forward and backward only; default: inference, too")
    parser.add_argument("--inference", action="store_true", help="inference only")
    parser.add_argument("--launches", action="store_true", help="a line for every launch, in order")
    parser.add_argument("--markdown", action="store_true", help="a table of the calls for benchmarks/NOTES.md")
    parser.add_argument("--json", type=Path, help="write all launches to a file")
    parser.add_argument(
        "--code", type=Path, nargs="+", default=default_code(), help="library or cubin files (default: the library)"
    )
    args = parser.parse_args()
    calls = [call for call in CALLS if args.network in (None, call.network) and args.batch in (None, call.batch)]
    calls = [call for call in calls if call.training or not args.training]
    calls = [call for call in calls if not (call.training and args.inference)]
    if not calls and args.network and args.batch:
        calls = [Call(args.network, args.batch, args.training)]
    if not args.code:
        parser.error("there is no CUDA library: build it (HNE_CUDA=1 python setup.py build_ext --inplace)")
    calibration = Calibration.load()
    found = []
    for call, launches in predictions(calls, args.code, calibration):
        found.append((call, launches))
        if args.markdown:
            continue
        lines = cost_table.each_launch(launches) if args.launches else []
        print(*lines, *cost_table.table(call, launches, calibration), "", sep="\n", flush=True)
    if args.markdown:
        print(*cost_table.markdown(found, calibration), sep="\n")
    else:
        print(cost_table.LEGEND)
    if args.json:
        record = {str(call): [asdict(p) | {"seconds": p.seconds} for p in launches] for call, launches in found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
