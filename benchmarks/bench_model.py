"""HNE-ResNet as a whole: inference of the first n models, and a training step of the paper's objective."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from comparison import check_agreement
from torch import Tensor

from hne import HNE, FusedHNE
from hne.losses import objective

PRESET, CLASSES, SIZE = "hne_resnet50_cifar", 100, 32
TRAINING_BATCH = 32


@pytest.fixture(scope="module")
def models() -> tuple[HNE, HNE]:
    """Fused and naive with the same weights, and with running statistics that are not those of a new model."""
    torch.manual_seed(0)
    fused = FusedHNE.from_preset(PRESET, num_classes=CLASSES)
    with torch.no_grad():
        for _ in range(3):
            fused.train()(torch.randn(16, 3, SIZE, SIZE))
    return fused, fused.to_naive()


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def bench_inference(n: int, batch: int, models: tuple[HNE, HNE], versus: Any, rng: torch.Generator) -> None:
    fused, naive = (model.eval() for model in models)
    x = torch.randn(batch, 3, SIZE, SIZE, generator=rng)
    with torch.inference_mode():
        versus(
            lambda: fused(x, num_models=n),
            lambda: naive(x, num_models=n),
            name="inference",
            shape=f"n = {n}, batch {batch}",
            images=batch,
        )


def bench_training_step(models: tuple[HNE, HNE], versus: Any, rng: torch.Generator) -> None:
    x = torch.randn(TRAINING_BATCH, 3, SIZE, SIZE, generator=rng)
    target = torch.randint(CLASSES, (TRAINING_BATCH,), generator=rng)
    loss = objective("I+HD", alpha=0.5, temperature=2.0)

    def step(model: HNE, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        logits = model(x)
        value = loss(logits, target)
        return value.detach(), logits.detach(), torch.autograd.grad(value, list(model.parameters()))

    fused, naive = (model.train() for model in models)
    # A ReLU that rounding turns on or off changes gradients by per cents, on either side. In float64 hardly any turns.
    exact = (step(copy.deepcopy(model).double(), x[:4].double(), target[:4]) for model in models)
    check_agreement(*exact)
    versus(
        lambda: step(fused, x, target)[:2],
        lambda: step(naive, x, target)[:2],
        name="training step",
        shape=f"n = 16, batch {TRAINING_BATCH}",
        images=TRAINING_BATCH,
    )
