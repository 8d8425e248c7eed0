"""Distillation: the objectives, what the heads learn, and students that start from one network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from networks import build, images
from students import DIGITS, HERE, SMALL, heads, random_outputs
from torch import Tensor

from hne import FusedHNE, Hierarchy
from hne.data import load_dataset
from hne.errors import CheckpointError
from hne.losses import average_teacher, gaussians, hydra_loss
from hne.training import (
    DistillationTrainer,
    StudentConfig,
    Teacher,
    expand_branches,
    member_outputs,
    student_configs,
)
from hne.training.distillation import HINTON, HYDRA

pytestmark = pytest.mark.usefixtures("one_thread")


def start(teach: Teacher | None = None, **options: Any) -> DistillationTrainer:
    if teach is None:
        teach, options = random_outputs(), {"augment": False, **options}
    return DistillationTrainer.from_config(heads(**options), DIGITS, HERE, teacher=teach)


# Objectives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_objective(temperature: float, rng: torch.Generator) -> None:
    student, teacher = (3 * torch.randn(4, 5, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    expected = 0.0
    for head, member in zip(student, teacher, strict=True):
        for y, t in zip(head, member, strict=True):
            p, q = (np.exp(v / temperature) / np.exp(v / temperature).sum() for v in (t.numpy(), y.numpy()))
            expected += temperature**2 * (p * np.log(p / q)).sum() / (4 * 5)
    assert hydra_loss(student, teacher, temperature).item() == pytest.approx(expected)
    assert hydra_loss(student, student, temperature).abs() < 1e-12
    assert hydra_loss(student.bfloat16(), teacher.bfloat16(), temperature).dtype == torch.float32
    with pytest.raises(ValueError, match=r"teacher must have the shape of logits, \(3, 5, 7\), got \(4, 5, 7\)"):
        hydra_loss(student[:3], teacher, temperature)


def test_average_of_the_members(rng: torch.Generator) -> None:
    teacher = torch.randn(4, 5, 7, generator=rng, dtype=torch.float64)
    soft = (average_teacher(teacher, 2.5) / 2.5).softmax(-1)
    torch.testing.assert_close(soft, (teacher / 2.5).softmax(-1).mean(0, keepdim=True))


# Runs ---------------------------------------------------------------------------------------------------------------


def test_students() -> None:
    base = StudentConfig.of(**{**SMALL, "epochs": 10, "first_phase": 4})
    configs = student_configs(base, 6, own_blocks=1, compare=True)
    assert list(configs) == ["first-phase", "hydra", "distilled", "alone"]
    assert [config.epochs for config in configs.values()] == [4, 6, 10, 10]
    assert [config.objective for config in configs.values()] == [HINTON, HYDRA, HINTON, "I"]
    models = {name: config.build_model(DIGITS) for name, config in configs.items()}
    assert models["hydra"].hierarchy == Hierarchy((1, 1, 1, 6))
    assert all(models[name].hierarchy == Hierarchy.single(4) for name in ("first-phase", "distilled", "alone"))
    assert list(student_configs(replace(base, first_phase=0), 6)) == ["hydra"]
    assert heads(5).build_model(DIGITS).hierarchy == Hierarchy.multi_head(4, 5)
    with pytest.raises(ValueError, match="own_blocks: expected 0 to 3 of the 4 of hne_tiny, got 4"):
        student_configs(base, 6, own_blocks=4)
    with pytest.raises(ValueError, match="first_phase: expected less than the 10 epochs of both, got 10"):
        student_configs(replace(base, first_phase=10), 6)


def test_each_head_learns_its_member() -> None:
    trainer = start(epochs=20, augment=False, width=1.0)
    records = list(trainer.train(eval_every=20))
    assert records[-1].loss < 0.7 * records[0].loss
    student = member_outputs(trainer.model, trainer.dataset.train, trainer.dataset.input).log_softmax(-1)
    member = random_outputs().softmax(-1)
    divergence = torch.tensor([[(p * (p.log() - q)).sum(-1).mean() for p in member] for q in student])
    assert divergence.argmin(1).tolist() == [0, 1, 2], "closer to its own than to the others"


def test_one_head_learns_the_average() -> None:
    config = replace(heads(augment=False), objective=HINTON, num_models=1, epochs=1)
    trainer = DistillationTrainer.from_config(config, DIGITS, HERE, teacher=random_outputs())
    logits, indices = torch.randn(1, 5, 10), torch.tensor([3, 7, 8, 20, 63])
    wanted = (random_outputs()[:, indices] / 2).softmax(-1).mean(0)
    expected = 4 * (wanted * (wanted.log() - (logits[0] / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(trainer._loss(logits, torch.empty(5, 1, 8, 8), indices), expected)


@pytest.mark.parametrize("objective", [HYDRA, HINTON])
def test_regression_matches_gaussians(objective: str) -> None:
    dataset = load_dataset("diabetes")
    base = StudentConfig.of(data="diabetes", teacher="a", epochs=30)
    config = student_configs(base, 3, compare=True)["hydra" if objective == HYDRA else "distilled"]
    teacher = torch.tensor([[-1.0, 0.5], [0.0, -1.0], [1.0, 1.0]])[:, None].expand(-1, 295, -1)
    trainer = DistillationTrainer.from_config(config, dataset, HERE, teacher=teacher)
    records = list(trainer.train(eval_every=30))
    assert records[-1].loss < 0.2 * records[0].loss
    mean, variance = gaussians(member_outputs(trainer.model, dataset.train, dataset.input))
    wanted_mean, wanted_variance = gaussians(teacher[:, 0])
    if objective == HINTON:
        wanted_variance = (wanted_variance + wanted_mean**2).mean(0, keepdim=True)
        wanted_mean = torch.zeros(1)
    torch.testing.assert_close(mean.mean(1), wanted_mean, atol=0.15, rtol=0.15)
    torch.testing.assert_close(variance.mean(1), wanted_variance, atol=0.15, rtol=0.2)


@pytest.mark.parametrize("augment", [True, False])
def test_the_teacher_sees_what_the_student_sees(augment: bool) -> None:
    seen: list[Tensor] = []

    def teacher(images: Tensor) -> Tensor:
        seen.append(images)
        return random_outputs(count=len(images))

    trainer = start(teacher, epochs=1, augment=augment)
    student: list[Tensor] = []
    trainer.model.register_forward_pre_hook(lambda model, inputs: student.append(inputs[0]) if model.training else None)
    list(trainer.train())
    assert len(seen) == 4
    assert all(torch.equal(*pair) for pair in zip(seen, student, strict=True))
    known = {image.numpy().tobytes() for image in DIGITS.input.normalise(DIGITS.train.pixels(torch.arange(64)))}
    images = {image.numpy().tobytes() for image in torch.cat(seen)}
    assert len(images) == len(known) == 64, "every image once"
    assert (images == known) is not augment


def test_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = (start(epochs=4) for _ in range(3))
    list(whole.train())
    halfway = first.train()
    for _ in range(2):
        next(halfway)
    first.save(tmp_path / "half")
    torch.manual_seed(99)
    second.restore(tmp_path / "half")
    list(second.train())
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="of another run: option teacher was 'a', now it is 'b'"):
        start(epochs=4, teacher="b").restore(tmp_path / "half")


def test_temperature_is_checked() -> None:
    with pytest.raises(ValueError, match="temperature must be a positive number, got 0"):
        start(temperature=0.0)


# Two phases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [Hierarchy.multi_head(3, 4), Hierarchy((1, 1, 4)), Hierarchy((1, 2, 2), num_models=4)])
@torch.no_grad()
def test_heads_start_from_one_network(tree: Hierarchy, rng: torch.Generator) -> None:
    single, model = build(FusedHNE, networks.TREES["single"], rng), build(FusedHNE, tree, rng)
    expand_branches(single, model)
    x = images(rng)
    if tree.branches[1] == 1:  # else a shortcut of block 1 branches: the identity but for epsilon
        torch.testing.assert_close(model(x), single(x).expand(4, -1, -1))
    else:
        torch.testing.assert_close(model(x), single(x).expand(4, -1, -1), rtol=1e-4, atol=1e-4)
    for name, tensor in single.state_dict().items():
        assert torch.equal(model.state_dict()[name].flatten()[: tensor.numel()], tensor.flatten())


def test_heads_of_another_network(rng: torch.Generator) -> None:
    single = FusedHNE(Hierarchy.single(1), networks.BLOCKS[:1], num_classes=5)
    with pytest.raises(ValueError, match="single must be a network of the same blocks as model"):
        expand_branches(single, build(FusedHNE, networks.TREES["multi-head"], rng))
