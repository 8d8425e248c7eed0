"""Detection of out-of-distribution (OOD) images by the uncertainty of an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hne_kernels import default_sizes

from ..data import Dataset, Images
from ..metrics import Detection, detection, mutual_information, predictive_entropy
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
    """

    num_models: int
    entropy: float
    mutual_information: float
    by_entropy: Detection
    by_mutual_information: Detection


@torch.inference_mode()
def evaluate_ood(
    model: Ensemble,
    dataset: Dataset,
    ood_images: Images,
    *,
    sizes: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> tuple[OODEvaluation, ...]:
    """Measure how well the uncertainty of the first n members separates OOD images from test images.

    Args:
        model: is put into eval mode.
        dataset: provides the test images and their format.
        ood_images: images in that format, see :func:`hne.data.ood_images`; they are the positive class.
        sizes: the ensemble sizes n, rising; by default the powers of two below N, then N.
        batch_size: images at a time.
        progress: called with the size of every batch that was evaluated.

    Raises:
        ResultError: a result is NaN or infinite.
    """
    sizes = default_sizes(model.num_models) if sizes is None else sizes
    inside, outside = (
        torch.cat(
            [
                _uncertainty(members, sizes)
                for members, _ in predict(model, images, dataset.input, batch_size, progress=progress)
            ],
            2,
        )
        for images in (dataset.test, ood_images)
    )
    return tuple(
        finite(OODEvaluation(n, *outside[i].mean(1).tolist(), *map(detection, inside[i], outside[i])))
        for i, n in enumerate(sizes)
    )


def _uncertainty(members: Tensor, sizes: Sequence[int]) -> Tensor:
    """Predictive entropy and mutual information of every ensemble, ``[P, 2, B]``."""
    return torch.stack(
        [torch.stack([predictive_entropy(y), mutual_information(y)]) for y in (members[:n] for n in sizes)]
    )
