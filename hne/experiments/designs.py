"""The designs of the HNE paper's experiments: each study compares curves, and each curve is a list of configs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..hierarchy import Hierarchy
from ..losses import OBJECTIVES
from ..models import PRESETS
from ..training import TrainConfig
from .rivals import RivalConfig


@dataclass(frozen=True)
class Curve:
    """A row of a table, or a curve of a figure.

    Attributes:
        kind: The objective or system. It decides the colour, the same in every figure.
        label: Name in tables and figures.
        configs: One config, whose ensemble sizes are the points of the curve, or single networks of several widths,
            one point each. The seed of each repetition replaces theirs.
    """

    kind: str
    label: str
    configs: tuple[TrainConfig, ...]


@dataclass(frozen=True)
class Panel:
    """Curves of one scale, which are compared with each other."""

    scale: float
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class StudySettings:
    """The settings that the user of a study chooses.

    Attributes:
        base: The options that all runs have in common.
        objectives: The objectives that table 1 compares.
        alphas: Weights of the distillation in the ``I+D`` runs of figure 4.
        widths: Widths of the single networks of figure 5, relative to the ensemble's members.
    """

    base: TrainConfig
    objectives: tuple[str, ...] = OBJECTIVES
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    widths: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def blocks(self) -> int:
        """Number of blocks of the architecture."""
        return len(PRESETS[self.base.preset].blocks)

    @property
    def hierarchy(self) -> Hierarchy:
        """The tree of the HNE."""
        if self.base.num_models is None:
            return PRESETS[self.base.preset].hierarchy
        return Hierarchy.doubling(self.blocks, self.base.num_models)

    def curve(self, kind: str, label: str, tree: Hierarchy, scales: Sequence[float], **options: Any) -> Curve:
        """A curve of one tree at one or several scales; ``options`` replace those of ``base``."""
        base = replace(self.base, branches=tree.branches, num_models=tree.num_models, **options)
        return Curve(kind, label, tuple(replace(base, width=scale) for scale in scales))

    def hne_curve(self, objective: str, scale: float, label: str | None = None, alpha: float | None = None) -> Curve:
        """A curve of the HNE trained for an objective; by default with the objective as label and the usual alpha."""
        return self.curve(
            objective,
            label or objective,
            self.hierarchy,
            [scale],
            objective=objective,
            alpha=self.base.alpha if alpha is None else alpha,
        )


@dataclass(frozen=True)
class Study:
    """An experiment of the paper.

    Attributes:
        title: Heading of the report.
        curves: Function from settings and scale to the curves.
        tables: Names of the tables, keys of ``hne.experiments.tables.TABLES``.
        figure: ``cost`` for accuracy and diversity against multiply-adds, ``cost and time`` for accuracy against
            multiply-adds and milliseconds, ``members`` for the accuracy of ensembles and of each member by itself, or
            None.
    """

    title: str
    curves: Callable[[StudySettings, float], tuple[Curve, ...]]
    tables: tuple[str, ...]
    figure: str | None

    @property
    def timed(self) -> bool:
        """Whether the results need measured times."""
        return "milliseconds" in self.tables


def _objectives(settings: StudySettings, scale: float) -> tuple[Curve, ...]:
    return tuple(settings.hne_curve(objective, scale) for objective in settings.objectives)


def _distillations(settings: StudySettings, scale: float) -> tuple[Curve, ...]:
    return (
        settings.hne_curve("I", scale, "I (no distillation)"),
        *(settings.hne_curve("I+D", scale, f"I+D, alpha {alpha:g}", alpha) for alpha in settings.alphas),
        settings.hne_curve("I+HD", scale),
    )


def _sharing_schemes(settings: StudySettings, scale: float) -> tuple[Curve, ...]:
    blocks, members = settings.blocks, settings.hierarchy.num_models
    trunk = (blocks + 1) // 2  # three of the paper's five blocks
    return (
        settings.curve("HNE", "HNE", settings.hierarchy, [scale]),
        settings.curve("independent", "independent networks", Hierarchy.independent(blocks, members), [scale]),
        settings.curve("multi-branch", "multi-branch", Hierarchy.multi_branch(blocks, members, trunk), [scale]),
        # For a single network, every other objective is zero or a multiple of I.
        settings.curve(
            "single",
            "one network",
            Hierarchy.single(blocks),
            [scale * width for width in settings.widths],
            objective="I",
        ),
    )


def _members(settings: StudySettings, scale: float) -> tuple[Curve, ...]:
    return (
        settings.hne_curve("I", scale, "I (no distillation)"),
        settings.hne_curve("I+D", scale),
        settings.hne_curve("I+HD", scale),
    )


def _rivals(settings: StudySettings, scale: float) -> tuple[Curve, ...]:
    base = replace(settings.base, width=scale)
    single = Hierarchy.single(settings.blocks)
    networks = [scale * width for width in settings.widths]
    return (
        *(settings.hne_curve(objective, scale, f"HNE, {objective}") for objective in ("I", "I+D", "I+HD")),
        Curve("exits", "early exits", (RivalConfig.like(base, "exits"),)),
        Curve("MSDNet", "MSDNet", (RivalConfig.like(base, "msdnet"),)),
        settings.curve("slimmable", "slimmable", single, [scale], objective="I", widths=_SLIMMABLE_WIDTHS),
        settings.curve("single", "one network", single, networks, objective="I"),
    )


_SLIMMABLE_WIDTHS = (0.25, 0.5, 0.75, 1.0)

STUDIES: dict[str, Study] = {
    "table1": Study("Accuracy by objective", _objectives, ("accuracy", "macs"), None),
    "figure4": Study(
        "Accuracy and diversity by distillation", _distillations, ("accuracy", "diversity", "macs"), "cost"
    ),
    "figure5": Study(
        "Accuracy and diversity by sharing scheme", _sharing_schemes, ("accuracy", "diversity", "macs"), "cost"
    ),
    "figure6": Study(
        "Accuracy against cost and time, with rivals", _rivals, ("accuracy", "macs", "milliseconds"), "cost and time"
    ),
    "figure9": Study("Ensembles and their networks by themselves", _members, ("accuracy", "members"), "members"),
}


def study_panels(study: Study, settings: StudySettings, scales: Iterable[float]) -> tuple[Panel, ...]:
    """The panels of a study, one for each scale. A scale is a factor on the channel counts of all networks."""
    return tuple(Panel(scale, study.curves(settings, scale)) for scale in scales)


def training_configs(panels: Iterable[Panel], seeds: int) -> tuple[TrainConfig, ...]:
    """The configs of all runs that panels need, without duplicates, ordered by seed."""
    configs = [config for panel in panels for curve in panel.curves for config in curve.configs]
    return tuple(dict.fromkeys(replace(config, seed=seed) for seed in range(seeds) for config in configs))
