"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .cifar import cifar10, cifar100
from .dataset import Dataset
from .diabetes import diabetes
from .digits import digits
from .fashion_mnist import fashion_mnist
from .folder import folder
from .held_out import hold_out_images
from .imagenet import imagenet
from .images import Images

DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "folder": folder,
    "diabetes": diabetes,
}

RESIZABLE = ("imagenet", "folder")


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    image_size: int | None = None,
    val_share: float | None = None,
    split_seed: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Dataset:
    """Load a data set.

    Args:
        name: one of ``DATASETS``.
        data_dir: folder of its files; by default ``$HNE_DATA`` and the folders of system packages are searched.
        image_size: height and width in pixels, for ``imagenet`` and ``folder`` (default 224).
        val_share: test on this share of the training images of each class, which are then not trained on, in place of
            the test images; a ``folder`` without test images has 0.1 by default.
        split_seed: chooses these images (default 0).
        limit_train, limit_test: use only this many images, a random but fixed selection.

    Raises:
        ValueError: the name is unknown, an option is out of range, or the data set does not have it.
        DataError: files are missing, truncated or damaged. Image files are opened, yet not decoded: an image
            damaged further on is found when its batch is made.
    """
    if name not in DATASETS:
        raise ValueError(f"data: expected one of {', '.join(DATASETS)}, got {name!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    options: dict[str, Any] = {"image_size": image_size}
    if name == "folder":  # splits its list of files
        options |= {"val_share": val_share, "split_seed": split_seed}
    elif split_seed is not None and val_share is None:
        raise ValueError("split_seed: chooses the images that are held out, which needs val_share, too")
    given = {option: value for option, value in options.items() if value is not None}
    if image_size is not None and name not in RESIZABLE:
        raise ValueError(f"image_size: the images of {name} have one size; only imagenet and folder can be resized")
    dataset = DATASETS[name](data_dir, **given)
    if val_share is not None and name != "folder":
        dataset = hold_out_images(dataset, val_share, split_seed or 0)
    dataset = replace(
        dataset,
        train=limit_images("limit_train", dataset.train, limit_train),
        test=limit_images("limit_test", dataset.test, limit_test),
    )
    for split in (dataset.train, dataset.test):
        split.check()
    return dataset


def limit_images(name: str, split: Images, limit: int | None) -> Images:
    """Select ``limit`` images of a split, random but always the same; ``name`` is the option in the error text."""
    if limit is None:
        return split
    if limit < 1:
        raise ValueError(f"{name}: expected at least 1, got {limit}")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split.subset(order[:limit].sort().values)
