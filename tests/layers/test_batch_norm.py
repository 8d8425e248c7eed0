"""Batch norm: synchronised over processes, and for an empty batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import build, each_model, images
from processes import run_processes
from torch import Tensor, distributed, nn

from hne import HNE, Conv, Hierarchy, Norm, PreActivation
from hne.layers import LayerSpec

PARTS = (3, 5)  # images in each process
PRE_ACTIVATION: list[list[LayerSpec]] = [[Conv(4)], [PreActivation(4)], [PreActivation(5), Norm()]]


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
@pytest.mark.parametrize("blocks", [networks.BLOCKS, PRE_ACTIVATION], ids=["after convolutions", "before"])
def test_processes_with_parts_of_a_batch_equal_one_with_the_batch(
    kind: type[HNE], blocks: list[list[LayerSpec]], tmp_path: Path, rng: torch.Generator
) -> None:
    model = build(kind, networks.TREES["odd"], rng, blocks=blocks).train().sync_batch_norm_()
    x = images(rng, sum(PARTS), (5, 4))
    torch.save((model, x), tmp_path / "input.pt")
    whole = copy.deepcopy(model).sync_batch_norm_(False)
    x.requires_grad_()
    y = whole(x)
    y.square().sum().backward()

    run_processes(_process, tmp_path, len(PARTS))
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


def _buffers(model: HNE) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _small_parts(rank: int, folder: str) -> None:
    """Train on this process's part of each batch; save the errors, gradients and buffers."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    results: list[Any] = []
    for model, x, parts in torch.load(f"{folder}/input.pt", weights_only=False):
        try:
            y = model(x.split(parts)[rank])
        except ValueError as error:
            results.append(str(error))
            continue
        y.square().sum().backward()
        gradients = [p.grad for p in model.parameters()]
        for gradient in gradients:
            distributed.all_reduce(gradient)
        results.append((y.detach(), gradients, _buffers(model)))
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _cumulative(model: HNE) -> HNE:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return model


def _plain_settings(model: HNE) -> HNE:
    """Batch norms without a weight in one layer, and without running statistics in another."""
    for name, settings in (
        ("blocks.0.1.unit", {"affine": False}),
        ("blocks.1.0.expand", {"track_running_stats": False}),
    ):
        module = model.get_submodule(name)
        module.bn = nn.BatchNorm2d(module.bn.num_features, **settings).double()
    return model


@each_model
def test_processes_with_few_or_no_images(kind: type[HNE], tmp_path: Path, rng: torch.Generator) -> None:
    """Several processes equal one: without any image, with images in one process only, with one value in all."""
    cases = []
    tree = Hierarchy((1, 2, 2))
    sync = HNE.sync_batch_norm_
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    for parts, size in (((0, 0), (5, 4)), ((0, 3), (5, 4)), ((1, 0), (1, 1)), ((1, 1), (1, 1)), ((1, 3), (2, 3))):
        for prepare, synchronise in ((_cumulative, sync), (_plain_settings, sync), (_cumulative, convert)):
            model = prepare(build(kind, tree, rng)).train()
            cases.append((model, images(rng, sum(parts), size), parts, synchronise(copy.deepcopy(model))))
    torch.save([(synchronised, x, parts) for _, x, parts, synchronised in cases], tmp_path / "input.pt")
    run_processes(_small_parts, tmp_path)
    results = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    for (model, x, parts, _), both in zip(cases, results, strict=True):
        if sum(parts) == 1:
            for error in both:
                assert "expected more than 1 value per channel when training" in error
            continue
        y = model(x)
        y.square().sum().backward()
        torch.testing.assert_close(torch.cat([result[0] for result in both], 1), y)
        for _, gradients, buffers in both:
            torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])
            torch.testing.assert_close(buffers, _buffers(model))
            assert all(buffer.isfinite().all() for buffer in buffers.values())
            assert parts != (0, 0) or not any(gradient.any() for gradient in gradients)


@each_model
def test_gradients_of_an_empty_batch_are_zero(kind: type[HNE], rng: torch.Generator) -> None:
    for training in (False, True):
        model = build(kind, networks.TREES["odd"], rng).train(training)
        model(images(rng, 0)).square().sum().backward()
        for parameter in model.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


SETTINGS: dict[str, Any] = {
    "affine": lambda bn: nn.BatchNorm2d(bn.num_features, affine=False),
    "no running statistics": lambda bn: nn.BatchNorm2d(bn.num_features, track_running_stats=False),
    "neither": lambda bn: nn.BatchNorm2d(bn.num_features, affine=False, track_running_stats=False),
    "tracking stopped": lambda bn: (setattr(bn, "track_running_stats", False), bn)[1],
    "fixed": lambda bn: (setattr(bn, "momentum", 0.0), bn)[1],
    "converted": nn.SyncBatchNorm.convert_sync_batchnorm,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("num_models", [None, 4])
def test_settings_of_one_batch_norm(setting: str, num_models: int | None, rng: torch.Generator) -> None:
    """Every setting of ``nn.BatchNorm2d`` works; PyTorch's own batch norm computes the naive model."""
    fused = build(networks.FusedHNE, networks.TREES["odd"], rng)
    for name in ("blocks.0.0.unit", "blocks.1.0.depthwise", "blocks.1.0.shortcut", "blocks.2.1.expand"):
        module = fused.get_submodule(name)
        module.bn = SETTINGS[setting](module.bn).double()
    naive = fused.to_naive()
    for training in (True, False):
        for grad in (True, False):
            x = images(rng)
            with torch.set_grad_enabled(grad):
                got, want = (model.train(training)(x, num_models) for model in (fused, naive))
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(_buffers(fused), _buffers(naive))


@torch.no_grad()
def test_single_batch_norms_in_training_mode(rng: torch.Generator) -> None:
    """Adaptation at test time: one batch norm of a model in eval mode uses the statistics of the batch."""
    fused = build(networks.FusedHNE, networks.TREES["odd"], rng)
    naive = fused.to_naive()
    x = images(rng)
    for training in (False, True, True, False):
        for model in (fused, naive):
            model.get_submodule("blocks.1.0.depthwise.bn").train(training)
        torch.testing.assert_close(fused(x), naive(x))
        torch.testing.assert_close(_buffers(fused), _buffers(naive))
        with fused.frozen_parameters():
            torch.testing.assert_close(fused(x, 3), naive(x, 3))
