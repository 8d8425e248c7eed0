"""ImageNet, or any set of images with one folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import DataError
from .dataset import Dataset
from .formats import InputFormat
from .images import FileImages
from .listing import EXTENSIONS, LeftOut, entries, images_below
from .locate import locate

_ADVICE = (
    "Expected class folders of images: train/<class>/*.JPEG and val/<class>/*.JPEG "
    "(image-net.org has them; sort the flat validation images into class folders first)"
)
_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet


def imagenet(data_dir: str | Path | None = None, image_size: int = 224) -> Dataset:
    """Images in class folders ``train/<class>/`` and ``val/<class>/``, RGB.

    All images below a class folder belong to the class. Tiny ImageNet's layout is understood as well: all validation
    images are in ``val/images/``, and ``val/val_annotations.txt`` has their classes. Hidden files and folders, those
    of operating systems, and files without the extension of an image are left out with a warning.

    Training images get a random resized crop and a flip. Test images are resized so that the shorter side is 8/7 of
    ``image_size`` (256 for 224), then cropped at their centre.

    Raises:
        DataError: folders are missing, empty or unreadable, or the classes of the two splits differ.
    """
    names = ("train", "imagenet/train", "tiny-imagenet-200/train")
    train = locate("imagenet", names, data_dir, advice=_ADVICE)
    val = train.parent / "val"
    if not train.is_dir():
        raise DataError(f"imagenet: expected a folder {train}, found a file. {_ADVICE}")
    if not val.is_dir():
        raise DataError(f"imagenet: found {train}, but no folder {val}. {_ADVICE}")
    input_format = InputFormat(
        channels=3,
        size=(image_size, image_size),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        resize=round(image_size * 8 / 7),
    )
    train_images = _images_of_classes(train)
    classes = tuple(train_images)
    if (val / _ANNOTATIONS).is_file() and (val / "images").is_dir() and "images" not in classes:
        val_images = _annotated_images(val, classes)
    else:
        val_images = _images_of_classes(val, classes)
    return Dataset(
        "imagenet",
        classes,
        input_format,
        _split(train_images, input_format),
        _split(val_images, input_format),
    )


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


def _images_of_classes(root: Path, expected: tuple[str, ...] | None = None) -> dict[str, list[str]]:
    """List the images of each class folder in ``root``.

    Args:
        root: folder of the split.
        expected: the classes that the split must have; without them, those that it has.

    Raises:
        DataError: a class is missing, unexpected or empty.
    """
    left_out = LeftOut(root)
    folders, outside = entries(root, left_out)
    found = [os.path.basename(folder) for folder in folders]
    classes = tuple(found) if expected is None else expected
    if not found and (outside or not classes):
        images = f"{len(outside)} images outside of class folders" if outside else "none"
        raise DataError(f"{root}: expected a folder per class, found {images}{left_out.remark}. {_ADVICE}")
    if unknown := sorted(set(found) - set(classes)):
        raise DataError(f"{root}: class folder {unknown[0]} is not in {root.parent / 'train'}{_others(unknown)}")
    if missing := sorted(set(classes) - set(found)):
        raise DataError(f"{root}: class folder {missing[0]} is missing{_others(missing)}")
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


def _annotated_images(val: Path, classes: tuple[str, ...]) -> dict[str, list[str]]:
    """List the images of each class in Tiny ImageNet's validation folder.

    Each line of the annotations has a file name, a class, and the bounding box of the object.

    Raises:
        DataError: a line, an image or a class is missing or damaged.
    """
    annotations = val / _ANNOTATIONS
    try:
        lines = annotations.read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"{annotations}: cannot be read ({error.strerror})") from error
    class_of: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        label = rest.split("\t")[0].strip()
        if label not in classes or class_of.setdefault(name, label) != label:
            raise DataError(
                f"{annotations}, line {number}: expected a new file name, a tab and a class folder of "
                f"{val.parent / 'train'}, found {line!r}"
            )
    left_out = LeftOut(val)
    folders, files = entries(val / "images", left_out)
    if missing := sorted(class_of.keys() - {os.path.basename(file) for file in files}):
        raise DataError(f"{val / 'images' / missing[0]}: no such file, but {annotations} has it{_others(missing)}")
    images_of: dict[str, list[str]] = {name: [] for name in classes}
    for file in files:
        name = os.path.basename(file)
        if name in class_of:
            images_of[class_of[name]].append(file)
        else:
            left_out.add(f"images without a line in {_ANNOTATIONS}", file)
    for folder in folders:
        left_out.add("folders", folder)
    if empty := [name for name, images in images_of.items() if not images]:
        raise DataError(f"{annotations}: class {empty[0]} has no images{_others(empty)}")
    left_out.warn()
    return images_of


def _split(images_of: dict[str, list[str]], input_format: InputFormat) -> FileImages:
    paths = [path for images in images_of.values() for path in images]
    labels = [label for label, images in enumerate(images_of.values()) for _ in images]
    return FileImages(tuple(paths), torch.tensor(labels), input_format, os.cpu_count() or 1)


def _others(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
