"""Detection of out-of-distribution (OOD) samples of a regression by the spread of what an ensemble predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import Dataset, Images, Split
from ..metrics import Detection, detection, prefix_gaussians
from ..models import HNE, QuantizedHNE
from .predict import finite, predict
from .regression import in_target_units, mean_deviations


@dataclass(frozen=True)
class RegressionOODEvaluation:
    """Uncertainty of the first ``num_models`` members about out-of-distribution samples, in the units of the target.

    Attributes:
        num_models: n, the ensemble size.
        deviation: standard deviation of the mixture, averaged over these samples.
        diversity: population standard deviation of the members' means, averaged over these samples.
        by_deviation: detection of these samples among the test samples by the standard deviation of the mixture, the
            total uncertainty.
        by_diversity: detection by the standard deviation of the members' means, the epistemic uncertainty.
    """

    num_models: int
    deviation: float
    diversity: float
    by_deviation: Detection
    by_diversity: Detection


@torch.inference_mode()
def evaluate_regression_ood(
    model: HNE | QuantizedHNE,
    dataset: Dataset,
    ood_samples: Images,
    *,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> tuple[RegressionOODEvaluation, ...]:
    """Measure how well the uncertainty of every ensemble separates OOD samples from test samples.

    Args:
        model: is put into eval mode.
        dataset: provides the test samples, their format and the units of the target.
        ood_samples: samples in that format, see :func:`hne.data.ood_samples`; they are the positive class.
        batch_size: samples at a time.
        progress: called with the size of every batch that was evaluated.

    Raises:
        ResultError: a result is NaN or infinite.
    """
    sizes = model.prefix_sizes

    def scores(samples: Split) -> Tensor:
        """Both scores of every ensemble, ``[2, P, samples]``."""
        batches = []
        for outputs, _ in predict(model, samples, dataset.input, batch_size, progress=progress):
            mean, variance = in_target_units(outputs, dataset)
            batches.append(
                torch.stack([prefix_gaussians(mean, variance, sizes)[1].sqrt(), mean_deviations(mean, sizes)])
            )
        return torch.cat(batches, 2)

    inside, outside = scores(dataset.test), scores(ood_samples)
    return tuple(
        finite(
            RegressionOODEvaluation(n, *outside[:, i].mean(1).tolist(), *map(detection, inside[:, i], outside[:, i]))
        )
        for i, n in enumerate(sizes)
    )
