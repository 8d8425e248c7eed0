"""Data sets by name: those of scikit-learn, limits, bad options, missing files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from data_files import check_normalisation

from hne.data import DATASETS, load_dataset
from hne.errors import DataError


def test_digits() -> None:
    dataset, again = load_dataset("digits"), load_dataset("digits")
    assert (len(dataset.train), len(dataset.test)) == (901, 896)
    assert torch.equal(dataset.train.images, again.train.images)
    shares = dataset.train.labels.bincount() - dataset.test.labels.bincount()
    assert shares.min() >= 0
    assert shares.max() <= 1, "stratified"
    check_normalisation(dataset)


def test_diabetes() -> None:
    dataset = load_dataset("diabetes")
    assert (len(dataset.train), len(dataset.test)) == (295, 147)
    assert dataset.outputs == 2
    assert dataset.target is not None
    inputs = dataset.input.normalise(dataset.train.pixels(torch.arange(295)))
    assert inputs.shape == (295, 10, 1, 1)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(10), atol=1e-4, rtol=0)
    target = dataset.target.normalise(dataset.train.labels)
    assert abs(target.mean()) < 1e-5
    assert target.std(correction=0).item() == pytest.approx(1)
    raw = sklearn.datasets.load_diabetes(scaled=False)
    np.testing.assert_allclose(dataset.test.images[3, 0, 0], raw.data[11], rtol=1e-6)
    assert dataset.test.labels[3] == raw.target[11]


def test_limits_pick_the_same_images_each_time() -> None:
    whole, part = load_dataset("digits"), load_dataset("digits", limit_train=50, limit_test=7)
    assert (len(part.train), len(part.test)) == (50, 7)
    assert torch.equal(part.train.images, load_dataset("digits", limit_train=50).train.images)
    assert len(part.train.labels.unique()) == 10
    assert len(load_dataset("digits", limit_train=10**6).train) == len(whole.train)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"data: expected one of digits, .*, got 'mnist'"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match="limit_train: expected at least 1, got 0"):
        load_dataset("digits", limit_train=0)
    with pytest.raises(ValueError, match="image_size: the images of digits have one size"):
        load_dataset("digits", image_size=16)
    with pytest.raises(ValueError, match="image_size: expected at least 1, got 0"):
        load_dataset("imagenet", image_size=0)
    with pytest.raises(ValueError, match=r"split_seed: .* which needs val_share, too"):
        load_dataset("digits", split_seed=3)
    assert set(DATASETS) == {"digits", "fashion-mnist", "cifar10", "cifar100", "imagenet", "folder", "diabetes"}


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "imagenet", "folder"])
def test_missing_files_say_where_and_how(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, absent = tmp_path / "empty", tmp_path / "absent"
    empty.mkdir()
    with pytest.raises(DataError, match=rf"{name}: found none of .* in {empty}\. "):
        load_dataset(name, empty)
    with pytest.raises(DataError, match=rf"{absent} \(no such folder\)"):
        load_dataset(name, absent)
    if name != "fashion-mnist":  # a system package may have installed it
        monkeypatch.setenv("HNE_DATA", str(empty))
        with pytest.raises(DataError, match=rf"in {empty}.*--data-dir DIR or HNE_DATA=DIR"):
            load_dataset(name)
