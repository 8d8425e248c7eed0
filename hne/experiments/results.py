"""What the finished runs of a study say: means and standard deviations over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ..evaluation import Evaluation
from ..training.config import Recipe
from .designs import Panel


@dataclass(frozen=True)
class Estimate:
    """Of a quantity over repetitions.

    Attributes:
        mean: of the repetitions.
        deviation: their standard deviation (that of a sample); None for a single one.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least one value."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def format(self, digits: int, factor: float = 1.0) -> str:
        """``mean ± deviation``, both times ``factor``."""
        text = f"{factor * self.mean:.{digits}f}"
        return text if self.deviation is None else f"{text} ± {factor * self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Result:
    """A network over its seeds.

    Attributes:
        label: a name for tables.
        recipe: with the seed of none in particular.
        evaluations: of every seed that is finished, at least one.
    """

    label: str
    recipe: Recipe
    evaluations: tuple[Evaluation, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The ensemble sizes that were evaluated."""
        return tuple(ensemble.num_models for ensemble in self.evaluations[0].ensembles)

    @property
    def macs(self) -> tuple[int, ...]:
        """What each of them costs."""
        return tuple(ensemble.macs for ensemble in self.evaluations[0].ensembles)

    def of_ensembles(self, quantity: str) -> tuple[Estimate, ...]:
        """An attribute of :class:`hne.evaluation.EnsembleMetrics`, for every size."""
        columns = zip(*(e.ensembles for e in self.evaluations), strict=True)
        return tuple(Estimate.of([getattr(ensemble, quantity) for ensemble in column]) for column in columns)

    def of_members(self) -> tuple[Estimate, ...]:
        """The accuracy of every leaf by itself."""
        return tuple(map(Estimate.of, zip(*(e.member_accuracy for e in self.evaluations), strict=True)))


@dataclass(frozen=True)
class CurveResult:
    """What has come of a :class:`Curve`: its networks that are finished in at least one seed."""

    kind: str
    label: str
    results: tuple[Result, ...]


@dataclass(frozen=True)
class PanelResult:
    """What has come of a :class:`Panel`; curves of which nothing is finished are left out."""

    scale: float
    curves: tuple[CurveResult, ...]

    @property
    def results(self) -> tuple[Result, ...]:
        """All networks, curve by curve."""
        return tuple(result for curve in self.curves for result in curve.results)


def collect(
    panels: Iterable[Panel], seeds: int, evaluation_of: Callable[[Recipe], Evaluation | None]
) -> tuple[PanelResult, ...]:
    """Put together what is finished.

    Args:
        panels: what is compared.
        seeds: repetitions of every run.
        evaluation_of: gives the evaluation of a finished run, and None for another.
    """

    def result(label: str, recipe: Recipe) -> Result | None:
        found = (evaluation_of(replace(recipe, seed=seed)) for seed in range(seeds))
        evaluations = tuple(evaluation for evaluation in found if evaluation is not None)
        return Result(label, recipe, evaluations) if evaluations else None

    collected = []
    for panel in panels:
        curves = []
        for curve in panel.curves:
            several = len(curve.recipes) > 1
            candidates = [
                result(f"{curve.label}, width {recipe.width:g}" if several else curve.label, recipe)
                for recipe in curve.recipes
            ]
            finished = tuple(candidate for candidate in candidates if candidate is not None)
            if finished:
                curves.append(CurveResult(curve.kind, curve.label, finished))
        collected.append(PanelResult(panel.scale, tuple(curves)))
    return tuple(collected)
