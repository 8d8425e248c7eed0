"""CIFAR-10 and CIFAR-100 from their binary versions: each record has one or two labels and 3072 bytes of pixels."""

from __future__ import annotations

import gzip
import struct
import tarfile
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from .dataset import Dataset
from .formats import InputFormat
from .images import MemoryImages
from .locate import locate, read_file

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Format:
    name: str
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    class_names: str  # name of a text file with one class per line
    classes: int
    label_bytes: int  # the last byte is the class; in CIFAR-100 the superclass precedes it
    records: int  # records in each published training file
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CIFAR10 = _Format(
    name="cifar10",
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    class_names="batches.meta.txt",
    classes=10,
    label_bytes=1,
    records=10000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
_CIFAR100 = _Format(
    name="cifar100",
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-binary",
    train=("train.bin",),
    test="test.bin",
    class_names="fine_label_names.txt",
    classes=100,
    label_bytes=2,
    records=50000,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


def cifar10(data_dir: str | Path | None = None) -> Dataset:
    """50000 + 10000 photographs, 32x32 RGB, 10 classes (Krizhevsky 2009)."""
    return _load(_CIFAR10, data_dir)


def cifar100(data_dir: str | Path | None = None) -> Dataset:
    """50000 + 10000 photographs, 32x32 RGB, 100 classes (Krizhevsky 2009)."""
    return _load(_CIFAR100, data_dir)


def _load(layout: _Format, data_dir: str | Path | None) -> Dataset:
    names = (f"{layout.folder}/{layout.test}", layout.archive, layout.test)
    advice = (
        f'Get {layout.archive}, the "binary version" at www.cs.toronto.edu/~kriz/cifar.html, '
        f"and put it or its folder {layout.folder} there"
    )
    found = locate(layout.name, names, data_dir, advice=advice)
    wanted = (*layout.train, layout.test)
    if found.name == layout.archive:
        files = _read_archive(found, wanted, layout.class_names)
    else:
        files = _read_folder(found.parent, wanted, layout.class_names)
    parts = [_records(layout, found, name, files[name], layout.records) for name in layout.train]
    test = _records(layout, found, layout.test, files[layout.test], 10000)
    return Dataset(
        layout.name,
        _class_names(files.get(layout.class_names, b""), layout.classes),
        InputFormat(3, (32, 32), layout.mean, layout.std),
        _images(np.concatenate(parts), layout.label_bytes),
        _images(test, layout.label_bytes),
    )


def _read_folder(folder: Path, wanted: Sequence[str], optional: str) -> dict[str, bytes]:
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {', '.join(missing)} is missing")
    present = [name for name in (*wanted, optional) if (folder / name).is_file()]
    return {name: read_file(folder / name) for name in present}


def _read_archive(path: Path, wanted: Sequence[str], optional: str) -> dict[str, bytes]:
    """Read files from the archive, by name, without unpacking it to the disk."""
    files: dict[str, bytes] = {}
    try:
        with gzip.open(path) as unzipped, tarfile.open(fileobj=unzipped, mode="r:") as archive:
            for member in archive:
                name = Path(member.name).name
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and name in (*wanted, optional):
                    files[name] = content.read()
            while unzipped.read(2**20):  # to the end: gzip verifies its checksum there
                pass
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, struct.error, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged archive ({error})") from error
    missing = [name for name in wanted if name not in files]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} is missing from the archive")
    return files


def _records(layout: _Format, found: Path, name: str, raw: bytes, published: int) -> np.ndarray:
    """Parse and check the records of one file: uint8 ``[n, label_bytes + 3072]``.

    Raises:
        DataError: the file is truncated, a label is out of range, or all pixels are black.
    """
    size = layout.label_bytes + _PIXELS
    where = f"{found}: {name}" if found.name == layout.archive else f"{found.parent / name}"
    if not raw or len(raw) % size:
        raise DataError(
            f"{where}: expected {published} records of {size} bytes = {published * size} bytes, "
            f"found {len(raw)}, not a whole number of records (truncated or damaged)"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, size)
    labels = records[:, layout.label_bytes - 1]
    if labels.max() >= layout.classes:
        bad = int((labels >= layout.classes).argmax())
        raise DataError(
            f"{where}: expected labels below {layout.classes}, found {labels[bad]} in record {bad} (damaged)"
        )
    if not records[:, layout.label_bytes :].any():
        raise DataError(f"{where}: expected images, found zeros only (damaged)")
    if len(records) != published:
        warnings.warn(f"{where}: {len(records)} images, the published file has {published}", stacklevel=2)
    return records


def _images(records: np.ndarray, label_bytes: int) -> MemoryImages:
    planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    images = torch.from_numpy(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))
    labels = torch.from_numpy(records[:, label_bytes - 1].astype(np.int64))
    return MemoryImages(images, labels, pad=4, flip=True)


def _class_names(text: bytes, classes: int) -> tuple[str, ...]:
    """Class names from the text file beside the records; without that file, the class indices."""
    names = tuple(text.decode("utf-8", "replace").split())
    return names if len(names) == classes else tuple(map(str, range(classes)))
