"""Tiny ImageNet: images in a folder of their own, and validation images with a text file of classes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_tiny_imagenet

from hne.data import load_dataset
from hne.errors import DataError


@pytest.mark.parametrize("place", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(place: str, tmp_path: Path) -> None:
    greys = write_tiny_imagenet(tmp_path / place)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_dataset("imagenet", tmp_path, image_size=8)
    assert dataset.classes == ("n01", "n02", "n03")
    for split in (dataset.train, dataset.test):
        assert split.labels.bincount().tolist() == [2, 2, 2]
        pixels = split.pixels(torch.arange(6)).numpy()
        for path, label, image in zip(split.paths, split.labels.tolist(), pixels, strict=True):
            grey, name = greys[os.path.basename(path)]
            assert dataset.classes[label] == name
            assert np.abs(image.astype(int) - grey).max() <= 2, "JPEG rounds"


@pytest.mark.parametrize("leftover", [True, False])
def test_tiny_imagenet_with_sorted_validation_images(leftover: bool, tmp_path: Path) -> None:
    greys = write_tiny_imagenet(tmp_path)
    for path in (tmp_path / "val" / "images").iterdir():
        folder = tmp_path / "val" / greys[path.name][1] / "images"
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    if not leftover:
        (tmp_path / "val" / "val_annotations.txt").unlink()
    (tmp_path / "val" / "images").rmdir()
    assert load_dataset("imagenet", tmp_path, image_size=8).test.labels.bincount().tolist() == [2, 2, 2]


def test_damaged_annotations(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    images, annotations = tmp_path / "val" / "images", tmp_path / "val" / "val_annotations.txt"
    right = annotations.read_text()
    lines = right.splitlines()
    for text, problem in [
        (right.replace("n02", "n09"), r"line 3: expected .*found 'val_2\.JPEG\\tn09"),
        ("\n".join([*lines, lines[0].replace("n01", "n02")]), "line 7: expected a new file name"),
        ("\n".join([*lines, "val_7.JPEG"]), r"line 7: expected .*found 'val_7\.JPEG'"),
        ("\n".join(lines[:2] + lines[4:]), "class n02 has no images"),
    ]:
        annotations.write_text(text)
        with pytest.raises(DataError, match=rf"{annotations}.*{problem}"):
            load_dataset("imagenet", tmp_path, image_size=8)
    annotations.write_text("\n".join([*lines, "val_7.JPEG\tn01\t0\t0\t9\t9"]))
    with pytest.raises(DataError, match=rf"{images / 'val_7.JPEG'}: no such file, but {annotations} has it"):
        load_dataset("imagenet", tmp_path, image_size=8)
    annotations.write_text("\n".join(lines[1:]))
    with pytest.warns(UserWarning, match=r"images without a line in val_annotations\.txt: 1 \(images.val_0\.JPEG\)"):
        assert len(load_dataset("imagenet", tmp_path, image_size=8).test) == 5
