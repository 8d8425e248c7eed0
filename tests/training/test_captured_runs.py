"""Training runs by CUDA graphs: the result of ordinary steps bit for bit, also when resumed.

The graphs are emulated on the CPU (cuda_graphs.py): a capture records the ops of forward, backward and optimiser and
undoes them, a replay calls them again on the same memory. That shows which memory and numbers a graph holds on to. It
cannot show the order of work on streams, the memory that graphs share, the state of the GPU's random generator, or ops
that a GPU cannot capture; test_gpu.py captures real graphs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_graphs import Graph, emulate
from students import DIGITS, HERE, heads, random_outputs
from torch import Tensor

from hne.data import load_dataset
from hne.distributed import World
from hne.errors import CheckpointError, TrainingError
from hne.losses import OBJECTIVES
from hne.models import checkpoint
from hne.training import (
    CapturedStep,
    DistillationTrainer,
    Teacher,
    TrainConfig,
    Trainer,
)
from hne.training.captured_step import _ORDINARY_STEPS

SMALL: dict[str, Any] = {"limit_train": 64, "limit_test": 40, "batch_size": 16, "width": 0.5, "num_models": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    return emulate(monkeypatch)


def start(**options: Any) -> Trainer:
    config = TrainConfig.of(**{**SMALL, "epochs": 2, **options})
    data = load_dataset(config.data, limit_train=config.limit_train, limit_test=config.limit_test)
    return Trainer.from_config(config, data, HERE)


def uncaptured(trainer: Trainer) -> Trainer:
    """Let a trainer of captured steps take ordinary ones, with the same optimiser."""
    trainer.config = replace(trainer.config, cuda_graph=False)
    trainer._step = trainer._make_step()
    trainer.config = replace(trainer.config, cuda_graph=True)
    assert not isinstance(trainer._step, CapturedStep)
    return trainer


def state_of(trainer: Trainer, path: Path) -> tuple[dict[str, Tensor], Any]:
    """All tensors of a checkpoint, and the config with the figures of every epoch."""
    trainer.save(path)
    tensors, config = checkpoint.load(path)
    for row in config["history"]:
        del row["seconds"], row["images_per_second"]
    return tensors, config


def assert_same_run(one: Trainer, other: Trainer, folder: Path) -> None:
    (a, config), (b, other_config) = state_of(one, folder / "one"), state_of(other, folder / "other")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert config == other_config


@pytest.mark.parametrize(
    "options",
    [
        *({"objective": name} for name in OBJECTIVES),
        {"naive": True},
        {"amp": True},
        {"momentum": 0.0},
        {"clip_grad_norm": 0.5},
        {"channels_last": False},
        {"schedule": "halving", "lr": 0.1},
        {"data": "diabetes", "limit_train": 96, "num_models": None, "width": 1.0},
    ],
    ids=str,
)
def test_a_run_is_the_same_bit_for_bit(options: dict[str, Any], graphs: type[Graph], tmp_path: Path) -> None:
    captured, ordinary = start(cuda_graph=True, **options), uncaptured(start(cuda_graph=True, **options))
    list(captured.train())
    steps = 2 * captured.steps_per_epoch
    assert steps > _ORDINARY_STEPS + 1
    assert (graphs.captures, graphs.replays) == (1, steps - _ORDINARY_STEPS)
    list(ordinary.train())
    assert graphs.captures == 1
    assert_same_run(captured, ordinary, tmp_path)


@pytest.mark.parametrize("online", [False, True])
def test_distillation_is_the_same_bit_for_bit(online: bool, graphs: type[Graph], tmp_path: Path) -> None:
    teacher: Teacher = random_outputs()
    if online:
        torch.manual_seed(5)
        teacher = heads(3, epochs=1).build_model(DIGITS)
    config = heads(cuda_graph=True, augment=online)
    runs = [DistillationTrainer.from_config(config, DIGITS, HERE, teacher=teacher) for _ in range(2)]
    uncaptured(runs[1])
    for run in runs:
        list(run.train())
    assert graphs.captures == 1
    assert_same_run(*runs, tmp_path)


def test_resumed_run_is_the_same_bit_for_bit(graphs: type[Graph], tmp_path: Path) -> None:
    whole, first, second = (start(cuda_graph=True, epochs=4) for _ in range(3))
    list(whole.train())
    interrupted = first.train()
    for _ in range(2):
        next(interrupted)
    first.save(tmp_path / "half")
    next(interrupted)  # work that is lost
    torch.manual_seed(99)
    second.restore(tmp_path / "half")
    list(second.train())
    assert_same_run(whole, second, tmp_path)


def test_a_trainer_restored_after_a_capture(graphs: type[Graph], tmp_path: Path) -> None:
    """The graph holds on to momentum buffers that ``restore`` replaces."""
    trainer = start(cuda_graph=True, epochs=3)
    run = trainer.train()
    next(run)
    trainer.save(tmp_path / "first")
    list(run)
    whole = state_of(trainer, tmp_path / "whole")
    trainer.restore(tmp_path / "first")
    list(trainer.train())
    again = state_of(trainer, tmp_path / "again")
    assert [name for name in whole[0] if not torch.equal(whole[0][name], again[0][name])] == []
    assert graphs.captures == 2


def test_the_config_is_kept(graphs: type[Graph], tmp_path: Path) -> None:
    trainer = start(cuda_graph=True, epochs=1)
    list(trainer.train())
    trainer.save(tmp_path / "run")
    stored = checkpoint.load(tmp_path / "run")[1]["recipe"]
    assert TrainConfig.from_dict(stored) == trainer.config
    with pytest.raises(CheckpointError, match="option cuda_graph was True, now it is False"):
        start(epochs=1).restore(tmp_path / "run")


def test_runs_of_earlier_versions_are_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = start(epochs=1)
    earlier = trainer.config.to_dict()
    del earlier["cuda_graph"]
    assert TrainConfig.from_dict(json.loads(json.dumps(earlier))) == trainer.config
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "to_dict", lambda config: earlier)
        trainer.save(tmp_path / "run")
    start(epochs=1).restore(tmp_path / "run")


def test_divergence_is_an_error(graphs: type[Graph]) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch \d: try a smaller lr than 1e\+20"):
        list(start(cuda_graph=True, lr=1e20, epochs=4).train())


def test_runs_that_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="cuda_graph: needs a GPU, got cpu"):
        start(cuda_graph=True)
    emulate(monkeypatch)
    config = TrainConfig.of(**SMALL, cuda_graph=True)
    with pytest.raises(TrainingError, match="cuda_graph: captures the step of a single process, got 2 processes"):
        Trainer.from_config(config, DIGITS, World(torch.device("cpu"), size=2))
    with pytest.raises(ValueError, match="cuda_graph: expected True or False, got 1"):
        TrainConfig.of(cuda_graph=1)
