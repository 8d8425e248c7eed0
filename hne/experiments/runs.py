"""The training runs of studies: a folder each, named after the config, and how far each run is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

import torch

from ..data import Dataset
from ..errors import CheckpointError
from ..evaluation import Evaluation
from ..files import lock_folder
from ..losses import objective
from ..models import checkpoint
from ..training import CHECKPOINT, SUMMARY, TrainConfig, check_same_run


def run_name(config: TrainConfig) -> str:
    """The folder name of a run: its main options for people, and a digest of all options that makes it unique."""
    tree = "preset" if config.branches is None else ".".join(map(str, config.branches))
    alpha = "" if config.objective in ("I", "H") else f"-alpha{config.alpha:g}"
    return (
        f"{config.data}-{config.preset}-x{config.width:g}-{tree}-{config.objective}{alpha}"
        f"-{config.epochs}ep-seed{config.seed}-{_digest(config)}"
    )


def _digest(config: TrainConfig) -> str:
    """A digest of the options that differ from their defaults, so that a new option changes no existing name."""
    defaults = {field.name: field.default for field in fields(TrainConfig) if field.default is not MISSING}
    values = {name: value for name, value in config.to_dict().items() if value != defaults.get(name, MISSING)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        epochs: Number of finished epochs.
        evaluation: Evaluation after the last epoch; None before.
    """

    epochs: int
    evaluation: Evaluation | None = None


def read_run_state(folder: Path, config: TrainConfig, dataset: Dataset) -> RunState:
    """Read how far the run of ``config`` on ``dataset`` in ``folder`` is.

    Raises:
        CheckpointError: The folder holds another run, or an unreadable file.
    """
    summary, path = folder / SUMMARY, folder / CHECKPOINT
    if summary.exists():
        try:
            values = json.loads(summary.read_text("utf-8"), parse_constant=_refuse_constant)
            state = RunState(config.epochs, Evaluation.from_dict(values["evaluation"]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{summary}: damaged, or written by another version of hne ({error!r}); remove {folder} to train anew"
            ) from error
        check_same_run(summary, values, config, dataset)
        return state
    if not path.exists():
        return RunState(0)
    _, stored = checkpoint.load(path)
    check_same_run(path, stored, config, dataset)
    return RunState(stored["epoch"])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} among the results: the training diverged")


@contextmanager
def lock_runs(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder``, which is created if necessary.

    Raises:
        TrainingError: Another process holds the lock.
    """
    with lock_folder(folder):
        yield


def macs_per_epoch(configs: Iterable[TrainConfig], dataset: Dataset) -> dict[TrainConfig, int]:
    """Multiply-adds of the forward passes of an epoch, for each config.

    Raises:
        ValueError: A config cannot be trained. All configs are checked before the first run starts.
    """
    macs: dict[TrainConfig, int] = {}
    for config in configs:
        without_seed = replace(config, seed=0)
        if without_seed not in macs:
            objective(config.objective, config.alpha, config.temperature)
            with torch.device("meta"):  # shapes without memory
                macs[without_seed] = config.build_model(dataset).macs(input_size=dataset.input.size)
        macs[config] = macs[without_seed]
    return {config: cost * len(dataset.train) for config, cost in macs.items()}
