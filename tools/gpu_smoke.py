"""A worker of the smoke table: computes the rows of one stage. ``gpu_check.py`` starts it.

Stages: ``rates`` (speed of copies and matrix products), ``ops`` and ``networks`` of a backend, ``memory`` (a small case
of every op, for a memory checker), ``eager`` and ``compiled`` (the network in plain PyTorch).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from math import inf
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

import roofline  # noqa: E402
import rows  # noqa: E402
from smoke_networks import network_rows, plain_rows  # noqa: E402
from smoke_ops import Bench, memory_rows, op_rows  # noqa: E402

STAGES = ("rates", "ops", "networks", "memory", "eager", "compiled")


def table(stage: str, bench: Bench, backend: str) -> Iterator[rows.Row]:
    """The rows of a stage."""
    if stage == "rates":
        for dtype in (torch.bfloat16, torch.float32):
            yield rows.Row(f"rates, {str(dtype).removeprefix('torch.')}", "rates", partial(_rates, bench, dtype))
    elif stage == "ops":
        dtypes = (
            (torch.bfloat16, torch.float32) if bench.is_rehearsal else (torch.bfloat16, torch.float32, torch.float16)
        )
        yield from op_rows(bench, backend, dtypes)
    elif stage == "networks":
        yield from network_rows(bench, backend)
    elif stage == "memory":
        yield from memory_rows(bench, backend)
    else:
        yield from plain_rows(bench, compiled=stage == "compiled")


def _rates(bench: Bench, dtype: torch.dtype) -> rows.Cells:
    """Speed of a large copy and of a large matrix product."""
    megabytes, size = (1, 128) if bench.is_rehearsal else (1024, 8192)
    found = roofline.measure(bench.meter, torch.device(bench.device), dtype, megabytes=megabytes, sizes=(size,))
    return {"bytes/s": found.bytes_per_s, "note": str(found)}


def _device_works(device: str) -> bool:
    """Whether the GPU still computes; after an illegal access no call of this process succeeds."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--bytes-per-s", type=float, default=inf, help="speed of a large copy, if it is known")
    parser.add_argument("--faults", action="store_true", help="begin with rows that fail, hang and end their process")
    rows.add_arguments(parser)
    args = parser.parse_args()
    bench = Bench.on(args.device, args.bytes_per_s)
    if args.stage == "rates" or args.stage in ("eager", "compiled"):
        torch.backends.cudnn.benchmark = True  # PyTorch's fastest setting
    found = list(table(args.stage, bench, args.backend))
    if args.faults:
        found = [*rows.faults(args.stage), *found]
    rows.serve(found, args, partial(_device_works, args.device))


if __name__ == "__main__":
    main()
