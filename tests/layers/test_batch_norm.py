"""Batch norm: synchronised over processes, and for an empty batch."""

from __future__ import annotations

import copy
from pathlib import Path

import networks
import torch
from networks import build, each_model, images
from torch import distributed, multiprocessing

from hne import HNE

PARTS = (3, 5)  # images in each process


def _process(rank: int, folder: str) -> None:
    """Compute gradients for this process's part of the batch, and save them with the outputs and statistics."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", len(PARTS))
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(PARTS))
    model, x = torch.load(f"{folder}/input.pt", weights_only=False)
    part = x.split(PARTS)[rank].clone().requires_grad_()
    y = model(part)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for gradient in gradients.values():
        distributed.all_reduce(gradient)
    torch.save((y.detach(), part.grad, gradients, dict(model.named_buffers())), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@each_model
def test_processes_with_parts_of_a_batch_equal_one_with_the_batch(
    kind: type[HNE], tmp_path: Path, rng: torch.Generator
) -> None:
    model = build(kind, networks.TREES["odd"], rng).train().sync_batch_norm_()
    x = images(rng, sum(PARTS), (5, 4))
    torch.save((model, x), tmp_path / "input.pt")
    whole = copy.deepcopy(model).sync_batch_norm_(False)
    x.requires_grad_()
    y = whole(x)
    y.square().sum().backward()

    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=len(PARTS))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(PARTS))]
    torch.testing.assert_close(torch.cat([result[0] for result in results], 1), y)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), x.grad)
    for _, _, gradients, buffers in results:
        torch.testing.assert_close(gradients, {name: p.grad for name, p in whole.named_parameters()})
        torch.testing.assert_close(buffers, dict(whole.named_buffers()))


@each_model
def test_a_single_process_needs_no_process_group(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng).train()
    x = images(rng)
    assert torch.equal(copy.deepcopy(model).sync_batch_norm_()(x), model(x))


@each_model
def test_an_empty_batch_does_not_change_running_statistics(kind: type[HNE], rng: torch.Generator) -> None:
    model = build(kind, networks.TREES["odd"], rng).train()
    before = {name: b.clone() for name, b in model.named_buffers() if name.endswith(("_mean", "_var"))}
    assert model(images(rng, 0)).shape[1] == 0
    torch.testing.assert_close({name: b for name, b in model.named_buffers() if name in before}, before)
