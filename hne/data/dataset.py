"""A data set: training images, test images, and the formats of inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import data

from ..errors import DataError
from .formats import InputFormat, TargetFormat
from .images import Images
from .items import ItemImages, image_shape


@dataclass(frozen=True)
class Dataset:
    """Images to train on, images to test on, and their classes or targets.

    Attributes:
        name: a key of ``DATASETS``, or a name of your own.
        classes: the name of every label; empty for a regression.
        input: the format of a network's input.
        train, test: the two splits.
        target: the normalisation of a regression's targets; None for a classification.
        held_out: share and seed, where the test images were held out from the training images.
    """

    name: str
    classes: tuple[str, ...]
    input: InputFormat
    train: Images
    test: Images
    target: TargetFormat | None = None
    held_out: tuple[float, int] | None = None

    @classmethod
    def from_torch(
        cls,
        train: data.Dataset,
        val: data.Dataset,
        *,
        classes: Sequence[str] | int | None = None,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        transform: Callable[[Tensor], Tensor] | None = None,
        workers: int = 0,
        name: str = "custom",
    ) -> Dataset:
        """Use two map-style data sets of PyTorch, with items ``(image, label)``, for a classification.

        An image is a tensor ``[C, H, W]`` or ``[H, W]``, an array ``[H, W, C]`` or ``[H, W]``, or a PIL image. Values
        of uint8 are scaled to [0, 1], floating-point ones are taken as they are. A label is an integer from 0. The
        images of a batch have one size. See :class:`hne.data.ItemImages` for random numbers.

        Args:
            train, val: the data sets to train on and to test on. Their first items are read.
            classes: names of the classes, or their number; by default the attribute ``classes`` of ``train``.
            mean, std: per channel, to normalise the scaled images.
            transform: a function from one image tensor ``[C, H, W]`` to the changed one, of any size. It is applied to
                each training image before ``mean`` and ``std``, unless the run is one without augmentation.
            workers: processes that read batches in advance; with 0, the training process reads them.
            name: of the data set, in checkpoints and summaries.

        Raises:
            TypeError: a data set is not map-style.
            ValueError: an option does not fit.
            DataError: a data set is empty, or its first item is not as described.
        """
        for role, items in (("train", train), ("val", val)):
            if isinstance(items, data.IterableDataset) or not (
                hasattr(items, "__getitem__") and hasattr(items, "__len__")
            ):
                raise TypeError(
                    f"{role}: expected a map-style data set, with __getitem__ and __len__, got {type(items).__name__}"
                )
            if len(items) == 0:
                raise DataError(f"{role}: expected at least one item, got none")
        if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
            raise ValueError(f"workers: expected a whole number of at least 0, got {workers!r}")
        if transform is not None and not callable(transform):
            raise ValueError(f"transform: expected a function of one image, got {transform!r}")
        names = _class_names(getattr(train, "classes", None) if classes is None else classes)
        channels, height, width = image_shape(val, "val")
        splits = (
            ItemImages(train, "train", channels, len(names), transform, workers),
            ItemImages(val, "val", channels, len(names), None, workers),
        )
        for split in splits:
            split.check()
        input_format = InputFormat(
            channels, (height, width), _per_channel("mean", mean, channels), _per_channel("std", std, channels)
        )
        return cls(name, names, input_format, *splits)

    @property
    def outputs(self) -> int:
        """Outputs that a network needs: one per class; for a regression two, mean and variance."""
        return len(self.classes) if self.target is None else 2

    def to(self, device: torch.device) -> Dataset:
        """Move the images that are in memory to ``device``."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def _class_names(classes: Any) -> tuple[str, ...]:
    if classes is None:
        raise ValueError("classes: expected names or a number, since train has no attribute classes")
    names = [*range(classes)] if isinstance(classes, int) else classes
    if isinstance(names, str) or len(names) < 2:
        raise ValueError(f"classes: expected at least two names, or a number from 2, got {classes!r}")
    return tuple(map(str, names))


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    values = (float(value),) * channels if isinstance(value, int | float) else tuple(map(float, value))
    if len(values) != channels or (name == "std" and min(values) <= 0):
        positive = " above 0" if name == "std" else ""
        raise ValueError(
            f"{name}: expected a number{positive}, or one for each of the {channels} channels, got {value}"
        )
    return values
