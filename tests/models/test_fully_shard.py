"""Fully sharded data parallelism (FSDP): hooks of the layers gather the parameters that the layers read."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import networks
import pytest
import torch
from networks import build, each_model, images
from processes import run_processes
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hne import HNE
from hne.layers import Layer

STEPS = 2


def _steps(model: HNE, x: Tensor) -> list[Tensor]:
    """Logits after each of some training steps, in eval mode without gradients."""
    results = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            results += [model.eval()(x), model(x, 2)]
    return results


def _process(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")  # logits are a view, which nobody changes in place
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model, x = torch.load(f"{folder}/input.pt", weights_only=False)
    for block in model.layers_of_blocks():
        for layer in block:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.save(_steps(model, x), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@each_model
def test_sharded_models_train_and_infer(kind: type[HNE], tmp_path: Path, rng: torch.Generator) -> None:
    model, x = build(kind, networks.TREES["doubling"], rng), images(rng)
    torch.save((model, x), tmp_path / "input.pt")
    expected = _steps(copy.deepcopy(model), x)
    run_processes(_process, tmp_path)
    for rank in range(2):
        for got, want in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_a_layer_class_names_its_spec() -> None:
    with pytest.raises(TypeError, match=r"class Nameless\(Layer\): expected the spec that it implements"):
        type("Nameless", (Layer,), {})
