"""Cases of the ops on the logits of an ensemble."""

from __future__ import annotations

import torch
from case import Case, Inputs, normal


def prefix_mean(models: int, batch: int, classes: int, sizes: tuple[int, ...] | None) -> Case:
    def make(rng: torch.Generator) -> Inputs:
        return {"logits": normal(rng, models, batch, classes), "sizes": sizes}

    name = f"N{models}B{batch}L{classes}-{sizes or 'default'}".replace(" ", "")
    # The reference sums the gradient of a member over its ensembles, with one rounding each.
    return Case("prefix_mean", name, make, ("logits",), models + 5, naive_roundings=6)


def prefix_logits(
    models: int, batch: int, channels: int, classes: int, sizes: tuple[int, ...] | None, bias: bool
) -> Case:
    def make(rng: torch.Generator) -> Inputs:
        return {
            "features": normal(rng, models, batch, channels),
            "weight": normal(rng, models, classes, channels),
            "bias": normal(rng, models, classes) if bias else None,
            "sizes": sizes,
        }

    name = f"N{models}B{batch}C{channels}L{classes}-{sizes or 'default'}".replace(" ", "")
    return Case(
        "prefix_logits",
        f"{name}{'-bias' if bias else ''}",
        make,
        ("features", "weight", "bias") if bias else ("features", "weight"),
        max(channels, batch, classes) + models + 6,
        roundings=2,
        naive_roundings=8,
    )


def loss(models: int, batch: int, classes: int, alpha: float, temperature: float, scale: float = 1.0) -> Case:
    def make(rng: torch.Generator) -> Inputs:
        return {
            "logits": normal(rng, models, batch, classes, scale=scale),
            "target": torch.randint(classes, (batch,), generator=rng),
            "alpha": alpha,
            "temperature": temperature,
        }

    name = f"N{models}B{batch}L{classes}-alpha{alpha:g}-T{temperature:g}-scale{scale:g}"
    return Case(
        "hierarchical_distillation_loss",
        name,
        make,
        ("logits",),
        models + batch + classes + 16,
        naive_roundings=8 * models,
    )
