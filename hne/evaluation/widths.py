"""Quality and cost of a slimmable model at each of its widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..data import Dataset
from ..models import HNE
from .classification import Evaluation, evaluate
from .predict import Ensemble


@dataclass(frozen=True)
class AtWidth:
    """A slimmable model at one width, for every function that evaluates an :class:`Ensemble`."""

    model: HNE
    width: float

    @property
    def num_models(self) -> int:
        return self.model.num_models

    def __call__(self, x: Tensor, /) -> Tensor:
        y: Tensor = self.model(x, width=self.width)
        return y

    def macs(self, num_models: int, input_size: tuple[int, int], /) -> int:
        return self.model.macs(num_models, input_size, width=self.width)

    def eval(self) -> None:
        self.model.eval()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()


def evaluate_widths(model: Ensemble, dataset: Dataset, **options: Any) -> Evaluation:
    """Evaluate a model, and each width below 1 if it is slimmable (:meth:`hne.HNE.set_widths_`).

    Args:
        model, dataset, options: as for :func:`evaluate`. ``progress`` hears of the images at each width.

    Raises:
        RuntimeError: the statistics of a width were not computed.
        ResultError: a metric is NaN or infinite.
    """
    evaluation = evaluate(model, dataset, **options)
    if not isinstance(model, HNE):
        return evaluation
    narrow = [AtWidth(model, width) for width in model.widths if width < 1]
    narrower = (replace(evaluate(at_width, dataset, **options), width=at_width.width) for at_width in narrow)
    return replace(evaluation, narrower=tuple(narrower))


def pareto_front(evaluation: Evaluation) -> set[tuple[float, int]]:
    """The pairs (width, number of members) of a slimmable model that no other one beats: each cheaper one is less
    accurate."""
    points = [(e.macs, -e.accuracy, at.width, e.num_models) for at in by_width(evaluation) for e in at.ensembles]
    front, best = set(), 0.0
    for _, loss, width, num_models in sorted(points):
        if loss < best:
            best = loss
            front.add((width, num_models))
    return front


def by_width(evaluation: Evaluation) -> tuple[Evaluation, ...]:
    """The evaluations of all widths, by rising width."""
    return (*evaluation.narrower, evaluation)
