"""The systems that ``hne compare`` trains: an HNE from a trained network, and what costs as much to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..data import Dataset
from ..distributed import World
from ..hierarchy import Hierarchy
from ..models import HNE, PRESETS, FusedHNE
from ..training import TrainConfig, Trainer
from .mc_dropout import MCDropout, with_dropout
from .runs import run_name


@dataclass(frozen=True)
class SystemConfig(TrainConfig):
    """The config of a network that starts from another run, or that has dropout.

    Attributes:
        start: Name of the run that it starts from, which follows from all options of that run; empty for new weights.
        dropout: Rate of the dropout after each block; 0 for none.
    """

    start: str = ""
    dropout: float = 0.0

    def build_model(self, dataset: Dataset) -> HNE:
        model = super().build_model(dataset)
        if not self.dropout:
            return model
        blocks = with_dropout([[layer.spec for layer in block] for block in model.layers_of_blocks()], self.dropout)
        return type(model)(model.hierarchy, blocks, num_classes=model.num_classes, in_channels=model.in_channels)


@dataclass(frozen=True)
class System:
    """One of the systems that are compared.

    Attributes:
        label: Name in tables and figures.
        kind: What it is; decides the colour in figures.
        config: How it is trained.
        cost: Multiply-adds of the forward passes of its training, with those of the run that it starts from.
        average: What its ensembles average, a name of :data:`hne.averages.AVERAGES`.
        passes: Number of passes of MC dropout; 0 for other systems.
    """

    label: str
    kind: str
    config: TrainConfig
    cost: int
    average: str = "probabilities"
    passes: int = 0

    def ensemble(self, model: HNE) -> HNE | MCDropout:
        """The ensemble of a trained model."""
        return MCDropout(model, self.passes) if self.passes else model


def compared_systems(
    base: TrainConfig, dataset: Dataset, *, fine_tune_epochs: int, fine_tune_lr: float, dropout: float
) -> tuple[System, ...]:
    """The systems in the order of training. All but the first one cost about the same to train.

    The cost of training is counted in multiply-adds of forward passes. The budget is the cost of one network and of its
    fine-tuning as an HNE. Each other system gets the whole number of epochs that comes closest to it:

    - one network, trained for the epochs of ``base``
    - the HNE that starts from it, fine-tuned with the objective of ``base``
    - the same network trained on for the cost of the fine-tuning, at its learning rate
    - N independent networks
    - as many independent networks as can be trained for the epochs of ``base``, if that is more than 1 and below N
    - one network with dropout, whose ensembles average N passes

    Args:
        base: The config of the first run. Its preset and ``num_models`` give the tree of the HNE, and N.
        dataset: The data.
        fine_tune_epochs, fine_tune_lr: Length and initial learning rate of the fine-tuning.
        dropout: Rate of the dropout.

    Raises:
        ValueError: An option is out of range.
    """
    if not 0 < dropout < 1:
        raise ValueError(f"dropout: expected a number above 0 and below 1, got {dropout}")
    blocks = len(PRESETS[base.preset].blocks)
    tree = PRESETS[base.preset].hierarchy
    if base.num_models is not None:
        tree = Hierarchy.doubling(blocks, base.num_models)
    members = tree.num_models
    if members < 2:
        raise ValueError(f"num_models: expected at least 2 networks for an ensemble, got {members}")

    def trained_as(config: TrainConfig, tree: Hierarchy, epochs: int, objective: str = "I") -> TrainConfig:
        return replace(config, branches=tree.branches, num_models=tree.num_models, epochs=epochs, objective=objective)

    def independent(count: int) -> System:
        config = trained_as(base, Hierarchy.independent(blocks, count), _whole(budget / (count * unit)))
        return System(f"deep ensemble of {count}", "independent", config, count * unit * config.epochs)

    one = Hierarchy.single(blocks)
    single = trained_as(base, one, base.epochs)
    fine = replace(_extended(base), start=run_name(single), lr=fine_tune_lr)
    hne = trained_as(fine, tree, fine_tune_epochs, base.objective)
    unit, tuning = _macs_per_epoch(single, dataset), _macs_per_epoch(hne, dataset)
    first, tuned = unit * base.epochs, tuning * fine_tune_epochs
    budget = first + tuned
    continued = trained_as(fine, one, _whole(tuned / unit))
    dropped = trained_as(replace(_extended(base), dropout=dropout), one, _whole(budget / unit))
    systems = [
        System("one network", "single", single, first),
        System(f"HNE of {members} from it", "HNE", hne, budget, average="logits"),
        System("one network, trained on", "continued", continued, first + unit * continued.epochs),
        independent(members),
        System("MC dropout", "MC dropout", dropped, unit * dropped.epochs, passes=members),
    ]
    full = round(budget / first)
    if 1 < full < members:
        systems.insert(4, independent(full))
    return tuple(systems)


def make_trainer(config: TrainConfig, dataset: Dataset, world: World, models: Mapping[str, HNE]) -> Trainer:
    """The trainer of a run.

    Args:
        config: The config of a :class:`System`.
        dataset: The data.
        world: The processes that train together.
        models: Trained models by the names of their runs, with the one that this run starts from.
    """
    if not isinstance(config, SystemConfig) or not config.start:
        return Trainer.from_config(config, dataset, world)
    assert config.branches is not None
    model = FusedHNE.from_backbone(
        models[config.start], config.branches, seed=config.seed, input_size=dataset.input.size
    )
    trainer = Trainer(model, dataset, config, world)
    trainer.config = config  # which describes model and data
    return trainer


def _extended(config: TrainConfig) -> SystemConfig:
    return SystemConfig(**{**config.to_dict(), "branches": config.branches})


def _macs_per_epoch(config: TrainConfig, dataset: Dataset) -> int:
    with torch.device("meta"):  # shapes without memory
        return config.build_model(dataset).macs(input_size=dataset.input.size) * len(dataset.train)


def _whole(epochs: float) -> int:
    return max(1, round(epochs))
