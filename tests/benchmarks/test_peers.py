"""Peers: plain PyTorch in channels-last memory, and the frozen compiled model."""

from __future__ import annotations

import pytest
import torch
from networks import TREES, build, images

from hne import Hierarchy, NaiveHNE
from hne.inference import freezing

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.usefixtures("_import_benchmarks")


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_channels_last_is_the_same_network(tree: Hierarchy, rng: torch.Generator) -> None:
    import channels_last

    model = build(NaiveHNE, tree, rng)
    other = channels_last.convert(model)
    x = images(rng)
    with torch.no_grad():
        for n in range(1, tree.num_models + 1):
            torch.testing.assert_close(other(x, n), model(x, n))


@pytest.mark.slow
def test_freezing_folds_batch_norms(rng: torch.Generator) -> None:
    import channels_last
    from torch._inductor.utils import run_and_get_code

    model = channels_last.convert(build(NaiveHNE, TREES["single"], rng, torch.float32))
    x = images(rng, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), freezing():
        result, code = run_and_get_code(torch.compile(model, dynamic=False), x)
    torch.testing.assert_close(result, model(x))
    assert "batch_norm" not in "".join(code)
