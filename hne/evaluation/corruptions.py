"""Quality of ensembles on corrupted images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..data import Corruption, Dataset
from .classification import EnsembleMetrics, Evaluation, evaluate
from .predict import Ensemble


@dataclass(frozen=True)
class CorruptionEvaluation:
    """Metrics of a network on images with a corruption of a severity.

    Attributes:
        corruption: name of the corruption.
        severity: 1 to 5.
        evaluation: the metrics of each ensemble.
    """

    corruption: str
    severity: int
    evaluation: Evaluation

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON-able values."""
        return asdict(self)


def evaluate_corruptions(
    model: Ensemble,
    dataset: Dataset,
    corruptions: Iterable[Corruption],
    *,
    sizes: Sequence[int] | None = None,
    average: str = "logits",
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> tuple[CorruptionEvaluation, ...]:
    """Evaluate ensembles of the first n members on corrupted images.

    Args:
        model: is put into eval mode.
        dataset: provides the format of the images.
        corruptions: the images, see :func:`hne.data.corrupted_images`.
        sizes, average, batch_size: as for :func:`evaluate`.
        progress: called with the size of every batch that was evaluated.

    Raises:
        ResultError: a metric is NaN or infinite.
    """
    return tuple(
        CorruptionEvaluation(
            name,
            severity,
            evaluate(
                model,
                dataset,
                images=images,
                sizes=sizes,
                average=average,
                batch_size=batch_size,
                progress=progress,
            ),
        )
        for name, severity, images in corruptions
    )


def mean_metrics(evaluations: Sequence[CorruptionEvaluation]) -> tuple[EnsembleMetrics, ...]:
    """The mean of each metric of each ensemble over evaluations of equal weight, at least one.

    Over all corruptions and severities, one minus the accuracy is the mean corruption error, not divided by the errors
    of another network (as usual for CIFAR-10-C; Hendrycks and Dietterich divide by those of AlexNet for ImageNet-C).
    """
    means = []
    for ensembles in zip(*(found.evaluation.ensembles for found in evaluations), strict=True):
        columns = zip(*(asdict(ensemble).items() for ensemble in ensembles), strict=True)
        values = {cells[0][0]: sum(value for _, value in cells) / len(cells) for cells in columns}
        first = ensembles[0]
        means.append(replace(EnsembleMetrics(**values), num_models=first.num_models, macs=first.macs))
    return tuple(means)
