"""Detection of out-of-distribution (OOD) images by the uncertainty of an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hne_kernels import default_sizes

from ..averages import AVERAGES, check_average
from ..data import Dataset, Images
from ..metrics import Detection, detection, energy, max_logit, max_probability, mutual_information, predictive_entropy
from .predict import Ensemble, finite, predict


@dataclass(frozen=True)
class OODEvaluation:
    """Uncertainty of the ensemble of the first ``num_models`` members about out-of-distribution images.

    Attributes:
        num_models: n, the ensemble size.
        entropy: mean predictive entropy on these images, in nats.
        mutual_information: mean mutual information on these images, in nats.
        by_entropy: detection of these images among the test images by their entropy.
        by_mutual_information: detection by their mutual information.
        by_max_probability: detection by the ensemble's largest probability, see :func:`hne.metrics.max_probability`.
        by_max_logit, by_energy: detection by scores of the mean logits, see :func:`hne.metrics.max_logit` and
            :func:`hne.metrics.energy`.
    """

    num_models: int
    entropy: float
    mutual_information: float
    by_entropy: Detection
    by_mutual_information: Detection
    by_max_probability: Detection
    by_max_logit: Detection
    by_energy: Detection


@torch.inference_mode()
def evaluate_ood(
    model: Ensemble,
    dataset: Dataset,
    ood_images: Images,
    *,
    sizes: Sequence[int] | None = None,
    average: str = "logits",
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> tuple[OODEvaluation, ...]:
    """Measure how well the uncertainty of the first n members separates OOD images from test images.

    Args:
        model: is put into eval mode.
        dataset: provides the test images and their format.
        ood_images: images in that format, see :func:`hne.data.ood_images`; they are the positive class.
        sizes: the ensemble sizes n, rising; by default the powers of two below N, then N.
        average: what an ensemble averages for its largest probability, a name of :data:`hne.averages.AVERAGES`. The
            largest logit and the energy are those of the mean logits in any case: probabilities have neither.
        batch_size: images at a time.
        progress: called with the size of every batch that was evaluated.

    Raises:
        ValueError: ``average`` is unknown.
        ResultError: a result is NaN or infinite.
    """
    check_average(average)
    sizes = default_sizes(model.num_models) if sizes is None else sizes
    inside, outside = (
        torch.cat(
            [
                _scores(members, sizes, average)
                for members, _ in predict(model, images, dataset.input, batch_size, progress=progress)
            ],
            2,
        )
        for images in (dataset.test, ood_images)
    )
    return tuple(
        finite(OODEvaluation(n, *outside[i, :2].mean(1).tolist(), *map(detection, inside[i], outside[i])))
        for i, n in enumerate(sizes)
    )


def _scores(members: Tensor, sizes: Sequence[int], average: str) -> Tensor:
    """The scores of every ensemble in the order of :class:`OODEvaluation`, ``[P, 5, B]``."""
    scores = []
    for n, ensemble in zip(sizes, AVERAGES[average](members, sizes), strict=True):
        first, mean = members[:n], members[:n].mean(0)
        of_members = [predictive_entropy(first), mutual_information(first)]
        scores.append(torch.stack([*of_members, max_probability(ensemble), max_logit(mean), energy(mean)]))
    return torch.stack(scores)
