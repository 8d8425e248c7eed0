"""How good the ensembles of 1, 2, 4, ... N models are on a data set, and what each costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hne_kernels import default_sizes, prefix_mean

from ..data import Dataset, Images, InputFormat, evaluation_batches
from ..distributed import World
from ..metrics import (
    BINS,
    Detection,
    accuracy,
    brier_score,
    calibration_gaps,
    correct,
    detection,
    disagreement,
    diversity,
    expected_calibration_error,
    mutual_information,
    negative_log_likelihood,
    predictive_entropy,
)
from ..models.hne import HNE


@dataclass(frozen=True)
class Ensemble:
    """The ensemble of the first ``num_models`` leaves.

    Attributes:
        num_models: n.
        macs: multiply-adds for one image.
        accuracy: share of the images whose class it names, 0 to 1.
        nll: mean negative log-likelihood of the right class, in nats.
        brier: mean squared distance of the probabilities from the one-hot label, 0 to 2.
        ece: expected calibration error with 15 bins, 0 to 1.
        diversity: standard deviation of the logits over its leaves, averaged over classes and images.
        disagreement: share of the pairs of its leaves that name different classes.
        entropy: mean predictive entropy, in nats.
        mutual_information: the part of it that is disagreement of the leaves, in nats.
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
    """A network on a data set.

    Attributes:
        ensembles: by rising size.
        member_accuracy: of every leaf by itself, 0 to 1.
        images: number of images.
    """

    ensembles: tuple[Ensemble, ...]
    member_accuracy: tuple[float, ...]
    images: int

    @property
    def diversity(self) -> float:
        """That of the whole ensemble."""
        return self.ensembles[-1].diversity

    @property
    def mean_member_accuracy(self) -> float:
        """Accuracy of a leaf by itself, averaged over the leaves."""
        return sum(self.member_accuracy) / len(self.member_accuracy)

    def columns(self) -> dict[str, float]:
        """The main figures by name, for a row of a log."""
        figures = {f"{name}_{e.num_models}": getattr(e, name) for e in self.ensembles for name in ("accuracy", "nll")}
        return {**figures, "member_accuracy": self.mean_member_accuracy, "diversity": self.diversity}

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_dict`."""
        return cls(
            tuple(Ensemble(**ensemble) for ensemble in values["ensembles"]),
            tuple(values["member_accuracy"]),
            values["images"],
        )


@torch.inference_mode()
def evaluate(
    model: HNE,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    channels_last: bool = True,
    world: World | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate every ensemble of ``model.prefix_sizes`` on the test images, in one pass.

    Args:
        model: is put into eval mode.
        dataset: its test images and their format.
        batch_size: images at a time in each process.
        channels_last: memory layout of the batches.
        world: the processes that share the work; all get the whole result.
        progress: called with the number of images of every batch done here.
    """
    world = world or World(next(model.parameters()).device)
    model.eval()
    batches = evaluation_batches(
        dataset.test,
        dataset.input,
        batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    return evaluate_members(
        ((model(images if channels_last else images.contiguous()), target) for images, target in batches),
        model.num_models,
        lambda n: model.macs(n, dataset.input.size),
        world,
        progress,
    )


@torch.inference_mode()
def evaluate_members(
    batches: Iterable[tuple[Tensor, Tensor]],
    num_models: int,
    macs: Callable[[int], int],
    world: World,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate the ensembles of 1, 2, 4, ... N members by their logits.

    Args:
        batches: logits of the members ``[N, B, L]`` and classes ``[B]``.
        num_models: N.
        macs: multiply-adds of the first n of them for one image.
        world: the processes, each with batches of its own; all get the whole result.
        progress: called with the number of images of every batch done here.
    """
    sizes = default_sizes(num_models)
    totals = [
        torch.zeros(shape, dtype=torch.float64, device=world.device)
        for shape in ((), (num_models,), (len(sizes), BINS), (len(sizes), len(_FIGURES)))
    ]
    for members, target in batches:
        answers = prefix_mean(members, sizes)
        figures = torch.stack([_figures(members[:n], answer, target) for n, answer in zip(sizes, answers, strict=True)])
        sums: tuple[int | Tensor, ...] = (
            len(target),
            correct(members, target),
            calibration_gaps(answers, target),
            len(target) * figures,
        )
        for total, batch_sum in zip(totals, sums, strict=True):
            total += batch_sum
        if progress is not None:
            progress(len(target))
    count, member_correct, gaps, figures = (world.sum(total).cpu() for total in totals)
    images_done = int(count)
    ece = expected_calibration_error(gaps, images_done)
    return Evaluation(
        tuple(
            Ensemble(
                num_models=n,
                macs=macs(n),
                ece=error,
                **dict(zip(_FIGURES, means, strict=True)),
            )
            for n, error, means in zip(sizes, ece.tolist(), (figures / count).tolist(), strict=True)
        ),
        tuple((member_correct / count).tolist()),
        images_done,
    )


_FIGURES = ("accuracy", "nll", "brier", "diversity", "disagreement", "entropy", "mutual_information")


def _figures(members: Tensor, answer: Tensor, target: Tensor) -> Tensor:
    """The ``_FIGURES`` of one ensemble on a batch: members ``[n, B, L]``, their mean ``[B, L]``."""
    return torch.stack(
        [
            accuracy(answer[None], target)[0],
            negative_log_likelihood(answer[None], target)[0],
            brier_score(answer[None], target)[0],
            diversity(members),
            disagreement(members),
            predictive_entropy(members).mean(),
            mutual_information(members).mean(),
        ]
    ).double()


@dataclass(frozen=True)
class Foreign:
    """The ensemble of the first ``num_models`` leaves on images from outside the distribution it was trained on.

    Attributes:
        num_models: n.
        entropy, mutual_information: as of :class:`Ensemble`, on these images.
        by_entropy, by_mutual_information: how well either tells them from the test images.
    """

    num_models: int
    entropy: float
    mutual_information: float
    by_entropy: Detection
    by_mutual_information: Detection


@torch.inference_mode()
def evaluate_foreign(
    model: HNE,
    dataset: Dataset,
    foreign: Images,
    *,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> tuple[Foreign, ...]:
    """How well the uncertainty of every ensemble of ``model.prefix_sizes`` tells foreign images from the test images.

    Args:
        model: is put into eval mode.
        dataset: its test images and their format.
        foreign: images in that format, see :func:`hne.data.foreign_images`; they are the positive class.
        batch_size: images at a time.
        progress: called with the number of images of every batch.
    """
    model.eval()
    sizes = model.prefix_sizes
    inside, outside = (
        torch.cat([_uncertainty(members, sizes) for members in batches], 2)
        for batches in (
            _members(model, images, dataset.input, batch_size, progress) for images in (dataset.test, foreign)
        )
    )
    return tuple(
        Foreign(n, *outside[i].mean(1).tolist(), *map(detection, inside[i], outside[i])) for i, n in enumerate(sizes)
    )


def _members(
    model: HNE, images: Images, input_format: InputFormat, batch_size: int, progress: Callable[[int], object] | None
) -> Iterator[Tensor]:
    """Logits of the leaves, batch by batch."""
    for batch, _ in evaluation_batches(images, input_format, batch_size, device=next(model.parameters()).device):
        yield model(batch)
        if progress is not None:
            progress(len(batch))


def _uncertainty(members: Tensor, sizes: Sequence[int]) -> Tensor:
    """Predictive entropy and mutual information of every ensemble, ``[P, 2, B]``."""
    return torch.stack(
        [torch.stack([predictive_entropy(y), mutual_information(y)]) for y in (members[:n] for n in sizes)]
    )
