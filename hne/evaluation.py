"""How good the ensembles of 1, 2, 4, ... N models are on a data set, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hne_kernels import prefix_mean

from .data import Dataset, evaluation_batches
from .distributed import World
from .metrics import correct, diversity
from .model import HNE


@dataclass(frozen=True)
class Ensemble:
    """The ensemble of the first ``num_models`` leaves.

    Attributes:
        num_models: n.
        macs: multiply-adds for one image.
        accuracy: share of the images whose class it names, 0 to 1.
        nll: mean negative log-likelihood of the right class, in nats.
    """

    num_models: int
    macs: int
    accuracy: float
    nll: float


@dataclass(frozen=True)
class Evaluation:
    """A network on a data set.

    Attributes:
        ensembles: by rising size.
        member_accuracy: of every leaf by itself, 0 to 1.
        diversity: standard deviation of the logits over the leaves, averaged over classes and
            images.
        images: number of images.
    """

    ensembles: tuple[Ensemble, ...]
    member_accuracy: tuple[float, ...]
    diversity: float
    images: int

    @property
    def mean_member_accuracy(self) -> float:
        """Accuracy of a leaf by itself, averaged over the leaves."""
        return sum(self.member_accuracy) / len(self.member_accuracy)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_dict`."""
        return cls(
            tuple(Ensemble(**ensemble) for ensemble in values["ensembles"]),
            tuple(values["member_accuracy"]),
            values["diversity"],
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
    sizes, leaves = list(model.prefix_sizes), model.num_models
    widths = (1, 1, leaves, len(sizes), len(sizes))
    totals = torch.zeros(sum(widths), dtype=torch.float64, device=world.device)
    for images, target in evaluation_batches(
        dataset.test,
        dataset.input,
        batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    ):
        members = model(images if channels_last else images.contiguous())
        prefixes = prefix_mean(members, sizes)
        totals += torch.cat(
            [
                totals.new_full((1,), len(target)),
                len(target) * diversity(members)[None],
                correct(members, target),
                correct(prefixes, target),
                torch.stack([F.cross_entropy(y, target, reduction="sum") for y in prefixes]),
            ]
        )
        if progress is not None:
            progress(len(target))
    images, *sums = world.sum(totals).cpu().split(widths)
    deviation, member_accuracy, accuracy, nll = (total / images for total in sums)
    macs = [model.macs(n, dataset.input.size) for n in sizes]
    return Evaluation(
        tuple(map(Ensemble, sizes, macs, accuracy.tolist(), nll.tolist())),
        tuple(member_accuracy.tolist()),
        deviation.item(),
        int(images),
    )
