"""Copies of a model are complete and independent."""

from __future__ import annotations

import copy
import io
import pickle

import networks
import pytest
import torch
from networks import build, images

from hne import FusedHNE, NaiveHNE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_naive_copies_everything(dtype: torch.dtype, training: bool, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng, dtype).train(training)
    model.blocks[0][0].requires_grad_(False)
    naive = model.to_naive()
    assert type(naive) is NaiveHNE
    assert type(naive.to_fused()) is FusedHNE
    assert naive.training == training
    assert naive.state_dict().keys() == model.state_dict().keys()
    for (name, p), q in zip(model.named_parameters(), naive.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad == (not name.startswith("blocks.0.0."))
        assert p.data_ptr() != q.data_ptr()
        assert torch.equal(p, q)
        assert p.dtype == q.dtype == dtype


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent(how: str, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    with torch.no_grad():
        expected = model(x)  # folds the weights, which a copy must not share
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            assert file.tell() < 2 * sum(t.nbytes for t in model.state_dict().values()) + 2**17
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), expected)
        assert not model(x).any()
