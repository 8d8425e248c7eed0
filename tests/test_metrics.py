"""Accuracy and diversity."""

from __future__ import annotations

import statistics

import pytest
import torch

from hne.metrics import accuracy, correct, diversity


def test_accuracy_of_each_ensemble() -> None:
    logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0], [5.0, 4.0]], [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    target = torch.tensor([0, 1, 0])
    assert correct(logits, target).tolist() == [3, 1]
    assert accuracy(logits, target).tolist() == pytest.approx([1, 1 / 3])


def test_diversity_is_the_deviation_over_the_models(rng: torch.Generator) -> None:
    logits = torch.randn(4, 3, 5, generator=rng)
    each = [statistics.pstdev(logits[:, b, c].tolist()) for b in range(3) for c in range(5)]
    assert diversity(logits).item() == pytest.approx(statistics.mean(each), rel=1e-5)
    assert diversity(logits.bfloat16()).dtype == torch.float32
    assert diversity(logits[:1]).item() == 0
