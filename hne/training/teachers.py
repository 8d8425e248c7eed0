"""Teachers of a distillation: functions that see every batch, or outputs that are known in advance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data import Dataset, Images, InputFormat, evaluation_batches
from ..errors import DataError
from ..files import utf8_path
from ..models import HNE

Teacher = Callable[[Tensor], Tensor] | Tensor
"""What a student learns from:

- a function of a batch of images ``[B, C, H, W]``, for instance an :class:`HNE` or any ``nn.Module``. It returns the
  logits of the M members of an ensemble ``[M, B, L]``, or of one network ``[B, L]``. It sees the images as the student
  does: augmented, normalised, on the device of the student.
- a tensor of outputs for all training images in order, ``[M, images, L]``, for training without augmentation.
"""


def prepare_teacher(teacher: Teacher, images: int, outputs: int, *, augment: bool, device: torch.device) -> Teacher:
    """Check a teacher as far as possible without images, and put a module into eval mode, a tensor on ``device``.

    Args:
        teacher: The teacher.
        images: Number of training images.
        outputs: L, the number of outputs of the student.
        augment: Whether training images are augmented.
        device: The device of the student.

    Raises:
        TypeError: The teacher is neither a function nor a tensor.
        ValueError: A tensor does not fit the images or the outputs, is not finite, or the images are augmented.
    """
    if isinstance(teacher, Tensor):
        if augment:
            raise ValueError("teacher: outputs known in advance are for images without augmentation, set augment=False")
        _check_outputs(teacher, images, outputs, "images")
        _check_finite(teacher)
        return teacher.detach().to(device)
    if not callable(teacher):
        raise TypeError(f"teacher: expected a function of images or a tensor of outputs, got {type(teacher).__name__}")
    return teacher.eval() if isinstance(teacher, nn.Module) else teacher


@torch.no_grad()
def ask_teacher(
    teacher: Teacher, images: Tensor, indices: Tensor, heads: int, outputs: int, *, check_values: bool = True
) -> Tensor:
    """The outputs of a teacher for a batch.

    Args:
        teacher: From :func:`prepare_teacher`.
        images: ``[B, C, H, W]``.
        indices: Of the images in the training set, ``[B]``.
        heads: Of the student. One head learns from the average of any number of members, several heads from one each.
        outputs: L, the number of outputs of the student.
        check_values: Whether to look for NaN and infinity, which waits for a GPU.

    Returns:
        Outputs ``[M, B, L]`` without gradient.

    Raises:
        TypeError: The teacher returns something else than a floating-point tensor.
        ValueError: The shape, the number of members or the device does not fit, or a value is NaN or infinite.
    """
    found = teacher[:, indices] if isinstance(teacher, Tensor) else teacher(images)
    if not isinstance(found, Tensor):
        raise TypeError(f"teacher: expected a function that returns a tensor, got {type(found).__name__}")
    found = found[None] if found.dim() == 2 else found
    _check_outputs(found, len(images), outputs, "batch")
    if heads > 1 and len(found) != heads:
        raise ValueError(
            f"teacher: expected the logits of {heads} members, one for each head of the student, got {len(found)}"
        )
    if found.device != images.device:
        raise ValueError(f"teacher: expected logits on the device of the images, {images.device}, got {found.device}")
    if check_values:
        _check_finite(found)
    return found


def _check_outputs(found: Tensor, images: int, outputs: int, name: str) -> None:
    if not found.is_floating_point():
        raise TypeError(f"teacher: expected floating-point logits, got {found.dtype}")
    if found.dim() != 3 or found.shape[1:] != (images, outputs) or len(found) == 0:
        raise ValueError(
            f"teacher: expected logits [members, {name}, classes] = [M, {images}, {outputs}], got {tuple(found.shape)}"
        )


def _check_finite(found: Tensor) -> None:
    if not found.isfinite().all():
        raise ValueError("teacher: expected finite logits, got NaN or infinity")


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
