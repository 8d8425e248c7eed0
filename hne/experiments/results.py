"""Results of a study: the evaluations of finished runs, as means and standard deviations over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..evaluation import Evaluation, by_width
from ..training import TrainConfig
from .designs import Curve, Panel


@dataclass(frozen=True)
class Estimate:
    """A quantity over repetitions.

    Attributes:
        mean: Mean of the repetitions.
        deviation: Sample standard deviation; None for a single repetition.
        count: Number of repetitions.
    """

    mean: float
    deviation: float | None
    count: int = field(default=1, compare=False)

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from at least one value."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def format(self, digits: int, factor: float = 1.0) -> str:
        """``mean ± deviation``, both times ``factor``."""
        text = f"{factor * self.mean:.{digits}f}"
        return text if self.deviation is None else f"{text} ± {factor * self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Result:
    """The evaluations of one config over its seeds.

    Attributes:
        label: Name in tables.
        config: The config; its seed is the first finished one.
        evaluations: Evaluations of the finished seeds, at least one; of a slimmable model, at one of its widths.
        more: Further quantities by name, for each ensemble size.
    """

    label: str
    config: TrainConfig
    evaluations: tuple[Evaluation, ...]
    more: Mapping[str, tuple[Estimate, ...]] = field(default_factory=dict)

    @property
    def width(self) -> float:
        """The factor on the channel counts of the preset."""
        return self.config.width * self.evaluations[0].width

    @property
    def sizes(self) -> tuple[int, ...]:
        """The ensemble sizes n that were evaluated."""
        return tuple(ensemble.num_models for ensemble in self.evaluations[0].ensembles)

    @property
    def macs(self) -> tuple[int, ...]:
        """Multiply-adds of each ensemble size for one image."""
        return tuple(ensemble.macs for ensemble in self.evaluations[0].ensembles)

    def of_ensembles(self, quantity: str) -> tuple[Estimate, ...]:
        """An attribute of :class:`hne.evaluation.EnsembleMetrics`, or one of ``more``, for each ensemble size."""
        if quantity in self.more:
            return self.more[quantity]
        columns = zip(*(evaluation.ensembles for evaluation in self.evaluations), strict=True)
        return tuple(Estimate.of([getattr(ensemble, quantity) for ensemble in column]) for column in columns)

    def of_members(self) -> tuple[Estimate, ...]:
        """The accuracy of each member by itself."""
        return tuple(map(Estimate.of, zip(*(e.member_accuracy for e in self.evaluations), strict=True)))


@dataclass(frozen=True)
class CurveResult:
    """The results of a :class:`Curve`, without configs that are not finished for any seed."""

    kind: str
    label: str
    results: tuple[Result, ...]


@dataclass(frozen=True)
class PanelResult:
    """The results of a :class:`Panel`, without curves that have none."""

    scale: float
    curves: tuple[CurveResult, ...]

    @property
    def results(self) -> tuple[Result, ...]:
        """The results of all curves."""
        return tuple(result for curve in self.curves for result in curve.results)


def collect_results(
    panels: Iterable[Panel], seeds: int, evaluation_of: Callable[[TrainConfig], Evaluation | None]
) -> tuple[PanelResult, ...]:
    """Collect the results of all finished runs.

    Args:
        panels: The panels of a study.
        seeds: Number of repetitions of every run.
        evaluation_of: Returns the evaluation of a run, or None if it is not finished.
    """

    def results(curve: Curve) -> Iterator[Result]:
        for config in curve.configs:
            found = [(seed, evaluation_of(replace(config, seed=seed))) for seed in range(seeds)]
            finished = [(seed, by_width(evaluation)) for seed, evaluation in found if evaluation is not None]
            if not finished:
                continue
            seeded = replace(config, seed=finished[0][0])
            for evaluations in zip(*(widths for _, widths in finished), strict=True):
                result = Result(curve.label, seeded, evaluations)
                several = len(curve.configs) > 1 or len(finished[0][1]) > 1
                yield replace(result, label=f"{curve.label}, width {result.width:g}") if several else result

    collected = []
    for panel in panels:
        curves = [CurveResult(curve.kind, curve.label, tuple(results(curve))) for curve in panel.curves]
        collected.append(PanelResult(panel.scale, tuple(curve for curve in curves if curve.results)))
    return tuple(collected)
