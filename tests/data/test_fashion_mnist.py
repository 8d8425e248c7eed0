"""Fashion-MNIST: IDX files, whole and damaged."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_files import check_normalisation, idx_bytes, write_fashion_mnist

from hne.data import load_dataset
from hne.errors import DataError

INSTALLED_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")


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
        ("train-images-idx3-ubyte", lambda raw: idx_bytes(np.zeros((50, 28, 28), np.uint8)), "found zeros only"),
        ("train-images-idx3-ubyte", lambda raw: idx_bytes(np.zeros((50, 0, 28), np.uint8)), "found 50 x 0 x 28 pixels"),
        ("train-images-idx3-ubyte", lambda raw: idx_bytes(np.zeros((0, 28, 28), np.uint8)), "found 0 x 28 x 28 pixels"),
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


def test_missing_fashion_mnist_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
        load_dataset("fashion-mnist", tmp_path)


def test_unreadable_idx_files_are_named(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, zipped=False)
    path = tmp_path / "train-labels-idx1-ubyte"
    path.unlink()
    for make, problem in [
        (lambda: path.symlink_to("nowhere"), "a link to a file that does not exist"),
        (lambda: path.symlink_to(path.name), "cannot be read"),
        (lambda: path.mkdir(), "cannot be read"),
    ]:
        make()
        with pytest.raises(DataError, match=f"{path}: {problem}"):
            load_dataset("fashion-mnist", tmp_path)
        path.unlink() if path.is_symlink() else path.rmdir()


@pytest.mark.skipif(not INSTALLED_FASHION_MNIST.exists(), reason="package dataset-fashion-mnist is not installed")
def test_installed_fashion_mnist() -> None:
    dataset = load_dataset("fashion-mnist")
    assert (len(dataset.train), len(dataset.test)) == (60000, 10000)
    assert dataset.train.labels.bincount().tolist() == [6000] * 10
    check_normalisation(dataset)
