"""Fashion-MNIST from IDX files, the format of MNIST: a big-endian header followed by unsigned bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from .dataset import Dataset
from .formats import InputFormat
from .images import MemoryImages
from .locate import locate, read_file

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SYSTEM = ("/usr/share/datasets/fashion-mnist",)
_ADVICE = (
    "Install them with `apt install dataset-fashion-mnist`, or download the four .gz files of "
    "github.com/zalandoresearch/fashion-mnist"
)


def read_idx(path: str | Path, dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or plain (recognised by its first two bytes).

    Args:
        path: the file.
        dims: required number of dimensions.

    Raises:
        DataError: the file is unreadable, truncated, damaged or in another format.
    """
    raw = read_file(Path(path))
    if raw.startswith(b"\x1f\x8b"):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, struct.error, zlib.error) as error:
            raise DataError(f"{path}: truncated or damaged gzip file ({error})") from error
    magic, offset = 0x0800 + dims, 4 + 4 * dims
    found = int.from_bytes(raw[:4], "big")
    if len(raw) < offset or found != magic:
        raise DataError(
            f"{path}: expected an IDX file of bytes with {dims} dimension(s) "
            f"(magic number 0x{magic:08x}), "
            f"found {'0x' + raw[:4].hex() if raw else 'nothing'} in a file of {len(raw)} bytes"
        )
    shape = struct.unpack(f">{dims}I", raw[4:offset])
    if len(raw) - offset != math.prod(shape):
        raise DataError(
            f"{path}: expected {'x'.join(map(str, shape))} = {math.prod(shape)} bytes after the "
            f"header, found {len(raw) - offset} (truncated or damaged)"
        )
    return np.frombuffer(raw, np.uint8, offset=offset).reshape(shape)


def fashion_mnist(data_dir: str | Path | None = None) -> Dataset:
    """Zalando's images of clothes: 60000 + 10000, 28x28 grey, 10 classes (Xiao et al. 2017)."""
    train = _read_split("train", data_dir)
    test = _read_split("t10k", data_dir)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"fashion-mnist: the training images are {tuple(train.images.shape[1:3])} pixels, "
            f"the test images {tuple(test.images.shape[1:3])}"
        )
    for prefix, split in (("train", train), ("t10k", test)):
        if not split.images.any():
            path = _find(f"{prefix}-images-idx3-ubyte", data_dir)
            raise DataError(f"{path}: expected images, found zeros only (damaged)")
    _, height, width, _ = train.images.shape
    input_format = InputFormat(1, (height, width), mean=(0.2860,), std=(0.3530,))
    return Dataset("fashion-mnist", CLASSES, input_format, train, test)


def _read_split(prefix: str, data_dir: str | Path | None) -> MemoryImages:
    images_path = _find(f"{prefix}-images-idx3-ubyte", data_dir)
    labels_path = _find(f"{prefix}-labels-idx1-ubyte", data_dir)
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if images.size == 0:
        raise DataError(f"{images_path}: expected images, found {' x '.join(map(str, images.shape))} pixels")
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: expected a label for each of the {len(images)} images of "
            f"{images_path.name}, found {len(labels)}"
        )
    if labels.max() >= len(CLASSES):
        raise DataError(f"{labels_path}: expected labels from 0 to 9, found {labels.max()}")
    # Only two pixels of padding: the clothes nearly fill their 28 pixels.
    return MemoryImages(torch.tensor(images)[..., None], torch.tensor(labels).long(), pad=2, flip=True)


def _find(name: str, data_dir: str | Path | None) -> Path:
    names = [f"{folder}{name}{end}" for folder in ("", "fashion-mnist/") for end in (".gz", "")]
    return locate("fashion-mnist", names, data_dir, advice=_ADVICE, system=_SYSTEM)
