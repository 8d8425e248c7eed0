"""Images held out from the training images, in place of the test images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hne.data import Dataset, hold_out_images, load_dataset


def rows(images: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for row in images.flatten(1)}


def test_images_of_each_class_are_held_out() -> None:
    whole, split = load_dataset("digits"), load_dataset("digits", val_share=0.2, split_seed=3)
    assert split.held_out == (0.2, 3)
    assert len(split.train) + len(split.test) == len(whole.train)
    train, test = (rows(images.images) for images in (split.train, split.test))
    assert train | test == rows(whole.train.images)
    assert not train & test
    assert not test & rows(whole.test.images), "no test image is looked at"
    for label in range(10):
        count = (whole.train.labels == label).sum().item()
        assert (split.test.labels == label).sum().item() == round(0.2 * count)
    assert split.input == whole.input


def test_the_seed_chooses() -> None:
    first, same, other = (load_dataset("digits", val_share=0.1, split_seed=seed).test.images for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_limits_apply_to_what_is_left() -> None:
    split = load_dataset("digits", val_share=0.5, limit_train=30, limit_test=20)
    assert (len(split.train), len(split.test)) == (30, 20)
    assert not rows(split.train.images) & rows(load_dataset("digits", val_share=0.5).test.images)


def test_samples_of_a_regression() -> None:
    split = load_dataset("diabetes", val_share=0.2)
    assert (len(split.train), len(split.test)) == (236, 59)
    assert len(torch.cat([split.train.labels, split.test.labels])) == 295


def test_it_refuses() -> None:
    digits = load_dataset("digits")
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="val_share: expected a number above 0 and below 1"):
            hold_out_images(digits, share)
    few = replace(digits, train=digits.train.subset(digits.train.labels.unique(return_inverse=True)[1].argsort()[:1]))
    with pytest.raises(ValueError, match="at least 2 training images of each class, class 0 has one"):
        hold_out_images(few, 0.5)
    items = [(torch.zeros(1, 8, 8), i % 2) for i in range(4)]
    with pytest.raises(ValueError, match="the labels of custom are not known before training"):
        hold_out_images(Dataset.from_torch(items, items, classes=2), 0.5)
