"""Writers of small data sets in their real file formats."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hne.data import Dataset


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


def write_fashion_mnist(folder: Path, *, zipped: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (50, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 50, np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 20, np.uint8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        raw = idx_bytes(values)
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw)) if zipped else (folder / name).write_bytes(raw)
    return arrays


CIFAR = {
    "cifar10": (
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test_batch.bin",
        "batches.meta.txt",
    ),
    "cifar100": (
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        ["train.bin"],
        "test.bin",
        "fine_label_names.txt",
    ),
}


def write_cifar(root: Path, name: str, *, zipped: bool) -> dict[str, np.ndarray]:
    """Write four records per file, into a folder or an archive; return the records by file name."""
    folder, archive, train, test, names = CIFAR[name]
    classes = 10 if name == "cifar10" else 100
    rng = np.random.default_rng(1)
    records = {}
    for file in (*train, test):
        pixels = rng.integers(0, 256, (4, 3072), np.uint8)
        labels = rng.integers(0, classes, (4, 1), np.uint8)
        coarse = labels % 20 if name == "cifar100" else labels[:, :0]
        records[file] = np.hstack([coarse, labels, pixels]).astype(np.uint8)
    content = {file: values.tobytes() for file, values in records.items()}
    content[names] = "".join(f"thing_{i}\n" for i in range(classes)).encode()
    (root / folder).mkdir(parents=True)
    for file, raw in content.items():
        (root / folder / file).write_bytes(raw)
    if zipped:
        with tarfile.open(root / archive, "w:gz") as tar:
            tar.add(root / folder, folder)
        for file in content:
            (root / folder / file).unlink()
        (root / folder).rmdir()
    return records


def write_image_folders(root: Path, per_class: int = 3) -> None:
    rng = np.random.default_rng(2)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (40 + 10 * i, 60, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.JPEG")


def write_tiny_imagenet(root: Path) -> dict[str, tuple[int, str]]:
    """Write two images for each of three classes and splits; return grey value and class by file name."""
    greys = {}
    lines = []
    for number in range(6):
        name, grey = f"n0{number // 2 + 1}", 20 * number + 10
        train, val = root / "train" / name, root / "val" / "images"
        (train / "images").mkdir(parents=True, exist_ok=True)
        val.mkdir(parents=True, exist_ok=True)
        for path in (train / "images" / f"{name}_{number % 2}.JPEG", val / f"val_{number}.JPEG"):
            Image.new("RGB", (16, 16), (grey,) * 3).save(path)
            greys[path.name] = grey, name
        (train / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t9\t9\n")
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t9\t9\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "test" / "images").mkdir(parents=True)
    return greys


def check_normalisation(dataset: Dataset) -> None:
    """Check that the published mean and standard deviation are those of the training images."""
    pixels = dataset.train.images.double() / 255
    torch.testing.assert_close(pixels.mean((0, 1, 2)), torch.tensor(dataset.input.mean).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std((0, 1, 2)), torch.tensor(dataset.input.std).double(), atol=1e-4, rtol=0)


def image_bytes(values: np.ndarray, format_name: str, **options: Any) -> bytes:
    """Encode pixels ``[H, W]`` or ``[H, W, C]`` of any dtype that Pillow knows; ``options`` as in ``Image.save``."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format_name, **options)
    return buffer.getvalue()
