"""A data set: training images, test images, and the formats of inputs and targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .formats import InputFormat, TargetFormat
from .images import Images


@dataclass(frozen=True)
class Dataset:
    """Images to train on, images to test on, and their classes or targets.

    Attributes:
        name: a key of ``DATASETS``.
        classes: the name of every label; empty for a regression.
        input: the format of a network's input.
        train, test: the two splits.
        target: the normalisation of a regression's targets; None for a classification.
    """

    name: str
    classes: tuple[str, ...]
    input: InputFormat
    train: Images
    test: Images
    target: TargetFormat | None = None

    @property
    def outputs(self) -> int:
        """Outputs that a network needs: one per class; for a regression two, mean and variance."""
        return len(self.classes) if self.target is None else 2

    def to(self, device: torch.device) -> Dataset:
        """Move the images that are in memory to ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))
