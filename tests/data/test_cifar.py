"""CIFAR-10 and CIFAR-100: folders and archives, whole and damaged."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import CIFAR, write_cifar

from hne.data import load_dataset
from hne.errors import DataError


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
        (lambda raw: bytes(len(raw)), "expected images, found zeros only"),
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


def test_unreadable_cifar_files_are_named(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", zipped=False)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.unlink()
    path.symlink_to("data_batch_2.bin")
    with pytest.raises(DataError, match=r"cifar-10-batches-bin: data_batch_2\.bin is missing"):
        load_dataset("cifar10", tmp_path)
    (tmp_path / "cifar-100-binary.tar.gz").mkdir()
    with pytest.raises(DataError, match=r"cifar-100-binary\.tar\.gz: truncated or damaged archive \(.*directory"):
        load_dataset("cifar100", tmp_path)


def test_damaged_cifar_archives_raise_nothing_else(tmp_path: Path, rng: torch.Generator) -> None:
    write_cifar(tmp_path, "cifar10", zipped=True)
    path = tmp_path / "cifar-10-binary.tar.gz"
    raw = gzip.decompress(path.read_bytes())
    headers = [index for index in range(0, len(raw), 512) if raw[index + 257 : index + 262] == b"ustar"]
    errors = []
    for header in headers * 3:
        damaged = bytearray(raw)
        for place in torch.randint(512, (3,), generator=rng).tolist():
            damaged[header + place] ^= 0x5A
        path.write_bytes(gzip.compress(damaged, 1))
        with pytest.raises(DataError) as error:
            load_dataset("cifar10", tmp_path)
        errors.append(str(error.value))
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in errors)
