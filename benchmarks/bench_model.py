"""HNE-ResNet as a whole: inference of the first n models, and a training step of the paper's objective."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import channels_last
import pytest
import roofline
import torch
from comparison import check_agreement
from meters import Side
from torch import Tensor
from workload import Workload

from hne import HNE, FusedHNE
from hne.losses import objective

Models = tuple[HNE, HNE, HNE]  # fused, naive, channels-last naive


@pytest.fixture(scope="module")
def models(workload: Workload) -> Models:
    """With the same weights, and with running statistics that are not those of a new model."""
    torch.manual_seed(0)
    fused = FusedHNE.from_preset(**workload.network).to(workload.device)
    with torch.no_grad():
        for _ in range(3):
            fused.train()(torch.randn(16, 3, workload.size, workload.size, device=workload.device))
    return fused, fused.to_naive(), channels_last.of(fused)


def _shape(*parts: str, dtype: torch.dtype) -> str:
    """float32 goes without saying."""
    return ", ".join([*parts, *([] if dtype == torch.float32 else [str(dtype).removeprefix("torch.")])])


def bench_inference(
    inference: tuple[int, int, torch.dtype], models: Models, versus: Any, workload: Workload, rng: torch.Generator
) -> None:
    n, batch, dtype = inference
    fused, naive, last = (copy.deepcopy(model).to(dtype).eval() for model in models)
    x = torch.randn(batch, 3, workload.size, workload.size, generator=rng).to(workload.device, dtype)

    def side(model: HNE, x: Tensor) -> Callable[[Any], Side]:
        def make(wrap: Any) -> Side:
            function = wrap(model)
            return lambda: function(x, num_models=n)

        return make

    with torch.no_grad():
        versus(
            side(fused, x),
            side(naive, x),
            side(last, x.contiguous(memory_format=torch.channels_last)),
            name="inference",
            shape=_shape(f"n = {n}", f"batch {batch}", dtype=dtype),
            images=batch,
            dtype=dtype,
            work=lambda: roofline.of_inference(fused, n, batch, workload.size, dtype.itemsize),
            launched=True,
        )


def bench_training_step(
    training: tuple[int, torch.dtype], models: Models, versus: Any, workload: Workload, rng: torch.Generator
) -> None:
    batch, dtype = training
    x = torch.randn(batch, 3, workload.size, workload.size, generator=rng).to(workload.device)
    target = torch.randint(models[0].num_classes, (batch,), generator=rng).to(workload.device)
    loss = objective("I+HD", alpha=0.5, temperature=2.0)
    lowered = dtype != torch.float32

    def step(call: Any, model: HNE, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        # A cache of lowered weights would not be filled anew when a CUDA graph is replayed.
        mixed = torch.autocast(x.device.type, dtype, cache_enabled=False) if lowered else contextlib.nullcontext()
        with mixed:
            logits = call(x)
        value = loss(logits, target)
        return value.detach(), logits.detach(), torch.autograd.grad(value, list(model.parameters()))

    def side(model: HNE, x: Tensor) -> Callable[[Any], Side]:
        def make(wrap: Any) -> Side:
            call = wrap(model)
            return lambda: step(call, model, x, target)[:2]

        return make

    fused, naive, last = (model.train() for model in models)
    # A ReLU that rounding turns on or off changes gradients by per cents, on either side. In float64 hardly any turns.
    if workload.device == "cpu":
        doubles = (copy.deepcopy(model).double() for model in (fused, naive))
        check_agreement(*(step(model, model, x[:4].double(), target[:4]) for model in doubles))
    versus(
        side(fused, x),
        side(naive, x),
        side(last, x.contiguous(memory_format=torch.channels_last)),
        name="training step",
        shape=_shape(f"n = {fused.num_models}", f"batch {batch}", dtype=dtype),
        images=batch,
        dtype=dtype,
        work=lambda: roofline.of_training(fused, batch, workload.size, dtype.itemsize),
        launched=True,
        training=True,
    )
