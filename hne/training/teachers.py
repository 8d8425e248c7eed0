"""Teachers of a distillation: an ensemble that sees every batch, or outputs that are known in advance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data import Dataset, Images, InputFormat, evaluation_batches
from ..errors import DataError
from ..files import utf8_path
from ..models import HNE

Teacher = Callable[[Tensor, Tensor], Tensor]
"""Maps a batch of images and their indices in the training set ``[B]`` to the members' outputs ``[N, B, L]``."""


def online_teacher(model: HNE) -> Teacher:
    """A teacher that evaluates ``model`` on every batch as it was augmented. Puts ``model`` into eval mode."""
    model.eval()

    @torch.no_grad()
    def teacher(images: Tensor, indices: Tensor) -> Tensor:
        return model(images)

    return teacher


def tabulated_teacher(outputs: Tensor) -> Teacher:
    """A teacher that looks its outputs up in a table.

    Args:
        outputs: Outputs for all training images in order, ``[N, images, L]``. The images must not be augmented.
    """
    return lambda images, indices: outputs[:, indices]


@torch.no_grad()
def member_outputs(
    model: HNE,
    split: Images,
    input_format: InputFormat,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Outputs of all members for all images of a split, without augmentation.

    Args:
        model: The ensemble. It is put into eval mode.
        split: The images.
        input_format: Their format.
        batch_size: Images per batch.
        progress: Called after each batch with its number of images.

    Returns:
        Outputs ``[N, images, L]``.
    """
    model.eval()
    outputs = []
    for images, _ in evaluation_batches(split, input_format, batch_size, device=next(model.parameters()).device):
        outputs.append(model(images))
        if progress is not None:
            progress(len(images))
    return torch.cat(outputs, 1)


def read_outputs(path: Path) -> dict[str, Tensor]:
    """Read the outputs of an ensemble's members from a file.

    Args:
        path: A safetensors file with an array ``train`` and optionally ``test``, or a NumPy file (.npy) with the array
            ``train`` alone. Arrays are floating-point, ``[N, images, L]``.

    Returns:
        The arrays in float32, by name.

    Raises:
        DataError: The file is of another kind, or an array has another shape or dtype, or is not finite.
    """
    try:
        if path.suffix == ".npy":
            found = {"train": torch.from_numpy(np.load(path, allow_pickle=False))}
        else:
            with utf8_path(path) as readable:
                found = load_file(readable)
    except (OSError, ValueError, TypeError, EOFError, MemoryError, BadZipFile, SafetensorError) as error:
        raise DataError(f"{path}: not a NumPy or safetensors file of outputs ({error})") from error
    if "train" not in found or not found.keys() <= {"train", "test"}:
        raise DataError(f"{path}: expected an array train, and perhaps test, found {', '.join(found) or 'none'}")
    for name, outputs in found.items():
        prefix = f"{path}: {name}: expected finite floating-point numbers [members, images, classes], found"
        if outputs.dim() != 3 or not outputs.is_floating_point():
            raise DataError(f"{prefix} {outputs.dtype} {tuple(outputs.shape)}")
        if not outputs.isfinite().all():
            raise DataError(f"{prefix} NaN or infinity")
    if len({outputs.shape[::2] for outputs in found.values()}) != 1:
        raise DataError(f"{path}: train and test are not of the same members and classes")
    return {name: outputs.float() for name, outputs in found.items()}


def check_outputs(path: Path, found: dict[str, Tensor], dataset: Dataset) -> None:
    """Check that outputs fit a data set.

    Args:
        path: The file of the outputs, for the message.
        found: The outputs, as returned by :func:`read_outputs`.
        dataset: The data set.

    Raises:
        DataError: The number of images or classes differs.
    """
    for name, outputs in found.items():
        images = len(dataset.train if name == "train" else dataset.test)
        if outputs.shape[1:] != (images, dataset.outputs):
            raise DataError(
                f"{path}: {name}: expected the outputs for the {images} images of {dataset.name}, "
                f"[members, {images}, {dataset.outputs}], found {tuple(outputs.shape)}"
            )
