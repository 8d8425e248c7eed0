"""Corruptions: each against its definition, files of CIFAR-10-C, and evaluation on both."""

from __future__ import annotations

import colorsys
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from hne import FusedHNE
from hne.data import (
    CORRUPTIONS,
    SEVERITIES,
    CorruptedImages,
    Dataset,
    InputFormat,
    MemoryImages,
    corrupt,
    corrupted_images,
    evaluation_batches,
    load_dataset,
)
from hne.data.corruptions.blur import _disc
from hne.errors import DataError
from hne.evaluation import evaluate, evaluate_corruptions, mean_metrics

SHAPES = ((8, 8, 1), (32, 32, 3), (32, 20, 3), (70, 96, 3), (1, 1, 1), (2, 5, 3))


@pytest.fixture
def numbers(rng: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, (), generator=rng)))


def natural(numbers: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """A smooth random image with all grey levels, black and white among them."""
    image = numbers.normal(size=shape)
    if min(shape[:2]) > 4:
        image = ndimage.gaussian_filter(image, (1.5, 1.5, 0))
    span = np.ptp(image) or 1
    return np.rint(255 * (image - image.min()) / span).astype(np.uint8)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


# Each corruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_and_repetition(name: str, shape: tuple[int, int, int], numbers: np.random.Generator) -> None:
    image = natural(numbers, shape)
    before = image.copy()
    for severity in SEVERITIES:
        changed = corrupt(image, name, severity, (3, 5))
        assert (changed.shape, changed.dtype) == (shape, np.uint8)
        assert np.array_equal(changed, corrupt(image, name, severity, (3, 5)))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severities_rise(name: str, size: int, numbers: np.random.Generator) -> None:
    images = [natural(numbers, (size, size, 3)) for _ in range(12)]
    distances = [
        np.mean([distance(corrupt(image, name, severity, index), image) for index, image in enumerate(images)])
        for severity in SEVERITIES
    ]
    assert all(a < b for a, b in zip([0.0, *distances], distances, strict=False)), distances


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise"])
def test_noise_differs_between_seeds_and_severities(name: str, numbers: np.random.Generator) -> None:
    image = natural(numbers, (32, 32, 3))
    results = [corrupt(image, name, severity, seed) for severity in (4, 5) for seed in (0, 1, (0, 1))]
    assert len({result.tobytes() for result in results}) == 6


def test_distributions_of_noise() -> None:
    grey = np.full((256, 250, 3), 128, np.uint8)
    gaussian = corrupt(grey, "gaussian_noise", 2).astype(float) / 255
    assert gaussian.std() == pytest.approx(0.12, rel=0.02)
    assert gaussian.mean() == pytest.approx(128 / 255, abs=0.003)
    photons = corrupt(grey, "shot_noise", 1).astype(float) / 255
    assert photons.mean() == pytest.approx(128 / 255, abs=0.003)
    assert photons.var() == pytest.approx(128 / 255 / 60, rel=0.05)
    impulses = corrupt(grey, "impulse_noise", 4)
    for value in (0, 255):
        assert np.mean(impulses == value) == pytest.approx(0.17 / 2, abs=0.004)
    assert np.mean(impulses == 128) == pytest.approx(0.83, abs=0.005)


def test_brightness_raises_the_value_in_hsv(numbers: np.random.Generator) -> None:
    image = natural(numbers, (6, 7, 3))
    image[0, 0] = 0
    changed = corrupt(image, "brightness", 3) / 255
    for before, after in zip(image.reshape(-1, 3) / 255, changed.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        np.testing.assert_allclose(after, colorsys.hsv_to_rgb(hue, saturation, min(value + 0.15, 1)), atol=0.6 / 255)
    grey = natural(numbers, (8, 8, 1))
    np.testing.assert_allclose(corrupt(grey, "brightness", 3) / 255, np.minimum(grey / 255 + 0.15, 1), atol=0.6 / 255)


def test_contrast_keeps_the_mean_of_each_channel(numbers: np.random.Generator) -> None:
    image = natural(numbers, (32, 32, 3))
    mean = image.mean((0, 1))
    np.testing.assert_allclose(corrupt(image, "contrast", 5), mean + 0.15 * (image - mean), atol=0.6)


@pytest.mark.parametrize(
    ("size", "severity", "radius", "smoothing"), [(32, 5, 1.5, 0.1), (32, 2, 0.4, 0.5), (80, 5, 10, 0.5)]
)
def test_defocus_is_a_convolution_with_a_disc(
    size: int, severity: int, radius: float, smoothing: float, numbers: np.random.Generator
) -> None:
    kernel = _disc(radius, smoothing)
    assert kernel.sum() == pytest.approx(1)
    x = np.arange(len(kernel)) - len(kernel) // 2
    inside = x[:, None] ** 2 + x**2 <= radius**2
    assert (kernel[inside] > 0).all()
    assert kernel[inside].sum() > 0.6, "most of the light stays in the disc"
    image = natural(numbers, (size, size, 3))
    expected = [ndimage.convolve(image[..., c] / 255, kernel, mode="mirror") for c in range(3)]
    np.testing.assert_allclose(corrupt(image, "defocus_blur", severity) / 255, np.stack(expected, -1), atol=0.6 / 255)


def test_pixelate_and_jpeg_are_those_of_pillow(numbers: np.random.Generator, tmp_path: Path) -> None:
    for shape in ((32, 20, 3), (8, 8, 1)):
        image = natural(numbers, shape)
        picture = Image.fromarray(image[..., 0] if shape[-1] == 1 else image)
        small = picture.resize((int(shape[1] * 0.65), int(shape[0] * 0.65)), Image.Resampling.BOX)
        expected = np.asarray(small.resize(picture.size, Image.Resampling.BOX)).reshape(shape)
        assert np.array_equal(corrupt(image, "pixelate", 5), expected)
        picture.save(tmp_path / "a.jpg", quality=40)
        with Image.open(tmp_path / "a.jpg") as compressed:
            assert np.array_equal(corrupt(image, "jpeg_compression", 5), np.asarray(compressed).reshape(shape))


def test_unknown_corruptions() -> None:
    image = np.zeros((4, 4, 1), np.uint8)
    with pytest.raises(ValueError, match=r"corruption: expected one of gaussian_noise, .*, got 'rain'"):
        corrupt(image, "rain", 1)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=f"severity: expected a whole number from 1 to 5, got {severity}"):
            corrupt(image, "contrast", severity)


# A split --------------------------------------------------------------------------------------------------------------


def pixels_of(images: CorruptedImages | MemoryImages, input_format: InputFormat, batch_size: int) -> torch.Tensor:
    return torch.cat([batch for batch, _ in evaluation_batches(images, input_format, batch_size)])


def test_batches_do_not_change_the_noise() -> None:
    digits = load_dataset("digits", limit_test=23)
    corrupted = CorruptedImages(digits.test, "shot_noise", 4, seed=7)
    whole = pixels_of(corrupted, digits.input, 23)
    assert len(corrupted) == 23
    assert torch.equal(whole, pixels_of(corrupted, digits.input, 5))
    assert not torch.equal(whole, pixels_of(CorruptedImages(digits.test, "shot_noise", 4), digits.input, 23))
    share = [batch for batch, _ in evaluation_batches(corrupted, digits.input, 5, rank=1, world_size=2)]
    assert torch.equal(torch.cat(share), torch.cat([whole[5:10], whole[15:20]])), "of the second of two processes"
    index, image = 11, digits.test.pixels(torch.tensor([11]))[0].numpy()
    expected = torch.from_numpy(corrupt(image, "shot_noise", 4, (7, index)))[None]
    assert torch.equal(whole[index : index + 1], digits.input.normalise(expected))


def test_splits_that_cannot_be_corrupted() -> None:
    floats = MemoryImages(torch.rand(3, 4, 4, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(DataError, match=r"corruptions: expected images of uint8, got torch\.float32"):
        pixels_of(CorruptedImages(floats, "contrast", 1), InputFormat(1, (4, 4), (0.0,), (1.0,)), 2)
    for seed in (-1, 1.5, True):
        with pytest.raises(ValueError, match=re.escape(f"seed: expected a whole number of at least 0, got {seed!r}")):
            CorruptedImages(floats, "contrast", 1, seed)  # type: ignore[arg-type]


# Files of CIFAR-10-C --------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(rng: torch.Generator) -> Dataset:
    """Random images in the format of CIFAR-10."""
    images = torch.randint(256, (6, 32, 32, 3), generator=rng, dtype=torch.uint8)
    split = MemoryImages(images, torch.arange(6))
    return Dataset("like-cifar10", tuple("abcdefghij"), InputFormat(3, (32, 32), (0.5,) * 3, (0.25,) * 3), split, split)


@pytest.fixture
def folder(dataset: Dataset, numbers: np.random.Generator, tmp_path: Path) -> Path:
    """A folder in the format of CIFAR-10-C: five severities of six images, one after the other."""
    for name in ("fog", "snow"):
        np.save(tmp_path / f"{name}.npy", numbers.integers(0, 256, (30, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.tile(np.arange(6, dtype=np.uint8), 5))
    return tmp_path


def test_files_are_read_by_severity(folder: Path, dataset: Dataset) -> None:
    found = corrupted_images(folder, dataset)
    assert [(name, severity) for name, severity, _ in found] == [(n, s) for n in ("fog", "snow") for s in SEVERITIES]
    for name, severity, images in found:
        assert isinstance(images, MemoryImages)
        part = slice(6 * (severity - 1), 6 * severity)
        assert np.array_equal(images.images.numpy(), np.load(folder / f"{name}.npy")[part])
        assert torch.equal(images.labels, torch.arange(6))
        assert images.labels.dtype == torch.int64
    some = corrupted_images(str(folder), dataset, severities=(2, 5), limit=4)
    assert [(name, severity, len(images)) for name, severity, images in some] == [
        (name, severity, 4) for name in ("fog", "snow") for severity in (2, 5)
    ]


def test_folders_that_do_not_fit(folder: Path, dataset: Dataset, tmp_path: Path) -> None:
    def error(source: str | Path) -> str:
        with pytest.raises(DataError) as raised:
            corrupted_images(source, dataset)
        return str(raised.value)

    assert "nowhere: no such folder; the corruptions by name are gaussian_noise, " in error("nowhere")
    np.save(folder / "snow.npy", np.zeros((30, 32, 32), np.uint8))
    assert re.search(
        r"snow.npy: expected uint8 \[30, height, width, channels\], got uint8 \[30, 32, 32\]", error(folder)
    )
    np.save(folder / "snow.npy", np.zeros((30, 28, 28, 3), np.uint8))
    assert "snow.npy: expected images [32, 32, 3], as in like-cifar10, got [28, 28, 3]" in error(folder)
    np.savez(folder / "several.npz", images=np.zeros((30, 32, 32, 3), np.uint8))
    (folder / "several.npz").replace(folder / "snow.npy")
    assert "snow.npy: not an array of NumPy" in error(folder)
    np.save(folder / "snow.npy", np.array([None]), allow_pickle=True)
    assert "snow.npy: not an array of NumPy" in error(folder)
    (folder / "snow.npy").write_bytes(b"")
    assert "snow.npy: not an array of NumPy" in error(folder)
    for labels, message in (
        (np.full(30, 12), "labels.npy: expected the 10 classes of like-cifar10, got labels from 12 to 12"),
        (np.zeros(29, np.int64), "labels.npy: expected whole numbers for 5 severities, got int64 [29]"),
        (np.zeros(30), "labels.npy: expected whole numbers for 5 severities, got float64 [30]"),
    ):
        np.save(folder / "labels.npy", labels)
        assert message in error(folder)
    (folder / "labels.npy").unlink()
    assert "expected labels.npy and a file NAME.npy for each corruption" in error(folder)


def test_sources_and_severities(dataset: Dataset) -> None:
    assert len(corrupted_images("all", dataset)) == 5 * len(CORRUPTIONS)
    found = corrupted_images("contrast,pixelate,contrast", dataset, severities=(5, 1), seed=3)
    assert [(name, severity) for name, severity, _ in found] == [
        (name, severity) for name in ("contrast", "pixelate") for severity in (5, 1)
    ]
    assert found[0].images == CorruptedImages(dataset.test, "contrast", 5, 3)
    for severities in ((), (1, 6)):
        with pytest.raises(ValueError, match=r"severities: expected some of 1, 2, 3, 4, 5, got \["):
            corrupted_images("all", dataset, severities=severities)
    with pytest.raises(DataError, match="corruptions: expected images with classes; diabetes has none"):
        corrupted_images("all", load_dataset("diabetes"))


# Evaluation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_evaluation_is_that_of_the_corrupted_images(average: str, folder: Path, dataset: Dataset) -> None:
    model = FusedHNE.from_preset("hne_tiny", num_classes=10, width=0.25)
    corrupted = [*corrupted_images("contrast", dataset, severities=(2, 4)), *corrupted_images(folder, dataset)[:2]]
    found = evaluate_corruptions(model, dataset, corrupted, average=average, batch_size=4)
    assert [(f.corruption, f.severity) for f in found] == [("contrast", 2), ("contrast", 4), ("fog", 1), ("fog", 2)]
    for evaluation, (_, _, images) in zip(found, corrupted, strict=True):
        pixels = torch.cat([p for p, _ in images.batches(iter([(torch.arange(6), None)]))])
        split = MemoryImages(pixels, torch.arange(6))
        same = Dataset(dataset.name, dataset.classes, dataset.input, split, split)
        assert evaluation.evaluation == evaluate(model, same, average=average, batch_size=4)
    means = mean_metrics(found)
    for index, mean in enumerate(means):
        rows = [f.evaluation.ensembles[index] for f in found]
        assert (mean.num_models, mean.macs) == (rows[0].num_models, rows[0].macs)
        for metric in ("accuracy", "nll", "ece", "mutual_information"):
            assert getattr(mean, metric) == pytest.approx(sum(getattr(row, metric) for row in rows) / 4)
