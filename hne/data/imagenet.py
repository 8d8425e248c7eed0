"""ImageNet and Tiny ImageNet."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import DataError
from .dataset import Dataset
from .folder import dataset_of_files, images_of_classes, others
from .listing import LeftOut, entries
from .locate import locate

_ADVICE = (
    "Expected class folders of images: train/<class>/*.JPEG and val/<class>/*.JPEG "
    "(image-net.org has them; sort the flat validation images into class folders first)"
)
_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet


def imagenet(data_dir: str | Path | None = None, image_size: int = 224) -> Dataset:
    """Images in class folders ``train/<class>/`` and ``val/<class>/``, RGB, as by :func:`hne.data.folder.folder`.

    Tiny ImageNet's layout is understood as well: all validation images are in ``val/images/``, and
    ``val/val_annotations.txt`` has their classes.

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
    train_images = images_of_classes(train, advice=_ADVICE)
    classes = tuple(train_images)
    if (val / _ANNOTATIONS).is_file() and (val / "images").is_dir() and "images" not in classes:
        val_images = _annotated_images(val, classes)
    else:
        val_images = images_of_classes(val, classes, advice=_ADVICE)
    return dataset_of_files("imagenet", train_images, val_images, image_size)


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
        raise DataError(f"{val / 'images' / missing[0]}: no such file, but {annotations} has it{others(missing)}")
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
        raise DataError(f"{annotations}: class {empty[0]} has no images{others(empty)}")
    left_out.warn()
    return images_of
