"""Measured times of the systems of a study."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Dataset
from ..models import HNE, checkpoint
from ..training import CHECKPOINT, TrainConfig
from .comparison import first_images, median_milliseconds
from .results import PanelResult, Result
from .runs import run_name


def load_run(folder: Path, config: TrainConfig, dataset: Dataset) -> nn.Module:
    """The model of a finished run, in eval mode.

    Raises:
        CheckpointError: There is no checkpoint, or it does not fit.
    """
    path = folder / run_name(config) / CHECKPOINT
    tensors, _ = checkpoint.load(path)
    model: nn.Module = config.build_model(dataset)
    checkpoint.restore_model(model, tensors, path)
    return model.eval()


def with_times(
    panels: tuple[PanelResult, ...], folder: Path, dataset: Dataset, *, rounds: int, min_seconds: float = 0.01
) -> tuple[PanelResult, ...]:
    """The results together with ``milliseconds``: the median time of a call for one image on the CPU.

    All calls of a panel take turns. A call gives the answer of the first n members, or of exit n and those before it.
    The models are those of the first finished seed.

    Args:
        panels: The results.
        folder: The folder of the runs.
        dataset: Its first test image is the input.
        rounds, min_seconds: as for :func:`hne.evaluation.alternating_seconds`.
    """
    return tuple(_with_times(panel, folder, dataset, rounds, min_seconds) for panel in panels)


def _with_times(panel: PanelResult, folder: Path, dataset: Dataset, rounds: int, min_seconds: float) -> PanelResult:
    image = first_images(dataset, 1)
    models: dict[TrainConfig, nn.Module] = {}  # widths of a slimmable model share it
    calls = []
    for result in panel.results:
        if result.config not in models:
            models[result.config] = load_run(folder, result.config, dataset)
        width = result.evaluations[0].width
        calls.append([functools.partial(_answer, models[result.config], image, n, width) for n in result.sizes])
    times = iter(median_milliseconds(calls, rounds, min_seconds))

    def timed(result: Result) -> Result:
        return replace(result, more={**result.more, "milliseconds": next(times)})

    curves = [replace(curve, results=tuple(map(timed, curve.results))) for curve in panel.curves]
    return PanelResult(panel.scale, tuple(curves))


@torch.inference_mode()
def _answer(model: Any, image: Tensor, n: int, width: float) -> Tensor:
    """The mean logits of the first n members at a width, or the logits of exit n."""
    if not isinstance(model, HNE):
        logits: Tensor = model(image, n)
        return logits[-1]
    mean: Tensor = model.prefix_logits(image, (n,), width=width)[0]
    return mean
