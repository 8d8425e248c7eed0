"""What is compared on which kind of machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from meters import GpuMeter, HostMeter, Meter

import hne_kernels as K


@dataclass(frozen=True)
class Workload:
    """Sizes and sides of the comparisons."""

    device: str
    backends: tuple[str, ...]  # fused sides; "" is the one that is chosen automatically
    naive: tuple[str, ...]  # naive sides besides `naive` itself
    network: dict[str, Any]  # arguments of FusedHNE.from_preset
    size: int  # of its images
    ops: tuple[int, torch.dtype]  # batch, and dtype of the features
    inference: tuple[tuple[int, int, torch.dtype], ...]  # number of models, batch, dtype
    training: tuple[tuple[int, torch.dtype], ...]  # batch, and float32 or what autocast lowers to
    compiler: dict[str, str]  # options of torch.compile
    rates: tuple[int, int] | None  # MiB to copy and size of matrices, to measure what the machine can do
    seconds: float = 1.5  # for a comparison

    @property
    def meter(self) -> Meter:
        return GpuMeter(torch.device(self.device)) if self.device == "cuda" else HostMeter()

    def precision(self, dtype: torch.dtype, *, training: bool = False) -> str:
        """Of `comparison.check_agreement`."""
        if dtype == torch.float32 and self.device == "cpu":
            return "float32"
        name = "tf32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")  # tf32: see conftest.py
        return f"{name} training" if training else name


_COMPILED = ("compiled", "channels_last_compiled")
_ON_GPU = tuple(name for name in ("cuda", "triton") if torch.cuda.is_available() and name in K.available_backends())

CPU = Workload(
    device="cpu",
    backends=("",),
    naive=(),
    network={"name": "hne_resnet50_cifar", "num_classes": 100},
    size=32,
    ops=(32, torch.float32),
    inference=tuple((n, batch, torch.float32) for batch in (1, 8, 64) for n in (1, 2, 4, 8, 16)),
    training=((32, torch.float32),),
    compiler={},
    rates=None,
)
GPU = Workload(
    device="cuda",
    backends=_ON_GPU,
    naive=("eager", "channels_last", *_COMPILED),
    network={"name": "hne_resnet50_cifar", "num_classes": 100},
    size=32,
    ops=(128, torch.bfloat16),
    # The goal first: it is what a budget is spent on first.
    inference=tuple((n, batch, torch.bfloat16) for batch in (128, 1, 32, 1024) for n in (16, 4, 1)),
    training=tuple((batch, dtype) for batch in (128, 512) for dtype in (torch.bfloat16, torch.float32)),
    compiler={"mode": "max-autotune-no-cudagraphs"},  # the meter captures the graph, for every side alike
    rates=(1024, 8192),
    seconds=0.5,
)
# Every side and step of GPU on a machine without one: shows that it runs and that the sides agree, not how fast.
REHEARSAL = Workload(
    device="cpu",
    backends=("cpp",),
    naive=GPU.naive,
    network={"name": "hne_tiny", "num_classes": 10, "width": 0.25, "num_models": 2},
    size=8,
    ops=(2, torch.bfloat16),
    inference=((2, 2, torch.bfloat16), (1, 2, torch.float32)),
    training=((4, torch.bfloat16), (4, torch.float32)),
    compiler={"backend": "eager"},
    rates=(1, 64),
)
WORKLOADS = {"cpu": CPU, "gpu": GPU, "rehearsal": REHEARSAL}


def default() -> str:
    """The workload of this machine."""
    return "gpu" if torch.cuda.is_available() else "cpu"
