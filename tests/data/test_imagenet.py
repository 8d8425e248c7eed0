"""ImageNet, and how images in class folders are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_image_folders
from PIL import Image

from hne.data import InputFormat, load_dataset, training_batches
from hne.errors import DataError


def test_imagenet(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    Image.new("L", (50, 50)).save(tmp_path / "train" / "dog" / "grey.png")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not a picture")
    dataset = load_dataset("imagenet", tmp_path, image_size=32)
    assert dataset.classes == ("cat", "dog")
    assert dataset.input.size == (32, 32)
    assert dataset.train.labels.tolist() == [0] * 3 + [1] * 4
    assert dataset.test.labels.tolist() == [0] * 3 + [1] * 3
    noise = dataset.train.draw(7, torch.Generator().manual_seed(0))
    augmented = dataset.train.pixels(torch.arange(7), noise)
    assert augmented.shape == (7, 32, 32, 3)
    assert augmented.dtype == torch.uint8
    assert torch.equal(augmented, dataset.train.pixels(torch.arange(7), noise)), "a function of the noise"
    assert not torch.equal(augmented[:6], dataset.train.pixels(torch.arange(6)))


def test_evaluation_sees_the_centre(tmp_path: Path) -> None:
    """The shorter side is resized to 8/7 of the size, then the black frame around the white square is cropped off."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[4:60, 36:92] = 255
    Image.fromarray(pixels).save(tmp_path / "square.png")
    input_format = InputFormat(3, (56, 56), (0.0,) * 3, (1.0,) * 3, resize=64)
    assert (input_format.read(tmp_path / "square.png") == 255).all()


def test_truncated_image_is_named(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    path = tmp_path / "train" / "cat" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:-200])
    dataset = load_dataset("imagenet", tmp_path, image_size=32)
    batches = training_batches(dataset.train, dataset.input, 2, torch.Generator())
    with pytest.raises(DataError, match=rf"{path}: not a complete image"):
        list(batches)


def test_incomplete_image_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=f"found {tmp_path / 'train'}, but no folder {tmp_path / 'val'}"):
        load_dataset("imagenet", tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="expected a folder per class, found none"):
        load_dataset("imagenet", tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="cat: expected images, found none"):
        load_dataset("imagenet", tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(DataError, match="val: class folder cat is missing"):
        load_dataset("imagenet", tmp_path)
    (tmp_path / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="val: class folder dog is not in"):
        load_dataset("imagenet", tmp_path)
