"""Training runs of studies: their names, states and lock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hne.data import load_dataset
from hne.errors import TrainingError
from hne.experiments import RunState, lock_runs, read_run_state, run_name
from hne.training import TrainConfig


@pytest.mark.parametrize(
    "change",
    [
        *({"data": "fashion-mnist"}, {"preset": "hne_small_resnet50_cifar"}, {"epochs": 3}, {"lr": 0.1}, {"seed": 1}),
        *({"alpha": 0.4}, {"temperature": 1.0}, {"width": 0.5}, {"width": 1.0000001}, {"num_models": 4}),
        *({"branches": (1, 1, 2, 4)}, {"limit_train": 9}, {"limit_test": 9}, {"amp": True}, {"augment": False}),
    ],
)
def test_every_option_changes_the_name(change: dict[str, Any]) -> None:
    config = TrainConfig.of()
    assert run_name(replace(config, **change)) != run_name(config)


def test_names_are_for_people_and_stay() -> None:
    config = TrainConfig.of(data="cifar100", branches=(1, 2, 4, 8, 16), objective="I+D", width=0.5, seed=2)
    assert run_name(config) == "cifar100-hne_resnet50_cifar-x0.5-1.2.4.8.16-I+D-alpha0.5-200ep-seed2-856d92db"


def test_progress_of_what_is_not_there(tmp_path: Path) -> None:
    assert read_run_state(tmp_path / "none", TrainConfig.of(), load_dataset("digits")) == RunState(0)


def test_claim(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with lock_runs(folder), pytest.raises(TrainingError, match="another process trains here"), lock_runs(folder):
        pass
    with lock_runs(folder):
        pass
