"""Quality and cost of each exit of a network with early exits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..data import Dataset
from ..distributed import World
from ..rivals import EarlyExitNetwork
from .classification import EnsembleTotals, Evaluation
from .predict import predict


@torch.inference_mode()
def evaluate_exits(
    model: EarlyExitNetwork,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    channels_last: bool = True,
    world: World | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Evaluate every exit by itself on the test images, in one pass.

    Args:
        model: is put into eval mode.
        dataset: provides the test images and their format.
        batch_size, channels_last, world, progress: as for :func:`evaluate`.

    Returns:
        An evaluation whose ensembles are the exits: ``num_models`` is the number of the exit, from 1.

    Raises:
        ResultError: a metric is NaN or infinite.
    """
    world = world or World(next(model.parameters()).device)
    totals = [EnsembleTotals(1, device=world.device) for _ in range(model.num_models)]
    for exits, target in predict(
        model, dataset.test, dataset.input, batch_size, channels_last=channels_last, world=world
    ):
        for total, logits in zip(totals, exits, strict=True):
            total.add(logits[None], target)
        if progress is not None:
            progress(len(target))

    def macs(exits: int) -> Callable[[int], int]:
        return lambda _: model.macs(exits, dataset.input.size)

    by_exit = [total.evaluation(macs(number), world) for number, total in enumerate(totals, 1)]
    return Evaluation(
        tuple(replace(exit.ensembles[0], num_models=number) for number, exit in enumerate(by_exit, 1)),
        tuple(exit.ensembles[0].accuracy for exit in by_exit),
        by_exit[0].images,
    )
