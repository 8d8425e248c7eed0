"""Training of a slimmable model: the sandwich rule, and the calibration of its batch norms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..data import Dataset, training_batches
from ..distributed import World
from ..errors import TrainingError
from ..losses import NarrowObjective, Objective
from ..models import HNE
from .config import TrainConfig

RANDOM_WIDTHS = 2  # of each step, between the smallest and the largest (Yu & Huang 2019 train four widths in all)
CALIBRATION_IMAGES = 2048  # few are enough for means and variances; the authors' code takes five batches of 1024
_STEPS = 100  # random widths are multiples of a hundredth


class SandwichStep:
    """A training step by the sandwich rule (Yu & Huang, ICCV 2019): the largest width, the smallest, and
    :data:`RANDOM_WIDTHS` random ones between them.

    The largest width learns the labels. The others learn its predictions (:func:`hne.losses.narrow_objective`). The
    gradients are added, each width after the other, so that the step needs no more memory than one of full width.
    Random widths are drawn from PyTorch's global generator.

    Args:
        model: A slimmable model.
        forward: Calls the model: ``forward(images)`` or ``forward(images, width=w)``.
        objective: Loss of full width, of logits and targets.
        narrow_objective: Loss of the other widths, of their logits and those of full width.
        optimizer: The optimiser. Gradients from before are dropped.
        clip_grad_norm: Scale the gradients down to this norm; None for no clipping.
    """

    def __init__(
        self,
        model: HNE,
        forward: Callable[..., Tensor],
        objective: Objective,
        narrow_objective: NarrowObjective,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float | None = None,
    ) -> None:
        self.model = model
        self._forward = forward
        self._objective, self._narrow_objective = objective, narrow_objective
        self._optimizer = optimizer
        self._clip = clip_grad_norm

    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """Take a step with a batch; return the sum of the losses of all widths, without gradient."""
        self._optimizer.zero_grad()
        logits = self._forward(images)
        loss = self._objective(logits, target)
        loss.backward()
        total, full = loss.detach(), logits.detach()
        for width in self.narrow_widths():
            loss = self._narrow_objective(self._forward(images, width=width), full)
            loss.backward()
            total = total + loss.detach()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        return total

    def narrow_widths(self) -> list[float]:
        """The widths below 1 of a step: the smallest, and different random multiples of a hundredth above it."""
        smallest = self.model.widths[0]
        if smallest == 1:
            return []
        between = [step / _STEPS for step in range(1, _STEPS) if step / _STEPS > smallest]
        order = (between[index] for index in torch.randperm(len(between)).tolist())
        return [smallest, *itertools.islice(filter(self._exists, order), RANDOM_WIDTHS)]

    def _exists(self, width: float) -> bool:
        """Whether the model has this width: with few channels, rounding may give a layer another shortcut."""
        try:
            self.model.skeleton(width)
        except ValueError:
            return False
        return True


def calibrate_widths(model: HNE, dataset: Dataset, batch_size: int, seed: int, *, augment: bool) -> None:
    """Compute the batch-norm statistics of all widths from :data:`CALIBRATION_IMAGES` training images at least, as far
    as there are so many.

    The images, their order and augmentation follow from ``seed`` alone, so that a resumed run has the same statistics.
    Arguments as of :func:`hne.data.training_batches`.
    """

    def batches() -> Iterator[Tensor]:
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        seen = 0
        for images, _ in training_batches(
            dataset.train, dataset.input, batch_size, generator, augment=augment, device=device
        ):
            yield images
            seen += len(images)
            if seen >= CALIBRATION_IMAGES:
                break

    with torch.random.fork_rng(devices=[]):  # images of a data set of its own may draw from the global generator
        torch.manual_seed(seed)
        model.calibrate_widths_(batches())


def check_slimmable(config: TrainConfig, dataset: Dataset, world: World) -> None:
    """Raise unless a slimmable model can be trained.

    Raises:
        TrainingError: It cannot, with this data set, several processes, or CUDA graphs.
    """
    if dataset.target is not None:
        raise TrainingError(f"widths: smaller widths learn probabilities, which {dataset.name} as a regression has not")
    if world.size > 1:
        raise TrainingError(f"widths: expected one process, got {world.size}")
    if config.cuda_graph:
        raise TrainingError("cuda_graph: expected False with widths, as each step has other ones")
