"""Small students, and teachers whose outputs are random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hne.data import load_dataset
from hne.distributed import World
from hne.training import StudentConfig, student_configs

HERE = World(torch.device("cpu"))
SMALL: dict[str, Any] = {"limit_train": 64, "limit_test": 40, "batch_size": 16, "width": 0.5, "teacher": "a"}
DIGITS = load_dataset("digits", limit_train=64, limit_test=40)


def heads(num_models: int = 3, **options: Any) -> StudentConfig:
    return student_configs(StudentConfig.of(**{**SMALL, "epochs": 2, **options}), num_models)["hydra"]


def random_outputs(num_models: int = 3, count: int = 64, outputs: int = 10) -> Tensor:
    return torch.randn(num_models, count, outputs, generator=torch.Generator().manual_seed(1))
