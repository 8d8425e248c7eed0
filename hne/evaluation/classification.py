"""Quality and cost of the ensembles of 1, 2, 4, ... N members on a data set with classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hne_kernels import default_sizes

from ..averages import AVERAGES, check_average
from ..data import Dataset, Split
from ..distributed import World
from ..metrics import (
    BINS,
    accuracy,
    brier_score,
    calibration_gaps,
    correct,
    disagreement,
    diversity,
    expected_calibration_error,
    mutual_information,
    negative_log_likelihood,
    predictive_entropy,
)
from .predict import Ensemble, finite, predict


@dataclass(frozen=True)
class EnsembleMetrics:
    """Metrics of the ensemble of the first ``num_models`` members.

    Attributes:
        num_models: n, the ensemble size.
        macs: multiply-adds for one image.
        accuracy: fraction of correctly classified images, 0 to 1.
        nll: mean negative log-likelihood of the right class, in nats.
        brier: mean squared distance of the probabilities from the one-hot label, 0 to 2.
        ece: expected calibration error with 15 bins, 0 to 1.
        diversity: population standard deviation of the logits over the members, averaged over classes and images.
        disagreement: share of the pairs of members that predict different classes.
        entropy: mean predictive entropy, in nats.
        mutual_information: share of the entropy that comes from disagreement of the members, in nats.
    """

    num_models: int
    macs: int
    accuracy: float
    nll: float
    brier: float
    ece: float
    diversity: float
    disagreement: float
    entropy: float
    mutual_information: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a network on a data set with classes.

    Attributes:
        ensembles: by rising size.
        member_accuracy: of every member by itself, 0 to 1.
        images: number of images.
        average: what the ensembles average, a name of :data:`hne.averages.AVERAGES`.
        width: share of the channels that were computed.
        narrower: of a slimmable model, the evaluations of its widths below 1, by rising width.
    """

    ensembles: tuple[EnsembleMetrics, ...]
    member_accuracy: tuple[float, ...]
    images: int
    average: str = "logits"
    width: float = 1.0
    narrower: tuple[Evaluation, ...] = ()

    @property
    def diversity(self) -> float:
        """Diversity of the whole ensemble."""
        return self.ensembles[-1].diversity

    @property
    def mean_member_accuracy(self) -> float:
        """Accuracy of a member by itself, averaged over the members."""
        return sum(self.member_accuracy) / len(self.member_accuracy)

    def columns(self) -> dict[str, float]:
        """Return the main metrics by name, for a row of a log."""
        metrics = {f"{name}_{e.num_models}": getattr(e, name) for e in self.ensembles for name in ("accuracy", "nll")}
        for narrow in self.narrower:
            metrics |= {f"accuracy_{e.num_models}_width_{narrow.width:g}": e.accuracy for e in narrow.ensembles}
        return {**metrics, "member_accuracy": self.mean_member_accuracy, "diversity": self.diversity}

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON-able values; width and narrower ones only of a slimmable model."""
        values = asdict(self)
        narrower = [narrow.to_dict() for narrow in self.narrower]
        del values["width"], values["narrower"]
        return (
            values | ({} if self.width == 1 else {"width": self.width}) | ({"narrower": narrower} if narrower else {})
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """Invert :meth:`to_dict`."""
        return cls(
            tuple(EnsembleMetrics(**ensemble) for ensemble in values["ensembles"]),
            tuple(values["member_accuracy"]),
            values["images"],
            values.get("average", "logits"),  # which files of earlier versions do not name
            values.get("width", 1.0),
            tuple(map(cls.from_dict, values.get("narrower", ()))),
        )


@torch.inference_mode()
def evaluate(
    model: Ensemble,
    dataset: Dataset,
    *,
    images: Split | None = None,
    sizes: Sequence[int] | None = None,
    average: str = "logits",
    batch_size: int = 256,
    channels_last: bool = True,
    world: World | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate ensembles of the first n members on the test images, in one pass.

    Args:
        model: is put into eval mode.
        dataset: provides the test images and their format.
        images: labelled images of that format, instead of the test images.
        sizes: the ensemble sizes n, rising; by default the powers of two below N, then N.
        average: what an ensemble averages, a name of :data:`hne.averages.AVERAGES`: logits or probabilities.
        batch_size: images at a time in each process.
        channels_last: memory layout of the batches.
        world: the processes that share the work; each gets the whole result.
        progress: called with the size of every batch that this process has evaluated.

    Raises:
        ResultError: a metric is NaN or infinite.
    """
    world = world or World(next(model.parameters()).device)
    return evaluate_members(
        predict(
            model,
            dataset.test if images is None else images,
            dataset.input,
            batch_size,
            channels_last=channels_last,
            world=world,
        ),
        model.num_models,
        lambda n: model.macs(n, dataset.input.size),
        world,
        progress,
        sizes=sizes,
        average=average,
    )


@torch.inference_mode()
def evaluate_members(
    batches: Iterable[tuple[Tensor, Tensor]],
    num_models: int,
    macs: Callable[[int], int],
    world: World,
    progress: Callable[[int], object] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    average: str = "logits",
) -> Evaluation:
    """Evaluate ensembles of the first n members, given the members' logits.

    Args:
        batches: logits of the members ``[N, B, L]`` and classes ``[B]``.
        num_models: N.
        macs: multiply-adds of the first n members for one image.
        world: the processes, each with batches of its own; each gets the whole result.
        progress: called with the size of every batch that this process has evaluated.
        sizes, average: as for :func:`evaluate`.

    Raises:
        ValueError: ``average`` is unknown.
        ResultError: a metric is NaN or infinite.
    """
    totals = EnsembleTotals(num_models, sizes, average, world.device)
    for members, target in batches:
        totals.add(members, target)
        if progress is not None:
            progress(len(target))
    return totals.evaluation(macs, world)


class EnsembleTotals:
    """Sums of metrics over batches, for a loop of your own.

    Args:
        num_models: N.
        sizes: the ensemble sizes n, rising; by default the powers of two below N, then N.
        average: what an ensemble averages, a name of :data:`hne.averages.AVERAGES`.
        device: device of the batches.

    Raises:
        ValueError: ``average`` is unknown.
    """

    def __init__(
        self,
        num_models: int,
        sizes: Sequence[int] | None = None,
        average: str = "logits",
        device: torch.device | str = "cpu",
    ) -> None:
        check_average(average)
        self._sizes = tuple(default_sizes(num_models) if sizes is None else sizes)
        self._average = average
        self._totals = [
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((), (num_models,), (len(self._sizes), BINS), (len(self._sizes), len(_METRICS)))
        ]

    @torch.inference_mode()
    def add(self, members: Tensor, target: Tensor) -> None:
        """Add a batch: logits of the members ``[N, B, L]``, and classes ``[B]``."""
        ensembles = AVERAGES[self._average](members, self._sizes)
        metrics = torch.stack(
            [_batch_metrics(members[:n], logits, target) for n, logits in zip(self._sizes, ensembles, strict=True)]
        )
        sums: tuple[int | Tensor, ...] = (
            len(target),
            correct(members, target),
            calibration_gaps(ensembles, target),
            len(target) * metrics,
        )
        for total, batch_sum in zip(self._totals, sums, strict=True):
            total += batch_sum

    @torch.inference_mode()
    def evaluation(self, macs: Callable[[int], int], world: World) -> Evaluation:
        """The metrics of all batches of all processes; each process gets them.

        Args:
            macs: multiply-adds of the first n members for one image.
            world: the processes.

        Raises:
            ResultError: a metric is NaN or infinite, as without any image.
        """
        count, member_correct, gaps, metrics = (world.sum(total.clone()).cpu() for total in self._totals)
        num_images = int(count)
        ece = expected_calibration_error(gaps, num_images)
        return finite(
            Evaluation(
                tuple(
                    EnsembleMetrics(
                        num_models=n,
                        macs=macs(n),
                        ece=error,
                        **dict(zip(_METRICS, means, strict=True)),
                    )
                    for n, error, means in zip(self._sizes, ece.tolist(), (metrics / count).tolist(), strict=True)
                ),
                tuple((member_correct / count).tolist()),
                num_images,
                self._average,
            )
        )


_METRICS = ("accuracy", "nll", "brier", "diversity", "disagreement", "entropy", "mutual_information")


def _batch_metrics(members: Tensor, ensemble: Tensor, target: Tensor) -> Tensor:
    """``_METRICS`` of one ensemble on a batch, from the logits ``[n, B, L]`` of the members and its own ``[B, L]``."""
    return torch.stack(
        [
            accuracy(ensemble[None], target)[0],
            negative_log_likelihood(ensemble[None], target)[0],
            brier_score(ensemble[None], target)[0],
            diversity(members),
            disagreement(members),
            predictive_entropy(members).mean(),
            mutual_information(members).mean(),
        ]
    ).double()
