"""Images with one folder per class."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import DataError
from .dataset import Dataset
from .formats import InputFormat
from .images import FileImages
from .listing import EXTENSIONS, LeftOut, entries, images_below
from .locate import locate

VAL_SHARE = 0.1

_ADVICE = "Expected class folders of images, train/<class>/* and, if there are test images, val/<class>/*"


def folder(
    data_dir: str | Path | None = None, image_size: int = 224, val_share: float | None = None, split_seed: int = 0
) -> Dataset:
    """Images in class folders ``train/<class>/`` and ``val/<class>/``, RGB. All below a class folder are of the class.

    Without ``val``, images of ``train`` are held out to test on, the same share of each class (:func:`hold_out`).
    Images are augmented, resized and normalised as those of :func:`hne.data.imagenet.imagenet`.

    Args:
        data_dir: the folder of ``train``.
        image_size: height and width of a network's input in pixels.
        val_share: share of each class that is held out, above 0 and below 1 (default: 0.1); unused if there is ``val``.
        split_seed: chooses the images that are held out.

    Raises:
        DataError: folders are missing, empty or unreadable, the classes of the two splits differ, or there is only one.
        ValueError: ``val_share`` is out of range.
    """
    if val_share is not None and not 0 < val_share < 1:
        raise ValueError(f"val_share: expected a number above 0 and below 1, got {val_share}")
    train = locate("folder", ("train",), data_dir, advice=_ADVICE)
    if not train.is_dir():
        raise DataError(f"folder: expected a folder {train}, found a file. {_ADVICE}")
    images = images_of_classes(train, advice=_ADVICE)
    if len(images) < 2:
        raise DataError(f"{train}: expected at least two class folders, found one, {next(iter(images))}. {_ADVICE}")
    val = train.parent / "val"
    if not os.path.lexists(val):
        held_out = VAL_SHARE if val_share is None else val_share, split_seed
        dataset = dataset_of_files("folder", *hold_out(train, images, *held_out), image_size)
        return replace(dataset, held_out=held_out)
    if not val.is_dir():
        raise DataError(f"folder: expected a folder {val}, found {'a file' if val.exists() else 'a broken link'}")
    if val_share is not None:
        warnings.warn(f"val_share: not used, since there is a folder {val}", stacklevel=2)
    return dataset_of_files("folder", images, images_of_classes(val, tuple(images), advice=_ADVICE), image_size)


def hold_out(
    root: Path, images_of: dict[str, list[str]], share: float, seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Split the images of each class into those to train on and those to test on.

    Images are ranked by a hash of the seed and their path below ``root``, and the first are held out: the split is the
    same on every machine, and nearly the same after images were added or removed.

    Args:
        root: the folder of all images.
        images_of: paths by class.
        share: share of each class to test on; at least one image, and not all.
        seed: any integer.

    Raises:
        DataError: a class has a single image.
    """

    def rank(path: str) -> bytes:
        return hashlib.sha256(f"{seed} ".encode() + os.fsencode(Path(path).relative_to(root).as_posix())).digest()

    train, test = {}, {}
    for name, paths in images_of.items():
        if len(paths) < 2:
            raise DataError(f"{root / name}: expected at least 2 images, one of them to test on, found {len(paths)}")
        count = min(max(round(share * len(paths)), 1), len(paths) - 1)
        held_out = set(sorted(paths, key=rank)[:count])
        train[name] = [path for path in paths if path not in held_out]
        test[name] = [path for path in paths if path in held_out]
    return train, test


def images_of_classes(root: Path, expected: tuple[str, ...] | None = None, *, advice: str) -> dict[str, list[str]]:
    """List the images of each class folder in ``root``.

    Hidden files and folders, those of operating systems, and files without the extension of an image are left out with
    a warning.

    Args:
        root: folder of the split.
        expected: the classes that the split must have; without them, those that it has.
        advice: how the folders should be, for the error text.

    Raises:
        DataError: a class is missing, unexpected or empty.
    """
    left_out = LeftOut(root)
    folders, outside = entries(root, left_out)
    found = [os.path.basename(folder) for folder in folders]
    classes = tuple(found) if expected is None else expected
    if not found and (outside or not classes):
        images = f"{len(outside)} images outside of class folders" if outside else "none"
        raise DataError(f"{root}: expected a folder per class, found {images}{left_out.remark}. {advice}")
    if unknown := sorted(set(found) - set(classes)):
        raise DataError(f"{root}: class folder {unknown[0]} is not in {root.parent / 'train'}{others(unknown)}")
    if missing := sorted(set(classes) - set(found)):
        raise DataError(f"{root}: class folder {missing[0]} is missing{others(missing)}")
    for path in outside:
        left_out.add("images outside of class folders", path)
    images_of = {}
    for name in classes:
        within = LeftOut(root / name)
        images_of[name] = images_below(root / name, within)
        if not images_of[name]:
            raise DataError(f"{root / name}: expected images, found none{within.remark}")
        left_out.update(within)
    left_out.warn()
    return images_of


def dataset_of_files(name: str, train: dict[str, list[str]], test: dict[str, list[str]], image_size: int) -> Dataset:
    """Make a data set of image files, given by class.

    Training images get a random resized crop and a flip. Test images are resized so that the shorter side is 8/7 of
    ``image_size`` (256 for 224), then cropped at their centre. Mean and standard deviation are ImageNet's.
    """
    input_format = InputFormat(
        channels=3,
        size=(image_size, image_size),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize=round(image_size * 8 / 7),
    )
    return Dataset(name, tuple(train), input_format, _split(train, input_format), _split(test, input_format))


def image_files(folder: str | Path) -> list[Path]:
    """List all image files below ``folder``, sorted, without hidden files and those of operating systems.

    Raises:
        DataError: ``folder`` does not exist, cannot be read or has no images.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    left_out = LeftOut(folder)
    files = images_below(folder, left_out)
    if not files:
        raise DataError(f"{folder}: found no image files ({' '.join(EXTENSIONS)}){left_out.remark}")
    left_out.warn()
    return [Path(file) for file in files]


def others(names: list[str]) -> str:
    """The end of an error text that names the first of ``names``."""
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _split(images_of: dict[str, list[str]], input_format: InputFormat) -> FileImages:
    paths = [path for images in images_of.values() for path in images]
    labels = [label for label, images in enumerate(images_of.values()) for _ in images]
    return FileImages(tuple(paths), torch.tensor(labels), input_format, os.cpu_count() or 1)
