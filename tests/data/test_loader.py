"""Batches: the images of each batch, and the random numbers that choose them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import write_image_folders
from torch import Tensor

from hne.data import InputFormat, MemoryImages, evaluation_batches, load_dataset, training_batches
from hne.errors import DataError


def numbered(count: int, pad: int = 0) -> tuple[MemoryImages, InputFormat]:
    """Create images whose pixels all hold the index of the image."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 6, 6, 1).contiguous()
    return MemoryImages(images, torch.arange(count), pad=pad), InputFormat(1, (6, 6), (0.0,), (1 / 255,))


def test_an_epoch_is_a_permutation_without_the_last_batch() -> None:
    split, input_format = numbered(50)
    generator = torch.Generator().manual_seed(3)
    epochs = [list(training_batches(split, input_format, 16, generator)) for _ in range(2)]
    for batches in epochs:
        labels = torch.cat([target for _, target in batches])
        assert len(labels) == 48 == len(labels.unique())
        for images, target in batches:
            assert torch.equal(images[:, 0, 0, 0], target.float())
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1]), "another order"


def test_processes_share_the_global_batch() -> None:
    split, input_format = numbered(50, pad=2)

    def epoch(rank: int, size: int) -> tuple[list[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(3)
        batches = training_batches(split, input_format, 12, generator, rank=rank, world_size=size)
        return [torch.cat([images.flatten(1), target[:, None]], 1) for images, target in batches], generator.get_state()

    whole, state = epoch(0, 1)
    shares = [epoch(rank, 3) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([batches[step] for batches, _ in shares]), batch)
    assert all(torch.equal(after, state) for _, after in shares)


def test_evaluation_sees_every_image_once() -> None:
    split, input_format = numbered(50, pad=2)
    parts = [
        torch.cat([target for _, target in evaluation_batches(split, input_format, 8, rank=rank, world_size=3)])
        for rank in range(3)
    ]
    assert sorted(torch.cat(parts).tolist()) == list(range(50))
    images, target = next(evaluation_batches(split, input_format, 8))
    assert torch.equal(images[:, 0, 3, 3], target.float()), "in order, not augmented"


def test_batches_are_normalised_and_channels_last() -> None:
    dataset = load_dataset("digits")
    images, target = next(evaluation_batches(dataset.train, dataset.input, 901))
    assert images.shape == (901, 1, 8, 8)
    assert images.dtype == torch.float32
    assert target.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3


def test_files_come_in_the_order_of_memory(tmp_path: Path) -> None:
    """Threads decode in advance, yet the batches depend on the generator only."""
    write_image_folders(tmp_path, per_class=6)
    dataset = load_dataset("imagenet", tmp_path, image_size=16)
    epochs = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        epochs.append(list(training_batches(dataset.train, dataset.input, 2, generator)))
    assert len(epochs[0]) == 6
    for (images, target), (again, target_again) in zip(*epochs, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(target, target_again)


def test_no_global_generator_is_touched() -> None:
    split, input_format = numbered(50, pad=2)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(training_batches(split, input_format, 16, torch.Generator()))
    load_dataset("digits", limit_train=10)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


def test_bad_batch_sizes() -> None:
    split, input_format = numbered(10)
    with pytest.raises(ValueError, match="between 1 and the 10 images, got 11"):
        training_batches(split, input_format, 11, torch.Generator())
    with pytest.raises(ValueError, match="a multiple of the 3 processes, got 10"):
        training_batches(split, input_format, 10, torch.Generator(), world_size=3)


def test_one_class_is_refused() -> None:
    split, input_format = numbered(10)
    split = split.subset(torch.tensor([3, 3, 3, 3]))
    with pytest.raises(DataError, match="at least two classes, got 4 images of class 3"):
        training_batches(split, input_format, 2, torch.Generator())
    next(evaluation_batches(split, input_format, 2))
