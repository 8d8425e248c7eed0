"""Quality and cost of the ensembles of a regression: every member predicts a Gaussian, an ensemble is their mixture.

``prefix_logits`` and ``anytime`` of a model average its outputs ``[N, B, 2]``. That gives the mean of the mixture,
but not its variance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from ..distributed import World
from ..losses import gaussians
from ..metrics import (
    LEVELS,
    coverage_counts,
    coverage_error,
    gaussian_nll,
    prefix_gaussians,
)
from ..models import HNE, QuantizedHNE
from .predict import finite, predict


@dataclass(frozen=True)
class RegressionMetrics:
    """Metrics of the mixture of the first ``num_models`` members, in the units of the target.

    Attributes:
        num_models: n, the ensemble size.
        macs: multiply-adds for one sample.
        rmse: root mean squared error.
        nll: mean negative log-likelihood under the Gaussian with the mixture's mean and variance, in nats.
        diversity: population standard deviation of the members' means, averaged over the samples.
        coverage_error: mean distance between the share of the targets inside a central interval and its probability,
            over intervals of 5, 10, ... 95 %, 0 to 0.5.
    """

    num_models: int
    macs: int
    rmse: float
    nll: float
    diversity: float
    coverage_error: float | None = None  # which files of earlier versions do not have


@dataclass(frozen=True)
class RegressionEvaluation:
    """Metrics of a network on a regression data set.

    Attributes:
        ensembles: by rising size.
        member_rmse: of every member by itself.
        samples: number of samples.
    """

    ensembles: tuple[RegressionMetrics, ...]
    member_rmse: tuple[float, ...]
    samples: int

    @property
    def mean_member_rmse(self) -> float:
        """RMSE of a member by itself, averaged over the members."""
        return sum(self.member_rmse) / len(self.member_rmse)

    def columns(self) -> dict[str, float]:
        """Return the main metrics by name, for a row of a log."""
        metrics = {f"{name}_{e.num_models}": getattr(e, name) for e in self.ensembles for name in ("rmse", "nll")}
        return {**metrics, "member_rmse": self.mean_member_rmse, "diversity": self.ensembles[-1].diversity}

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RegressionEvaluation:
        """Invert :meth:`to_dict`."""
        ensembles = tuple(RegressionMetrics(**ensemble) for ensemble in values["ensembles"])
        return cls(ensembles, tuple(values["member_rmse"]), values["samples"])


@torch.inference_mode()
def evaluate_regression(
    model: HNE | QuantizedHNE,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    channels_last: bool = True,
    world: World | None = None,
    progress: Callable[[int], object] | None = None,
) -> RegressionEvaluation:
    """Evaluate every ensemble of ``model.prefix_sizes`` on the test samples, as :func:`evaluate` does."""
    world = world or World(next(model.parameters()).device)
    sizes = model.prefix_sizes
    count = torch.zeros((), dtype=torch.float64, device=world.device)
    squares = count.new_zeros(model.num_models)  # squared errors of the members
    metrics = count.new_zeros(len(sizes), 3)
    covered = count.new_zeros(len(sizes), len(LEVELS))
    for outputs, target in predict(
        model, dataset.test, dataset.input, batch_size, channels_last=channels_last, world=world, progress=progress
    ):
        mean, variance = in_target_units(outputs, dataset)
        squares += (mean - target).square().sum(1)
        center, spread = prefix_gaussians(mean, variance, sizes)
        metrics += torch.stack(
            [
                (center - target).square().sum(1),
                len(target) * gaussian_nll(center, spread, target),
                mean_deviations(mean, sizes).sum(1),
            ],
            1,
        )
        covered += coverage_counts(center, spread, target)
        count += len(target)
    samples, squares, metrics, covered = (world.sum(total).cpu() for total in (count, squares, metrics, covered))
    errors = coverage_error(covered, int(samples)).tolist()
    return finite(
        RegressionEvaluation(
            tuple(
                RegressionMetrics(n, model.macs(n, dataset.input.size), square**0.5, nll, diversity, error)
                for n, (square, nll, diversity), error in zip(sizes, (metrics / samples).tolist(), errors, strict=True)
            ),
            tuple((squares / samples).sqrt().tolist()),
            int(samples),
        )
    )


def mean_deviations(mean: Tensor, sizes: Sequence[int]) -> Tensor:
    """Population standard deviation of the first n members' means ``[N, B]``, for each size: ``[P, B]``."""
    return torch.stack([mean[:n].std(0, correction=0) for n in sizes])


def in_target_units(outputs: Tensor, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[...]`` in the units of the target, from a model's outputs ``[..., 2]``."""
    assert dataset.target is not None
    mean, variance = gaussians(outputs)
    return mean * dataset.target.std + dataset.target.mean, variance * dataset.target.std**2
