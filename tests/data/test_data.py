"""Data sets: files in their real formats, broken ones, augmentation, and which image stands in which batch."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hne.data import (
    DATASETS,
    Dataset,
    InputFormat,
    MemoryImages,
    evaluation_batches,
    foreign_images,
    load_dataset,
    training_batches,
)
from hne.data.augment import RESIZED_CROP_DRAWS, crop_and_flip, resized_crop_box
from hne.errors import DataError

INSTALLED_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")


@pytest.fixture(autouse=True)
def _no_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HNE_DATA", raising=False)


# IDX: Fashion-MNIST -------------------------------------------------------------------------------------------------


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


def write_fashion_mnist(folder: Path, *, zipped: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (50, 28, 28), np.uint8),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 50, np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (20, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 20, np.uint8),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        raw = idx_bytes(values)
        (folder / f"{name}.gz").write_bytes(gzip.compress(raw)) if zipped else (folder / name).write_bytes(raw)
    return arrays


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["data_dir", "environment", "subfolder"])
def test_fashion_mnist(zipped: bool, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = write_fashion_mnist(tmp_path / "fashion-mnist" if place == "subfolder" else tmp_path, zipped=zipped)
    if place == "environment":
        monkeypatch.setenv("HNE_DATA", str(tmp_path))
    dataset = load_dataset("fashion-mnist", None if place == "environment" else tmp_path)
    assert dataset.classes[0] == "T-shirt/top"
    assert dataset.input.size == (28, 28)
    np.testing.assert_array_equal(dataset.train.images[..., 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(dataset.train.labels, arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(dataset.test.images[..., 0], arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(dataset.test.labels, arrays["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("train-images-idx3-ubyte", lambda raw: raw[:-1], "50x28x28 = 39200 bytes after the header, found 39199"),
        ("t10k-images-idx3-ubyte", lambda raw: raw + b"x", "found 15681"),
        ("t10k-labels-idx1-ubyte", lambda raw: b"", "found nothing in a file of 0 bytes"),
        ("t10k-labels-idx1-ubyte", lambda raw: raw[:6], "in a file of 6 bytes"),
        ("train-images-idx3-ubyte", lambda raw: b"\0\0\x0d\3" + raw[4:], "0x00000803.*found 0x00000d03"),
        ("train-labels-idx1-ubyte", lambda raw: idx_bytes(np.zeros(49, np.uint8)), "50 images.*found 49"),
        ("train-labels-idx1-ubyte", lambda raw: idx_bytes(np.full(50, 10, np.uint8)), "from 0 to 9, found 10"),
        ("train-images-idx3-ubyte", lambda raw: gzip.compress(raw)[:-100], "truncated or damaged gzip"),
        ("train-images-idx3-ubyte", lambda raw: gzip.compress(raw)[:-8] + bytes(8), "truncated or damaged gzip"),
        (
            "t10k-images-idx3-ubyte",
            lambda raw: idx_bytes(np.zeros((20, 32, 32), np.uint8)),
            r"training images are \(28, 28\) pixels, the test images \(32, 32\)",
        ),
    ],
)
def test_damaged_idx_file(name: str, spoil: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, zipped=False)
    (tmp_path / name).write_bytes(spoil((tmp_path / name).read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        load_dataset("fashion-mnist", tmp_path)
    assert str(error.value).startswith((str(tmp_path / name), "fashion-mnist:"))


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "imagenet"])
def test_missing_files_say_where_and_how(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, absent = tmp_path / "empty", tmp_path / "absent"
    empty.mkdir()
    with pytest.raises(DataError, match=rf"{name}: found none of .* in {empty}\. "):
        load_dataset(name, empty)
    with pytest.raises(DataError, match=rf"{absent} \(no such folder\)"):
        load_dataset(name, absent)
    if name != "fashion-mnist":  # that one may be installed
        monkeypatch.setenv("HNE_DATA", str(empty))
        with pytest.raises(DataError, match=rf"in {empty}.*--data-dir DIR or HNE_DATA=DIR"):
            load_dataset(name)


def test_missing_fashion_mnist_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.skipif(not INSTALLED_FASHION_MNIST.exists(), reason="package dataset-fashion-mnist is not installed")
def test_installed_fashion_mnist() -> None:
    dataset = load_dataset("fashion-mnist")
    assert (len(dataset.train), len(dataset.test)) == (60000, 10000)
    assert dataset.train.labels.bincount().tolist() == [6000] * 10
    check_normalisation(dataset)


def check_normalisation(dataset: Dataset) -> None:
    """The published mean and deviation are those of the training images."""
    pixels = dataset.train.images.double() / 255
    torch.testing.assert_close(pixels.mean((0, 1, 2)), torch.tensor(dataset.input.mean).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std((0, 1, 2)), torch.tensor(dataset.input.std).double(), atol=1e-4, rtol=0)


# CIFAR --------------------------------------------------------------------------------------------------------------

CIFAR = {
    "cifar10": (
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test_batch.bin",
        "batches.meta.txt",
    ),
    "cifar100": (
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
        ["train.bin"],
        "test.bin",
        "fine_label_names.txt",
    ),
}


def write_cifar(root: Path, name: str, *, zipped: bool) -> dict[str, np.ndarray]:
    """Four records per file, in the folder or the archive; returns the records by file name."""
    folder, archive, train, test, names = CIFAR[name]
    classes = 10 if name == "cifar10" else 100
    rng = np.random.default_rng(1)
    records = {}
    for file in (*train, test):
        pixels = rng.integers(0, 256, (4, 3072), np.uint8)
        labels = rng.integers(0, classes, (4, 1), np.uint8)
        coarse = labels % 20 if name == "cifar100" else labels[:, :0]
        records[file] = np.hstack([coarse, labels, pixels]).astype(np.uint8)
    content = {file: values.tobytes() for file, values in records.items()}
    content[names] = "".join(f"thing_{i}\n" for i in range(classes)).encode()
    (root / folder).mkdir(parents=True)
    for file, raw in content.items():
        (root / folder / file).write_bytes(raw)
    if zipped:
        with tarfile.open(root / archive, "w:gz") as tar:
            tar.add(root / folder, folder)
        for file in content:
            (root / folder / file).unlink()
        (root / folder).rmdir()
    return records


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.filterwarnings("ignore:.*the published file has")
def test_cifar(name: str, zipped: bool, tmp_path: Path) -> None:
    records = write_cifar(tmp_path, name, zipped=zipped)
    _, _, train, test, _ = CIFAR[name]
    dataset = load_dataset(name, tmp_path)
    label = 0 if name == "cifar10" else 1
    for split, files in ((dataset.train, train), (dataset.test, [test])):
        expected = np.concatenate([records[file] for file in files])
        np.testing.assert_array_equal(split.labels, expected[:, label])
        planes = expected[:, label + 1 :].reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(split.images.permute(0, 3, 1, 2), planes)
    assert dataset.classes[3] == "thing_3"
    assert len(dataset.classes) == (10 if name == "cifar10" else 100)


def test_cifar_folder_itself_without_class_names(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", zipped=False)
    folder = tmp_path / "cifar-10-batches-bin"
    (folder / "batches.meta.txt").unlink()
    with pytest.warns(UserWarning, match="4 images, the published file has 10000"):
        dataset = load_dataset("cifar10", folder)
    assert dataset.classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:-5], "expected 10000 records of 3073 bytes = 30730000 bytes, found 12287, not a whole"),
        (lambda raw: b"", "found 0"),
        (lambda raw: raw[:3073] + b"\x0a" + raw[3074:], "expected labels below 10, found 10 in record 1"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the published file has")
def test_damaged_cifar_file(spoil: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", zipped=False)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        load_dataset("cifar10", tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_truncated_cifar_archive(share: float, tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", zipped=True)
    path = tmp_path / "cifar-10-binary.tar.gz"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(DataError, match=rf"{path}: (truncated or damaged archive|.* is missing)"):
        load_dataset("cifar10", tmp_path)


def test_incomplete_cifar(tmp_path: Path) -> None:
    write_cifar(tmp_path / "folder", "cifar10", zipped=False)
    (tmp_path / "folder" / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-bin: data_batch_2\.bin is missing"):
        load_dataset("cifar10", tmp_path / "folder")
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-100-binary/train.bin"), io.BytesIO())
    with pytest.raises(DataError, match=r"test\.bin is missing from the archive"):
        load_dataset("cifar100", tmp_path)


# Folders of pictures ------------------------------------------------------------------------------------------------


def write_pictures(root: Path, per_class: int = 3) -> None:
    rng = np.random.default_rng(2)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (40 + 10 * i, 60, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.JPEG")


def test_imagenet(tmp_path: Path) -> None:
    write_pictures(tmp_path)
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
    """Shorter side to 8/7 of the size, then the centre: a white square in a black frame stays white."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[4:60, 36:92] = 255
    Image.fromarray(pixels).save(tmp_path / "square.png")
    input_format = InputFormat(3, (56, 56), (0.0,) * 3, (1.0,) * 3, resize=64)
    assert (input_format.read(tmp_path / "square.png") == 255).all()


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    path = tmp_path / "train" / "cat" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:-200])
    dataset = load_dataset("imagenet", tmp_path, image_size=32)
    batches = training_batches(dataset.train, dataset.input, 2, torch.Generator())
    with pytest.raises(DataError, match=rf"{path}: not a complete image"):
        list(batches)


def test_incomplete_picture_folders(tmp_path: Path) -> None:
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


# Digits and limits --------------------------------------------------------------------------------------------------


def test_digits() -> None:
    dataset, again = load_dataset("digits"), load_dataset("digits")
    assert (len(dataset.train), len(dataset.test)) == (901, 896)
    assert torch.equal(dataset.train.images, again.train.images)
    shares = dataset.train.labels.bincount() - dataset.test.labels.bincount()
    assert shares.min() >= 0
    assert shares.max() <= 1, "stratified"
    check_normalisation(dataset)


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
    assert set(DATASETS) == {"digits", "fashion-mnist", "cifar10", "cifar100", "imagenet", "diabetes"}


# Foreign images -----------------------------------------------------------------------------------------------------

RGB = InputFormat(3, (16, 20), (0.5,) * 3, (0.2,) * 3)
GREY = InputFormat(1, (12, 12), (0.5,), (0.2,), resize=14)


@pytest.mark.parametrize("wanted", [RGB, GREY])
def test_foreign_images_of_a_data_set(wanted: InputFormat, tmp_path: Path) -> None:
    digits = load_dataset("digits").test
    found = foreign_images("digits", wanted, limit=30)
    assert len(found) == 30
    pixels = foreign_images("digits", wanted).pixels(torch.tensor([5]))[0]
    Image.fromarray(digits.images[5, :, :, 0].numpy()).save(tmp_path / "digit.png")
    np.testing.assert_array_equal(pixels, wanted.read(tmp_path / "digit.png"), "as the picture would be read")


def test_foreign_images_of_colours(tmp_path: Path) -> None:
    records = write_cifar(tmp_path, "cifar10", zipped=False)["test_batch.bin"]
    with pytest.warns(UserWarning, match="the published file has"):
        found = foreign_images("cifar10", InputFormat(1, (32, 32), (0.5,), (0.2,)), tmp_path)
    red, green, blue = records[2, 1:].reshape(3, 32, 32).astype(float)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R 601
    assert np.abs(found.pixels(torch.tensor([2]))[0, :, :, 0].numpy() - luma).max() <= 1


def test_foreign_images_of_files(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    of_set = foreign_images("imagenet", GREY, tmp_path)
    of_folder = foreign_images(tmp_path / "val", GREY)
    assert len(of_set) == len(of_folder) == 6
    indices = torch.arange(6)
    assert torch.equal(of_set.pixels(indices), of_folder.pixels(indices))
    assert len(foreign_images(tmp_path / "val", GREY, limit=2)) == 2
    with pytest.raises(DataError, match="no such folder"):
        foreign_images(tmp_path / "none", GREY)
    with pytest.raises(DataError, match="diabetes: expected images, which this data set has not"):
        foreign_images("diabetes", GREY)


# Augmentation -------------------------------------------------------------------------------------------------------


def test_crop_and_flip_is_a_window_of_the_padded_image(rng: torch.Generator) -> None:
    images = torch.randint(1, 256, (200, 9, 7, 3), generator=rng, dtype=torch.uint8)
    noise = torch.rand(200, 3, generator=rng, dtype=torch.float64)
    noise[0], noise[1] = 0, 1 - 2**-53
    result = crop_and_flip(images, noise, pad=2, flip=True)
    for image, (row, column, flip), got in zip(images.numpy(), noise.tolist(), result.numpy(), strict=True):
        top, left = int(row * 5), int(column * 5)
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        window = padded[top : top + 9, left : left + 7]
        np.testing.assert_array_equal(got, window[:, ::-1] if flip < 0.5 else window)


def test_augmentation_is_uniform() -> None:
    images = MemoryImages(torch.zeros(1, 8, 8, 1).byte(), torch.zeros(1).long(), pad=4, flip=True)
    noise = images.draw(9000, torch.Generator().manual_seed(0))
    offsets = (noise[:, :2] * 9).long()
    for axis in range(2):
        counts = offsets[:, axis].bincount(minlength=9).double()
        assert (counts - 1000).abs().max() < 150  # five standard deviations
    assert abs((noise[:, 2] < 0.5).double().mean() - 0.5) < 0.03


def test_no_padding_and_no_flip_change_nothing(rng: torch.Generator) -> None:
    images = torch.randint(0, 256, (20, 8, 8, 1), generator=rng, dtype=torch.uint8)
    noise = torch.rand(20, 3, generator=rng, dtype=torch.float64)
    assert torch.equal(crop_and_flip(images, noise, pad=0, flip=False), images)


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    noise=st.lists(st.floats(0, 1, exclude_max=True), min_size=RESIZED_CROP_DRAWS, max_size=RESIZED_CROP_DRAWS),
)
def test_resized_crop_lies_in_the_image(width: int, height: int, noise: list[float]) -> None:
    left, top, right, bottom = resized_crop_box(width, height, noise)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_resized_crop_has_the_right_area_and_aspect() -> None:
    noise = torch.rand(2000, RESIZED_CROP_DRAWS, generator=torch.Generator().manual_seed(0)).tolist()
    boxes = torch.tensor([resized_crop_box(400, 400, row) for row in noise]).double()
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / 400**2, w / h
    assert area.min() > 0.075
    assert area.max() <= 1
    assert aspect.min() > 0.73
    assert aspect.max() < 1.36
    assert abs(aspect.log().mean()) < 0.02, "as often wide as tall"


# Batches ------------------------------------------------------------------------------------------------------------


def numbered(count: int, pad: int = 0) -> tuple[MemoryImages, InputFormat]:
    """Images whose pixels are their number."""
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
    """Decoded ahead by threads, and still a function of the generator alone."""
    write_pictures(tmp_path, per_class=6)
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
