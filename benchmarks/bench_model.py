"""Whole networks, HNE-ResNet and HNE-MobileNetV2: training step, inference of the first n members, anytime inference.

Training comes first: a step allocates a gigabyte, and memory that other benchmarks leave in the allocator slows it
down.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import channels_last
import memory
import pytest
import roofline
import torch
from comparison import Case, check_agreement
from meters import Side
from torch import Tensor
from workload import Network, Workload

from hne import HNE, FusedHNE
from hne.executors import CopyFreeNetwork
from hne.inference import ENGINES, EnsembleMean, load_engine
from hne.losses import objective

_ENGINE_DTYPES = {"onnxruntime": (torch.float32,), "openvino": (torch.float32, torch.bfloat16)}
MEMORY_SIDES = ("fused", "naive", "channels_last", "channels_last_compiled")  # sides whose memory is measured


class Models:
    """The models of one network with equal weights: fused, naive, and channels-last."""

    def __init__(self, network: Network, device: str) -> None:
        self.fused = network.build().to(device)
        self.naive = self.fused.to_naive()
        self.last = channels_last.convert(self.fused)


@pytest.fixture(scope="module")
def models(workload: Workload) -> Callable[[Network], Models]:
    by_name: dict[str, Models] = {}

    def of(network: Network) -> Models:
        if network.name not in by_name:
            by_name[network.name] = Models(network, workload.device)
        return by_name[network.name]

    return of


def _shape(*parts: str, dtype: torch.dtype) -> str:
    """Join the parts of a row's shape, with the dtype unless it is float32."""
    return ", ".join([*parts, *([] if dtype == torch.float32 else [str(dtype).removeprefix("torch.")])])


def _case(network: Network, model: HNE, num_models: int, batch: int, dtype: torch.dtype) -> Case:
    return {
        "network": network.name,
        "num_models": num_models,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "macs": model.macs(num_models, network.size),
    }


def _images(batch: int, network: Network, rng: torch.Generator, device: str) -> Tensor:
    return torch.randn(batch, 3, network.size, network.size, generator=rng).to(device)


# --- training --------------------------------------------------------------------------------------------------------


def _step(call: Any, model: HNE, x: Tensor, target: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Any]:
    """Compute loss, logits and gradients."""
    # Autocast's cache of converted weights would go stale when a CUDA graph is replayed.
    lowered = dtype not in (torch.float32, torch.float64)
    mixed = torch.autocast(x.device.type, dtype, cache_enabled=False) if lowered else contextlib.nullcontext()
    with mixed:
        logits = call(x)
    value = objective("I+HD", alpha=0.5, temperature=2.0)(logits, target)
    return value.detach(), logits.detach(), torch.autograd.grad(value, list(model.parameters()))


def _memory_of_step(side: str, network: Network, batch: int, compiler: dict[str, str], threads: int) -> float:
    """Peak memory of a float32 training step on the CPU, in MiB. Call it in a fresh process."""
    torch.set_num_threads(threads)
    fused = FusedHNE.from_preset(**network.preset).train()
    makers = {"fused": lambda: fused, "naive": fused.to_naive}
    model: HNE = makers.get(side, lambda: channels_last.convert(fused))()
    call = torch.compile(model, dynamic=False, **compiler) if side.endswith("compiled") else model
    x = torch.randn(batch, 3, network.size, network.size)
    x = x.contiguous(memory_format=torch.channels_last) if side.startswith("channels_last") else x
    target = torch.randint(model.num_classes, (batch,))
    return memory.peak_mib(lambda: _step(call, model, x, target, torch.float32))


def bench_training_step(
    training: tuple[Network, int, torch.dtype], models: Any, versus: Any, workload: Workload, rng: torch.Generator
) -> None:
    network, batch, dtype = training
    ours = models(network)
    fused, naive, last = (copy.deepcopy(model).train() for model in (ours.fused, ours.naive, ours.last))
    x = _images(batch, network, rng, workload.device)
    target = torch.randint(fused.num_classes, (batch,), generator=rng).to(workload.device)

    def side(model: HNE, x: Tensor) -> Callable[[Any], Side]:
        def make(wrap: Any) -> Side:
            call = wrap(model)
            return lambda: _step(call, model, x, target, dtype)[:2]

        return make

    def memory_mib() -> dict[str, float]:
        return {
            name: memory.in_fresh_process(
                _memory_of_step, name, network, batch, workload.compiler, torch.get_num_threads()
            )
            for name in MEMORY_SIDES
        }

    # Gradients are compared in float64: in float32 rounding turns some ReLUs on or off, which changes gradients by
    # per cents on either side.
    if workload.device == "cpu":
        doubles = (copy.deepcopy(model).double() for model in (fused, naive))
        check_agreement(*(_step(model, model, x[:4].double(), target[:4], torch.float64) for model in doubles))
    versus(
        side(fused, x),
        side(naive, x),
        side(last, x.contiguous(memory_format=torch.channels_last)),
        kind="training",
        name="training step",
        shape=_shape(network.name, f"n = {fused.num_models}", f"batch {batch}", dtype=dtype),
        images=batch,
        dtype=dtype,
        work=lambda: roofline.of_training(fused, batch, network.size, dtype.itemsize),
        training=True,
        case=_case(network, fused, fused.num_models, batch, dtype),
        **({"memory_mib": memory_mib} if workload.memory and dtype == torch.float32 else {}),
    )


# --- inference -------------------------------------------------------------------------------------------------------


def bench_inference(
    inference: tuple[Network, int, int, torch.dtype],
    models: Any,
    files: Any,
    versus: Any,
    workload: Workload,
    rng: torch.Generator,
) -> None:
    """Mean logits of the first n members, as an exported graph returns them."""
    network, n, batch, dtype = inference
    ours = models(network)
    fused, naive, last = (copy.deepcopy(model).to(dtype).eval() for model in (ours.fused, ours.naive, ours.last))
    x = _images(batch, network, rng, workload.device).to(dtype)

    def side(model: HNE, x: Tensor) -> Callable[[Any], Side]:
        def make(wrap: Any) -> Side:
            function = wrap(EnsembleMean(model, n).eval())
            return lambda: function(x)

        return make

    def folded(wrap: Any) -> Side:
        """The network that is exported."""
        last = x.contiguous(memory_format=torch.channels_last)
        network = CopyFreeNetwork(fused, slice(0, n), last[:1]).eval().to(memory_format=torch.channels_last)
        function = wrap(network)
        return lambda: function(last)

    def peer(name: str) -> Side:
        # Threads that spin after a call would slow down the next side.
        return load_engine(name, files(network, n).graphs, x, spin=False)

    with torch.no_grad(), fused.frozen_parameters():  # the weights in the exported graphs are constants, too
        versus(
            side(fused, x),
            side(naive, x),
            side(last, x.contiguous(memory_format=torch.channels_last)),
            folded,
            {name: functools.partial(peer, name) for name in ENGINES if dtype in _ENGINE_DTYPES[name]},
            kind="inference",
            name="inference",
            shape=_shape(network.name, f"n = {n}", f"batch {batch}", dtype=dtype),
            images=batch,
            dtype=dtype,
            work=lambda: roofline.of_inference(fused, n, batch, network.size, dtype.itemsize),
            case=_case(network, fused, n, batch, dtype),
        )


def bench_anytime(
    anytime: tuple[Network, int, torch.dtype], models: Any, versus: Any, workload: Workload, rng: torch.Generator
) -> None:
    """Anytime inference through all members, with an answer after each."""
    network, batch, dtype = anytime
    ours = models(network)
    fused, naive = (copy.deepcopy(model).to(dtype).eval() for model in (ours.fused, ours.naive))
    x = _images(batch, network, rng, workload.device).to(dtype)

    def side(model: HNE) -> Callable[[Any], Side]:
        return lambda wrap: lambda: [y for _, y in model.anytime(x)]

    with torch.no_grad(), fused.frozen_parameters():
        versus(
            side(fused),
            side(naive),
            kind="anytime",
            name="anytime",
            shape=_shape(network.name, f"batch {batch}", dtype=dtype),
            images=batch,
            dtype=dtype,
            work=lambda: roofline.of_inference(fused, fused.num_models, batch, network.size, dtype.itemsize),
            case=_case(network, fused, fused.num_models, batch, dtype),
        )
