"""Which networks the paper's experiments compare: each study as curves, each curve as recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..hierarchy import Hierarchy
from ..losses import OBJECTIVES
from ..models.presets import PRESETS
from ..training.config import Recipe


@dataclass(frozen=True)
class Curve:
    """What a row of a table or a curve of a figure shows.

    Attributes:
        kind: the objective or the system, which decides the colour: the same in every figure.
        label: its name in tables and figures.
        recipes: one network, of which every ensemble size is a point; or one network at several widths, a point each.
            Their seed is replaced by that of each repetition.
    """

    kind: str
    label: str
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True)
class Panel:
    """What is compared with each other: networks of one scale."""

    scale: float
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Choices:
    """What a study leaves open.

    Attributes:
        base: all that its networks have in common.
        alphas: weights of the distillation that ``I+D`` is tried with.
        widths: of the one network that ensembles are compared with, in relation to the ensembles' networks.
    """

    base: Recipe
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    widths: tuple[float, ...] = (0.5, 1.0, 2.0)

    @property
    def blocks(self) -> int:
        """Blocks of the architecture."""
        return len(PRESETS[self.base.preset].blocks)

    @property
    def hierarchy(self) -> Hierarchy:
        """The tree of the HNE."""
        if self.base.num_models is None:
            return PRESETS[self.base.preset].hierarchy
        return Hierarchy.doubling(self.blocks, self.base.num_models)

    def curve(self, kind: str, label: str, tree: Hierarchy, scales: Sequence[float], **options: Any) -> Curve:
        """Networks of one tree and objective."""
        base = replace(self.base, branches=tree.branches, num_models=tree.num_models, **options)
        return Curve(kind, label, tuple(replace(base, width=scale) for scale in scales))

    def trained_for(self, objective: str, scale: float, label: str | None = None, alpha: float | None = None) -> Curve:
        """The HNE, trained for an objective; label and alpha are the usual ones by default."""
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
        title: what it shows.
        curves: what it compares, at a scale.
        tables: the quantities to tabulate, as :mod:`hne.study.tables` names them.
        figure: ``cost`` (accuracy and diversity against multiply-adds), ``members`` (ensembles and the networks by
            themselves) or None.
    """

    title: str
    curves: Callable[[Choices, float], tuple[Curve, ...]]
    tables: tuple[str, ...]
    figure: str | None


def _objectives(choices: Choices, scale: float) -> tuple[Curve, ...]:
    return tuple(choices.trained_for(objective, scale) for objective in OBJECTIVES)


def _distillations(choices: Choices, scale: float) -> tuple[Curve, ...]:
    return (
        choices.trained_for("I", scale, "I (no distillation)"),
        *(choices.trained_for("I+D", scale, f"I+D, alpha {alpha:g}", alpha) for alpha in choices.alphas),
        choices.trained_for("I+HD", scale),
    )


def _systems(choices: Choices, scale: float) -> tuple[Curve, ...]:
    blocks, models = choices.blocks, choices.hierarchy.num_models
    trunk = (blocks + 1) // 2  # three of the paper's five blocks
    return (
        choices.curve("HNE", "HNE", choices.hierarchy, [scale]),
        choices.curve("independent", "independent networks", Hierarchy.independent(blocks, models), [scale]),
        choices.curve("multi-branch", "multi-branch", Hierarchy.multi_branch(blocks, models, trunk), [scale]),
        # With one network, the other objectives are multiples of I, or nothing.
        choices.curve(
            "single",
            "one network",
            Hierarchy.single(blocks),
            [scale * width for width in choices.widths],
            objective="I",
        ),
    )


def _members(choices: Choices, scale: float) -> tuple[Curve, ...]:
    return (
        choices.trained_for("I", scale, "I (no distillation)"),
        choices.trained_for("I+D", scale),
        choices.trained_for("I+HD", scale),
    )


STUDIES: dict[str, Study] = {
    "table1": Study("Accuracy by objective", _objectives, ("accuracy", "macs"), None),
    "figure4": Study(
        "Accuracy and diversity by distillation", _distillations, ("accuracy", "diversity", "macs"), "cost"
    ),
    "figure5": Study("Accuracy and diversity by sharing scheme", _systems, ("accuracy", "diversity", "macs"), "cost"),
    "figure9": Study("Ensembles and their networks by themselves", _members, ("accuracy", "members"), "members"),
}


def panels(study: Study, choices: Choices, scales: Iterable[float]) -> tuple[Panel, ...]:
    """What a study compares at each scale, the factor on the channel counts of its networks."""
    return tuple(Panel(scale, study.curves(choices, scale)) for scale in scales)


def recipes(compared: Iterable[Panel], seeds: int) -> tuple[Recipe, ...]:
    """Every run that panels need, each once, first all of one seed."""
    needed = [recipe for panel in compared for curve in panel.curves for recipe in curve.recipes]
    return tuple(dict.fromkeys(replace(recipe, seed=seed) for seed in range(seeds) for recipe in needed))
