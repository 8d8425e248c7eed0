"""Regression: every leaf predicts a Gaussian, and an ensemble is the mixture of its leaves.

A model has two outputs, and so has every leaf of ``model(x)``, ``[N, B, 2]``: see :func:`gaussians`. Its
``prefix_logits`` and ``anytime`` average the outputs, which gives the mean of the mixture, but not its variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import Dataset, TargetFormat, evaluation_batches
from ..distributed import World
from ..metrics import gaussian_nll, mixture
from ..models.hne import HNE

_LEAST_VARIANCE = 1e-4  # of a target with variance 1: certainty would make the likelihood infinite


def gaussians(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[...]`` of the normalised target from outputs ``[..., 2]``; in float32 at least."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return outputs[..., 0], F.softplus(outputs[..., 1]) + _LEAST_VARIANCE


def likelihood_objective(target_format: TargetFormat) -> Callable[[Tensor, Tensor], Tensor]:
    """``L_I`` (eq. 9) for a regression: the negative log-likelihood of every leaf, summed over the leaves.

    Returns:
        A function from outputs ``[N, B, 2]`` and targets ``[B]`` to a scalar.
    """

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return gaussian_nll(*gaussians(outputs), target_format.normalise(target)).sum()

    return loss


def gaussian_divergence(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Hydra's objective for a regression: KL(member i || head i) of Gaussians, mean over heads and batch.

    Args:
        student, teacher: Mean and variance ``[N, B]``, as of :func:`gaussians`.

    Returns:
        Scalar, 0 where the heads are their members.
    """
    (mean, variance), (wanted_mean, wanted_variance) = student, teacher
    ratio = wanted_variance / variance
    return ((ratio - ratio.log() - 1 + (wanted_mean - mean).square() / variance) / 2).mean()


@dataclass(frozen=True)
class RegressionEnsemble:
    """The mixture of the first ``num_models`` leaves, in the units of the target.

    Attributes:
        num_models: n.
        macs: multiply-adds for one sample.
        rmse: root mean squared error.
        nll: mean negative log-likelihood under the Gaussian with the mixture's mean and variance, in nats.
        diversity: standard deviation of the leaves' means, averaged over the samples.
    """

    num_models: int
    macs: int
    rmse: float
    nll: float
    diversity: float


@dataclass(frozen=True)
class RegressionEvaluation:
    """A network on a data set.

    Attributes:
        ensembles: by rising size.
        member_rmse: of every leaf by itself.
        samples: number of samples.
    """

    ensembles: tuple[RegressionEnsemble, ...]
    member_rmse: tuple[float, ...]
    samples: int

    @property
    def mean_member_rmse(self) -> float:
        """RMSE of a leaf by itself, averaged over the leaves."""
        return sum(self.member_rmse) / len(self.member_rmse)

    def columns(self) -> dict[str, float]:
        """The main figures by name, for a row of a log."""
        figures = {f"{name}_{e.num_models}": getattr(e, name) for e in self.ensembles for name in ("rmse", "nll")}
        return {**figures, "member_rmse": self.mean_member_rmse, "diversity": self.ensembles[-1].diversity}

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RegressionEvaluation:
        """The inverse of :meth:`to_dict`."""
        ensembles = tuple(RegressionEnsemble(**ensemble) for ensemble in values["ensembles"])
        return cls(ensembles, tuple(values["member_rmse"]), values["samples"])


@torch.inference_mode()
def evaluate_regression(
    model: HNE,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    channels_last: bool = True,
    world: World | None = None,
    progress: Callable[[int], object] | None = None,
) -> RegressionEvaluation:
    """Evaluate every ensemble of ``model.prefix_sizes`` on the test samples: as :func:`hne.evaluation.evaluate`."""
    world = world or World(next(model.parameters()).device)
    model.eval()
    sizes = model.prefix_sizes
    count = torch.zeros((), dtype=torch.float64, device=world.device)
    squares = count.new_zeros(model.num_models)  # of the leaves' errors
    figures = count.new_zeros(len(sizes), 3)
    for inputs, target in evaluation_batches(
        dataset.test, dataset.input, batch_size, rank=world.rank, world_size=world.size, device=world.device
    ):
        outputs = model(inputs if channels_last else inputs.contiguous())
        mean, variance = in_units(outputs, dataset)
        squares += (mean - target).square().sum(1)
        for row, n in zip(figures, sizes, strict=True):
            centre, spread = mixture(mean[:n], variance[:n])
            row += torch.stack(
                [
                    (centre - target).square().sum(),
                    len(target) * gaussian_nll(centre, spread, target),
                    mean[:n].std(0, correction=0).sum(),
                ]
            )
        count += len(target)
        if progress is not None:
            progress(len(target))
    samples, squares, figures = (world.sum(total).cpu() for total in (count, squares, figures))
    return RegressionEvaluation(
        tuple(
            RegressionEnsemble(n, model.macs(n, dataset.input.size), square**0.5, nll, diversity)
            for n, (square, nll, diversity) in zip(sizes, (figures / samples).tolist(), strict=True)
        ),
        tuple((squares / samples).sqrt().tolist()),
        int(samples),
    )


def in_units(outputs: Tensor, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[...]`` in the units of the target, from a model's outputs ``[..., 2]``."""
    assert dataset.target is not None
    mean, variance = gaussians(outputs)
    return mean * dataset.target.std + dataset.target.mean, variance * dataset.target.std**2
