"""Map-style data sets of PyTorch as data sets of this package."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, StackDataset, TensorDataset

from hne.data import Dataset, evaluation_batches, training_batches
from hne.errors import DataError


class Items(torch.utils.data.Dataset):
    """Images given as a list, with labels; ``change`` is a random change in the data set itself."""

    def __init__(self, images: list[Any] | Tensor, labels: list[Any] | None = None, change: Any = None) -> None:
        self.images = images
        self.labels = [i % 3 for i in range(len(images))] if labels is None else labels
        self.change = change

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = self.images[index]
        return (image if self.change is None else self.change(image)), self.labels[index]


def three_dice(image: Tensor) -> Tensor:
    """A change by the generators of torch, NumPy and Python."""
    return image + torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002


def bytes_of(rng: torch.Generator, count: int = 12, shape: tuple[int, ...] = (3, 5, 7)) -> Tensor:
    return torch.randint(256, (count, *shape), generator=rng, dtype=torch.uint8)


def epoch(dataset: Dataset, seed: int = 0, **options: Any) -> list[tuple[Tensor, Tensor]]:
    return list(training_batches(dataset.train, dataset.input, 4, torch.Generator().manual_seed(seed), **options))


def tested(dataset: Dataset) -> tuple[Tensor, Tensor]:
    batches = list(evaluation_batches(dataset.test, dataset.input, 5))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


# Items --------------------------------------------------------------------------------------------------------------


def test_images_of_any_kind_are_the_same(rng: torch.Generator) -> None:
    pixels = bytes_of(rng)
    expected = pixels.float() / 255
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    kinds = {
        "tensors": pixels,
        "arrays": arrays,
        "PIL images": [Image.fromarray(array) for array in arrays],
        "floats": expected,
        "float arrays": [array.astype(np.float32) / 255 for array in arrays],
        "float64": pixels.double() / 255,
    }
    for kind, images in kinds.items():
        dataset = Dataset.from_torch(Items(images), Items(images), classes=3)
        assert dataset.input.channels == 3
        assert dataset.input.size == (5, 7)
        found, labels = tested(dataset)
        torch.testing.assert_close(found, expected, msg=lambda m, kind=kind: f"{kind}: {m}")
        assert labels.tolist() == [i % 3 for i in range(12)]
        assert labels.dtype == torch.int64
        assert found.is_contiguous(memory_format=torch.channels_last) or len(found) == 0
    exact, _ = tested(Dataset.from_torch(Items(expected), Items(expected), classes=3))
    assert torch.equal(exact, expected), "floating-point images are taken as they are"


@pytest.mark.parametrize("mode", ["1", "L", "I;16"])
def test_grey_images(mode: str, rng: torch.Generator) -> None:
    pixels = bytes_of(rng, shape=(5, 7))
    arrays = {"1": [p.numpy() > 99 for p in pixels], "I;16": [p.numpy().astype(np.uint16) * 257 for p in pixels]}
    images = [Image.fromarray(array) for array in arrays.get(mode, pixels.numpy())]
    assert images[0].mode == mode
    found, _ = tested(Dataset.from_torch(Items(images), Items(images), classes=3))
    wanted = (pixels > 99).float() if mode == "1" else pixels / 255
    torch.testing.assert_close(found, wanted[:, None])
    by_tensor, _ = tested(Dataset.from_torch(Items(pixels), Items(pixels), classes=3))
    torch.testing.assert_close(by_tensor, pixels[:, None] / 255)


def test_mean_and_deviation(rng: torch.Generator) -> None:
    pixels = bytes_of(rng)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    wanted = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for images in (pixels, pixels / 255):
        found, _ = tested(Dataset.from_torch(Items(images), Items(images), classes=3, mean=mean, std=std))
        torch.testing.assert_close(found, wanted)
        assert torch.equal(images, pixels if images.dtype == torch.uint8 else pixels / 255), "not overwritten"
    number, _ = tested(Dataset.from_torch(Items(pixels), Items(pixels), classes=3, mean=0.5, std=0.25))
    torch.testing.assert_close(number, (pixels / 255 - 0.5) / 0.25)


def test_classes(rng: torch.Generator) -> None:
    images = Items(bytes_of(rng))
    assert Dataset.from_torch(images, images, classes=3).classes == ("0", "1", "2")
    assert Dataset.from_torch(images, images, classes=["a", "b", "c"]).outputs == 3
    with pytest.raises(ValueError, match="classes: expected names or a number, since train has no attribute classes"):
        Dataset.from_torch(images, images)
    images.classes = ["x", "y", "z"]
    assert Dataset.from_torch(images, images, name="mine").classes == ("x", "y", "z")
    for wrong in ("abc", 1, ["one"]):
        with pytest.raises(ValueError, match="classes: expected at least two names, or a number from 2, got"):
            Dataset.from_torch(images, images, classes=wrong)


def test_labels_of_any_kind(rng: torch.Generator) -> None:
    labels = [0, np.int64(1), np.uint8(2), torch.tensor(1), torch.tensor([2]), True]
    images = Items(bytes_of(rng, 6), labels)
    assert tested(Dataset.from_torch(images, images, classes=3))[1].tolist() == [0, 1, 2, 1, 2, 1]
    tensors = TensorDataset(bytes_of(rng, 6), torch.arange(6))
    assert tested(Dataset.from_torch(tensors, tensors, classes=6))[1].tolist() == [*range(6)]


# Random numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_random_changes_follow_from_the_generator(workers: int, rng: torch.Generator) -> None:
    images = torch.rand(12, 3, 4, 4, generator=rng)
    items, transform = Items(images, change=three_dice), lambda x: x * torch.rand(()) + random.random()
    alone = Dataset.from_torch(items, items, classes=3, transform=transform)
    dataset = Dataset.from_torch(items, items, classes=3, transform=transform, workers=workers)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first = epoch(dataset)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    torch.manual_seed(1)
    random.seed(1)
    for other in (dataset, alone):
        for batch, again in zip(first, epoch(other), strict=True):
            assert all(map(torch.equal, batch, again))
    assert not torch.equal(first[0][0], epoch(dataset, seed=1)[0][0])
    assert torch.equal(tested(dataset)[0], tested(alone)[0]), "changes in an evaluation follow from the index"
    plain = epoch(Dataset.from_torch(items, items, classes=3))
    assert torch.equal(plain[0][1], first[0][1])
    assert not torch.equal(plain[0][0], first[0][0])


def test_only_augmented_training_images_are_transformed(rng: torch.Generator) -> None:
    images = torch.rand(12, 3, 4, 4, generator=rng)
    dataset = Dataset.from_torch(Items(images), Items(images), classes=3, transform=lambda x: x[:, :2] + 1)
    assert all(batch.shape == (4, 3, 2, 4) and batch.min() >= 1 for batch, _ in epoch(dataset))
    assert all(batch.shape == (4, 3, 4, 4) and batch.max() < 1 for batch, _ in epoch(dataset, augment=False))
    assert torch.equal(tested(dataset)[0], images)


def test_processes_share_the_global_batch(rng: torch.Generator) -> None:
    items = Items(torch.rand(12, 1, 3, 3, generator=rng), change=three_dice)
    dataset = Dataset.from_torch(items, items, classes=3)
    whole, parts = epoch(dataset), [epoch(dataset, rank=rank, world_size=2) for rank in range(2)]
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[step][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[step][1] for part in parts]), labels)


def test_parts_and_indices(rng: torch.Generator) -> None:
    images = torch.rand(12, 1, 3, 3, generator=rng)
    split = Dataset.from_torch(Items(images), Items(images), classes=3).train
    part = split.subset(torch.tensor([7, 2]))
    assert len(part) == 2
    assert torch.equal(part.pixels(torch.tensor([1]))[0, :, :, 0], images[2, 0])
    assert split.indexed().read([5, 3])[1].tolist() == [5, 3]


# Errors -------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(3, 4, 4), 0)] * 3)

    def __len__(self) -> int:
        return 3


def test_other_kinds_of_data_sets(rng: torch.Generator) -> None:
    good = Items(bytes_of(rng))
    for wrong in (Stream(), DataLoader(good), iter([1]), None):
        with pytest.raises(TypeError, match=r"val: expected a map-style data set, with __getitem__ and __len__, got "):
            Dataset.from_torch(good, wrong, classes=3)
    with pytest.raises(DataError, match="train: expected at least one item, got none"):
        Dataset.from_torch(Items([]), good, classes=3)
    for options, message in (
        ({"workers": -1}, "workers: expected a whole number of at least 0, got -1"),
        ({"transform": 3}, "transform: expected a function of one image, got 3"),
        ({"mean": (1, 2)}, r"mean: expected a number, or one for each of the 3 channels, got \(1, 2\)"),
        ({"std": 0}, "std: expected a number above 0, or one for each of the 3 channels, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Dataset.from_torch(good, good, **{"classes": 3, **options})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3, 4, 4), r"expected a pair \(image, label\), got Tensor"),
        ({"image": 1}, r"expected a pair \(image, label\), got dict"),
        ((torch.zeros(3, 4, 4), 1, 2), r"expected a pair \(image, label\), got 3 values"),
        ((torch.zeros(1, 4, 4), 1), r"expected an image of 3 channels, got torch.float32 \(1, 4, 4\)"),
        ((torch.zeros(3, 0, 4), 1), "expected an image of 3 channels, got"),
        ((torch.zeros(1, 3, 4, 4), 1), r"expected an image of 2 or 3 dimensions, got shape \(1, 3, 4, 4\)"),
        ((torch.zeros(3, 4, 4).int(), 1), "expected an image of uint8 or floating-point numbers, got torch.int32"),
        ((np.zeros((4, 4, 3), np.int64), 1), "expected an image of uint8 or floating-point numbers, got int64"),
        ((torch.full((3, 4, 4), torch.nan), 1), "expected finite numbers, got NaN or infinity"),
        (("a.png", 1), "expected an image as tensor, array or PIL image, got str"),
        ((Image.new("I", (4, 4)), 1), "black and white are not defined"),
        ((torch.zeros(3, 4, 4), 3), "expected a label from 0 to 2, got 3"),
        ((torch.zeros(3, 4, 4), -1), "expected a label from 0 to 2, got -1"),
        ((torch.zeros(3, 4, 4), 1.0), r"expected a label from 0 to 2, got 1\.0"),
        ((torch.zeros(3, 4, 4), torch.eye(3)[1]), r"expected a label from 0 to 2, got Tensor of shape \(3,\)"),
    ],
)
def test_bad_items_are_named(item: Any, message: str) -> None:
    good = [(torch.zeros(3, 4, 4), 0)] * 4
    with pytest.raises(DataError, match=rf"train\[0\]: .*{message}"):
        Dataset.from_torch([item, *good], good, classes=3)
    dataset = Dataset.from_torch([*good, item], good, classes=3)
    with pytest.raises(DataError, match=rf"train\[4\]: .*{message}"):
        list(training_batches(dataset.train, dataset.input, 1, torch.Generator()))


def test_images_of_different_sizes_in_a_batch() -> None:
    items = StackDataset([torch.zeros(1, 4, 4), torch.zeros(1, 4, 5)], [0, 1])
    dataset = Dataset.from_torch(items, items, classes=3)
    with pytest.raises(
        DataError,
        match=r"expected an image like val\[0\] in the same batch, torch.float32 \(1, 4, 4\), "
        r"got torch.float32 \(1, 4, 5\)",
    ):
        list(evaluation_batches(dataset.test, dataset.input, 2))
    assert len(list(evaluation_batches(dataset.test, dataset.input, 1))) == 2


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x: None, r"transform of train\[0\]: expected a tensor \[channels, height, width\], got NoneType"),
        (lambda x: x[:1], r"transform of train\[0\]: expected an image of 3 channels, got torch.float32 \(1, 4, 4\)"),
        (lambda x: x / 0, r"transform of train\[0\]: expected finite numbers"),
    ],
)
def test_bad_transforms(transform: Any, message: str) -> None:
    good = [(torch.ones(3, 4, 4), 0)] * 4
    with pytest.raises(DataError, match=message):
        Dataset.from_torch(good, good, classes=3, transform=transform)
