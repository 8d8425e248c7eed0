"""Images of another data set, in the format that a network was trained on: to be told from its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import DataError
from .dataset import FileImages, Images, InputFormat, MemoryImages
from .folder import image_files
from .registry import DATASETS, limited, load_dataset


def foreign_images(
    source: str | Path, input_format: InputFormat, data_dir: str | Path | None = None, *, limit: int | None = None
) -> Images:
    """The test images of a data set, or the pictures in a folder, as inputs of another format.

    They are made grey or RGB and resized as ``input_format`` reads pictures for evaluation, and will be normalised by
    its mean and deviation. Their labels mean nothing to the network.

    Args:
        source: one of ``DATASETS``, or a folder.
        input_format: what they become.
        data_dir: folder of the data set's files, as of :func:`load_dataset`.
        limit: use only so many, picked at random but always the same ones.

    Raises:
        DataError: no such folder, no pictures in it, or the data set has none, or its files are missing or damaged.
        ValueError: ``limit`` is below 1.
    """
    if source not in DATASETS:
        paths = tuple(map(str, image_files(source)))
        files = FileImages(paths, torch.zeros(len(paths), dtype=torch.long), input_format, os.cpu_count() or 1)
        return limited("limit", files, limit)
    dataset = load_dataset(str(source), data_dir, limit_test=limit)
    if dataset.target is not None:
        raise DataError(f"{source}: expected images, which this data set has not")
    images = dataset.test
    if isinstance(images, FileImages):
        return replace(images, input=input_format)
    return MemoryImages(_converted(images, input_format), images.labels)


def _converted(split: MemoryImages, input_format: InputFormat) -> torch.Tensor:
    """uint8 [N, H, W, C] in the new format."""
    pictures = split.images.numpy()
    pictures = pictures[..., 0] if pictures.shape[-1] == 1 else pictures  # as Pillow has grey ones
    return torch.from_numpy(np.stack([input_format.fit(Image.fromarray(picture)) for picture in pictures]))
