"""Workloads: the comparisons for each kind of machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from meters import GpuMeter, HostMeter, Meter

import hne_kernels as K
from hne import FusedHNE


class Network(NamedTuple):
    """A network and its image size."""

    name: str
    size: int
    preset: dict[str, Any]  # arguments of FusedHNE.from_preset

    def build(self) -> FusedHNE:
        """A model on the CPU whose running statistics were trained for a few batches; it needs no kernel of a GPU."""
        torch.manual_seed(0)
        model = FusedHNE.from_preset(**self.preset)
        with torch.no_grad():
            for _ in range(3):
                model.train()(torch.randn(8, 3, self.size, self.size))
        return model


@dataclass(frozen=True)
class Workload:
    """Sizes, dtypes and sides of the comparisons."""

    device: str
    backends: tuple[str, ...]  # fused sides; "" is the automatic choice
    others: dict[str, tuple[str, ...]]  # peers besides naive, for "op", "inference" and "training"
    ops: tuple[int, torch.dtype]  # batch, dtype of the features
    heads: tuple[tuple[int, int, int, int], ...]  # members, batch, channels, classes
    training: tuple[tuple[Network, int, torch.dtype], ...]  # batch, float32 or the dtype of autocast
    inference: tuple[tuple[Network, int, int, torch.dtype], ...]  # ensemble size, batch, dtype
    anytime: tuple[tuple[Network, int, torch.dtype], ...]  # batch, dtype
    compiler: dict[str, str]  # options of torch.compile
    rates: tuple[int | None, tuple[int, ...]]  # MiB to copy and sizes of matrices, to measure the machine
    processes: tuple[tuple[Network, int, int], ...] = ()  # ensemble size, batch: in processes of their own
    contention: tuple[tuple[Network, int, int], ...] = ()  # the same on a busy machine
    turn: float = 1.5  # seconds of calls back to back
    turns: int = 4
    memory: bool = False  # measure the memory of a training step
    seconds: float = 1.5  # per comparison
    one_by_one: bool = False  # one side after the other, compiled ones last, for a run that may be cut off

    def groups(self, peers: Sequence[str], fused: Sequence[str]) -> list[list[str]]:
        """The sides of a comparison, by groups that are timed together (:func:`comparison.compare`).

        One by one, plain peers come first, as they work on any GPU, and those that take minutes to compile come last.
        """
        if not self.one_by_one:
            return [[*peers, *fused]]
        compiled = [name for name in peers if name in COMPILED]
        return [[name] for name in (*(name for name in peers if name not in compiled), *fused, *compiled)]

    @property
    def meter(self) -> Meter:
        return GpuMeter(torch.device(self.device)) if self.device == "cuda" else HostMeter()

    def precision(self, dtype: torch.dtype, *, training: bool = False) -> str:
        """Choose the precision for :func:`comparison.check_agreement`."""
        if dtype == torch.float32 and self.device == "cpu":
            return "float32"
        name = "tf32" if dtype == torch.float32 else str(dtype).removeprefix("torch.")  # tf32: see conftest.py
        return f"{name} training" if training else name


RESNET = Network("HNE-ResNet", 32, {"name": "hne_resnet50_cifar", "num_classes": 100})
MOBILENET = Network("HNE-MobileNetV2", 224, {"name": "hne_mobilenetv2_075", "num_classes": 1000})
RESNET18 = Network("ResNet-18", 224, {"name": "hne_resnet18", "num_classes": 1000})
WIDE_RESNET = Network("WRN-28-10", 32, {"name": "hne_wrn28_10", "num_classes": 100})
FASHION = Network("HNE-tiny", 28, {"name": "hne_tiny", "num_classes": 10})
TINY = Network("HNE-tiny", 8, {"name": "hne_tiny", "num_classes": 10, "width": 0.25, "num_models": 2})

_HEADS = ((16, 128, 256, 100), (8, 450, 1280, 1000))  # of both networks, at their training batch sizes

_COMPILED = ("compiled", "channels_last_compiled")
COMPILED = (*_COMPILED, "frozen")  # sides of torch.compile
_EAGER_AND_COMPILED = ("eager", "channels_last", *_COMPILED)
_PEERS = ("frozen", "onnxruntime", "openvino")
_ON_GPU = tuple(name for name in ("cuda", "triton") if torch.cuda.is_available() and name in K.available_backends())

CPU = Workload(
    device="cpu",
    backends=("",),
    others={"op": (), "inference": _PEERS, "training": ("channels_last", "channels_last_compiled")},
    ops=(32, torch.float32),
    heads=_HEADS,
    training=(
        *((RESNET, batch, torch.float32) for batch in (32, 128)),
        (FASHION, 128, torch.float32),
        *((RESNET, batch, torch.bfloat16) for batch in (32, 128)),
        *((network, 8, torch.float32) for network in (RESNET18, WIDE_RESNET)),
    ),
    inference=(
        *((RESNET, n, batch, torch.float32) for batch in (1, 8, 64) for n in (1, 2, 4, 8, 16)),
        *((MOBILENET, n, batch, torch.float32) for batch in (1, 8) for n in (1, 2, 4, 8)),
        *((RESNET18, 8, batch, torch.float32) for batch in (1, 8)),
        *((WIDE_RESNET, 8, batch, torch.float32) for batch in (1, 8, 64)),
        *((RESNET, n, batch, torch.bfloat16) for batch in (1, 8, 64) for n in (1, 4, 16)),
        *((MOBILENET, n, batch, torch.bfloat16) for batch in (1, 8) for n in (1, 8)),
    ),
    anytime=tuple((RESNET, batch, torch.float32) for batch in (1, 8)),
    compiler={},
    rates=(None, (1024, 1536)),
    processes=(
        *((RESNET, n, batch) for batch in (1, 8) for n in (1, 4, 16)),
        *((MOBILENET, 8, batch) for batch in (1, 8)),
    ),
    contention=tuple((RESNET, n, batch) for batch in (1, 8) for n in (1, 16)),
    memory=True,
    seconds=3.0,
)
GPU = Workload(
    device="cuda",
    backends=_ON_GPU,
    others={"op": ("channels_last", *_COMPILED), "inference": _EAGER_AND_COMPILED, "training": _EAGER_AND_COMPILED},
    ops=(128, torch.bfloat16),
    heads=_HEADS,
    training=tuple((RESNET, batch, dtype) for batch in (128, 512) for dtype in (torch.bfloat16, torch.float32)),
    # The most important settings come first, in case the time budget runs out.
    inference=tuple((RESNET, n, batch, torch.bfloat16) for batch in (128, 1, 32, 1024) for n in (16, 4, 1)),
    anytime=((RESNET, 1, torch.bfloat16),),
    compiler={"mode": "max-autotune-no-cudagraphs"},  # the meter captures a graph of every side itself
    rates=(1024, (8192,)),
    seconds=0.5,
    one_by_one=True,
)
# Every side and step of CPU and GPU, tiny, on any machine: shows that all sides run and agree, not how fast they are.
REHEARSAL = Workload(
    device="cpu",
    backends=("cpp",),
    others=GPU.others | {"inference": (*_EAGER_AND_COMPILED, *_PEERS)},
    ops=(2, torch.bfloat16),
    heads=((2, 4, 8, 10),),
    training=((TINY, 4, torch.bfloat16), (TINY, 4, torch.float32)),
    inference=((TINY, 2, 2, torch.bfloat16), (TINY, 2, 2, torch.float32), (TINY, 1, 2, torch.bfloat16)),
    anytime=((TINY, 2, torch.float32),),
    compiler={"backend": "eager"},
    rates=(1, (64,)),
    processes=((TINY, 2, 2),),
    contention=((TINY, 2, 2),),
    one_by_one=True,
)
WORKLOADS = {"cpu": CPU, "gpu": GPU, "rehearsal": REHEARSAL}


def default() -> str:
    """The workload of this machine."""
    return "gpu" if torch.cuda.is_available() else "cpu"
