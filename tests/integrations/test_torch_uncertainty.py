"""TorchUncertainty's layout: members stacked along the batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import TREES, build, images
from torch import Tensor

from hne import FusedHNE
from hne.integrations import TorchUncertainty, stacked_members


@pytest.fixture
def logits(rng: torch.Generator) -> Tensor:
    """Logits of five members on seven samples of four classes, some of them confident."""
    return 3 * torch.randn(5, 7, 4, generator=rng)


def test_members_below_each_other(logits: Tensor) -> None:
    rows = stacked_members(logits)
    assert rows.shape == (35, 4)
    for model, sample in itertools.product(range(5), range(7)):
        assert torch.equal(rows[model * 7 + sample], logits[model, sample])
    with pytest.raises(ValueError, match=r"outputs must be \[members, batch, classes\], got shape \(7, 4\)"):
        stacked_members(logits[0])


def test_torch_uncertainty_module(rng: torch.Generator) -> None:
    model = build(FusedHNE, TREES["odd"], rng)
    x = images(rng)
    adapter = TorchUncertainty(model, 4)
    assert adapter.num_estimators == 4
    torch.testing.assert_close(adapter(x), model(x, 4).flatten(0, 1))
    assert TorchUncertainty(model).num_estimators == 6
    with pytest.raises(ValueError, match="num_models must lie between 1 and 6, got 7"):
        TorchUncertainty(model, 7)
