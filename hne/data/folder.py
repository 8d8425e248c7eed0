"""ImageNet, or any set of images with one folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import DataError
from .dataset import Dataset
from .formats import InputFormat
from .images import FileImages
from .locate import locate

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
_ADVICE = (
    "Expected class folders of images: train/<class>/*.JPEG and val/<class>/*.JPEG "
    "(image-net.org has them; sort the flat validation images into class folders first)"
)


def imagenet(data_dir: str | Path | None = None, image_size: int = 224) -> Dataset:
    """Images in class folders ``train/<class>/`` and ``val/<class>/``, RGB.

    Training images get a random resized crop and a flip. Test images are resized so that the shorter side is 8/7 of
    ``image_size`` (256 for 224), then cropped at their centre.

    Raises:
        DataError: folders are missing or empty, or the classes of the two splits differ.
    """
    names = ("train", "imagenet/train")
    train = locate("imagenet", names, data_dir, advice=_ADVICE)
    val = train.parent / "val"
    if not val.is_dir():
        raise DataError(f"imagenet: found {train}, but no folder {val}. {_ADVICE}")
    input_format = InputFormat(
        channels=3,
        size=(image_size, image_size),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize=round(image_size * 8 / 7),
    )
    classes = tuple(sorted(entry.name for entry in os.scandir(train) if entry.is_dir()))
    if not classes:
        raise DataError(f"{train}: expected a folder per class, found none")
    unknown = sorted({entry.name for entry in os.scandir(val) if entry.is_dir()} - set(classes))
    if unknown:
        raise DataError(f"{val}: class folder {unknown[0]} is not in {train}")
    return Dataset(
        "imagenet",
        classes,
        input_format,
        _split(train, classes, input_format),
        _split(val, classes, input_format),
    )


def image_files(folder: str | Path) -> list[Path]:
    """List all image files below ``folder``, sorted.

    Raises:
        DataError: ``folder`` does not exist or has no images.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not files:
        raise DataError(f"{folder}: found no image files ({' '.join(EXTENSIONS)})")
    return files


def _split(root: Path, classes: tuple[str, ...], input_format: InputFormat) -> FileImages:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        if not (root / name).is_dir():
            raise DataError(f"{root}: class folder {name} is missing")
        found = sorted(entry.path for entry in os.scandir(root / name) if entry.name.lower().endswith(EXTENSIONS))
        if not found:
            raise DataError(f"{root / name}: expected images, found none")
        paths += found
        labels += [label] * len(found)
    workers = os.cpu_count() or 1
    return FileImages(tuple(paths), torch.tensor(labels), input_format, workers)
