"""Out-of-distribution images: another data set in the input format of a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_cifar, write_image_folders
from PIL import Image

from hne.data import InputFormat, load_dataset, ood_images, ood_samples
from hne.errors import DataError

RGB = InputFormat(3, (16, 20), (0.5,) * 3, (0.2,) * 3)
GREY = InputFormat(1, (12, 12), (0.5,), (0.2,), resize=14)


@pytest.mark.parametrize("wanted", [RGB, GREY])
def test_ood_images_of_a_data_set(wanted: InputFormat, tmp_path: Path) -> None:
    digits = load_dataset("digits").test
    found = ood_images("digits", wanted, limit=30)
    assert len(found) == 30
    pixels = ood_images("digits", wanted).pixels(torch.tensor([5]))[0]
    Image.fromarray(digits.images[5, :, :, 0].numpy()).save(tmp_path / "digit.png")
    np.testing.assert_array_equal(pixels, wanted.read(tmp_path / "digit.png"), "as the picture would be read")


def test_ood_images_of_colours(tmp_path: Path) -> None:
    records = write_cifar(tmp_path, "cifar10", zipped=False)["test_batch.bin"]
    with pytest.warns(UserWarning, match="the published file has"):
        found = ood_images("cifar10", InputFormat(1, (32, 32), (0.5,), (0.2,)), tmp_path)
    red, green, blue = records[2, 1:].reshape(3, 32, 32).astype(float)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R 601
    assert np.abs(found.pixels(torch.tensor([2]))[0, :, :, 0].numpy() - luma).max() <= 1


def test_ood_images_of_files(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    of_set = ood_images("imagenet", GREY, tmp_path)
    of_folder = ood_images(tmp_path / "val", GREY)
    assert len(of_set) == len(of_folder) == 6
    indices = torch.arange(6)
    assert torch.equal(of_set.pixels(indices), of_folder.pixels(indices))
    assert len(ood_images(tmp_path / "val", GREY, limit=2)) == 2
    with pytest.raises(DataError, match="no such folder"):
        ood_images(tmp_path / "none", GREY)
    with pytest.raises(DataError, match="diabetes: expected images, but this data set has none"):
        ood_images("diabetes", GREY)


def test_ood_samples() -> None:
    """Permuted measurements keep their values, not their combinations; scaled ones lie three times as far."""
    dataset = load_dataset("diabetes")
    test = dataset.test.pixels(torch.arange(147))[:, 0, 0]
    permuted, scaled = (
        ood_samples(kind, dataset).pixels(torch.arange(147))[:, 0, 0] for kind in ("permuted", "scaled")
    )
    torch.testing.assert_close(permuted.sort(0).values, test.sort(0).values, rtol=0, atol=0)
    known = {tuple(row.tolist()) for row in test}
    assert sum(tuple(row.tolist()) in known for row in permuted) < 5
    assert torch.equal(ood_samples("permuted", dataset).pixels(torch.arange(147))[:, 0, 0], permuted), "same seed"
    assert not torch.equal(ood_samples("permuted", dataset, seed=1).pixels(torch.arange(147))[:, 0, 0], permuted)
    mean = torch.tensor(dataset.input.mean)
    torch.testing.assert_close(scaled - mean, 3 * (test - mean), rtol=1e-4, atol=1e-3)


def test_ood_samples_refuse() -> None:
    with pytest.raises(ValueError, match="expected permuted or scaled for diabetes, got 'digits'"):
        ood_samples("digits", load_dataset("diabetes"))
    with pytest.raises(DataError, match="digits: expected measurements, but this data set has images"):
        ood_samples("scaled", load_dataset("digits"))
