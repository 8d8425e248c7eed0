"""Out-of-distribution (OOD) data: images of another data set in the input format of a trained network, and measurements
that are unlike the test samples of a regression."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .dataset import Dataset
from .folder import image_files
from .formats import InputFormat
from .images import FileImages, Images, MemoryImages
from .registry import DATASETS, limit_images, load_dataset


def ood_images(
    source: str | Path, input_format: InputFormat, data_dir: str | Path | None = None, *, limit: int | None = None
) -> Images:
    """Load the test images of another data set, or the images in a folder, in the format ``input_format``.

    They are converted to grey or RGB and resized as ``input_format`` reads images for evaluation. A batch is normalised
    by the mean and the standard deviation of ``input_format``. The labels mean nothing to the network.

    Args:
        source: one of ``DATASETS``, or a folder.
        input_format: the format to convert to.
        data_dir: folder of the data set's files, as for :func:`load_dataset`.
        limit: use only this many images, a random but fixed selection.

    Raises:
        DataError: the folder is missing or has no images, a file in it is no image, the data set has no images, or its
            files are missing or damaged.
        ValueError: ``limit`` is below 1.
    """
    if source not in DATASETS:
        paths = tuple(map(str, image_files(source)))
        files = FileImages(paths, torch.zeros(len(paths), dtype=torch.long), input_format, os.cpu_count() or 1)
        selected = limit_images("limit", files, limit)
        selected.check()
        return selected
    dataset = load_dataset(str(source), data_dir, limit_test=limit)
    if dataset.target is not None:
        raise DataError(f"{source}: expected images, but this data set has none")
    images = dataset.test
    if isinstance(images, FileImages):
        return replace(images, input=input_format)
    assert isinstance(images, MemoryImages)  # data sets by name have no items of PyTorch
    return MemoryImages(_convert(images, input_format), images.labels)


def ood_samples(source: str, dataset: Dataset, *, seed: int = 0) -> Images:
    """Make out-of-distribution samples from the test samples of measurements, as those of a regression.

    Args:
        source: One of :data:`OOD_SAMPLES`: "permuted" takes each measurement of a sample from another test sample, so
            that each by itself is usual and their combination is not; "scaled" triples the distance of each
            measurement from its mean over the training samples.
        dataset: The data set of the measurements.
        seed: Of the permutations.

    Returns:
        As many samples as there are test samples, in their format. The labels mean nothing to the network.

    Raises:
        ValueError: ``source`` is unknown.
        DataError: The data set has images, not measurements.
    """
    if source not in OOD_SAMPLES:
        raise ValueError(
            f"out-of-distribution samples: expected {' or '.join(OOD_SAMPLES)} for {dataset.name}, got {source!r}"
        )
    test = dataset.test
    if not isinstance(test, MemoryImages) or dataset.target is None:
        raise DataError(f"{dataset.name}: expected measurements, but this data set has images")
    return replace(test, images=OOD_SAMPLES[source](test.images, dataset.input, seed))


def _permuted(samples: torch.Tensor, input_format: InputFormat, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(len(samples), generator=generator) for _ in input_format.mean], 1)
    return samples.gather(0, order[:, None, None].to(samples.device))


def _scaled(samples: torch.Tensor, input_format: InputFormat, seed: int) -> torch.Tensor:
    mean = torch.tensor(input_format.mean, device=samples.device)
    return mean + 3 * (samples - mean)


OOD_SAMPLES: dict[str, Callable[[torch.Tensor, InputFormat, int], torch.Tensor]] = {
    "permuted": _permuted,
    "scaled": _scaled,
}
"""Kinds of out-of-distribution samples that :func:`ood_samples` makes of measurements."""


def _convert(split: MemoryImages, input_format: InputFormat) -> torch.Tensor:
    """Convert images to ``input_format``, uint8 ``[N, H, W, C]``."""
    images = split.images.numpy()
    images = images[..., 0] if images.shape[-1] == 1 else images  # Pillow has no channel dimension in grey images
    return torch.from_numpy(np.stack([input_format.fit(Image.fromarray(image)) for image in images]))
