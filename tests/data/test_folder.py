"""Images of your own in class folders, and the test images that are held out from them."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from data_files import write_image_folders
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from properties import property_test

from hne.data import FileImages, load_dataset
from hne.data.folder import hold_out
from hne.errors import DataError


def write_images(root: Path, **counts: int) -> None:
    """Write so many images of each class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{number}.png")


def paths_of(split: object) -> list[str]:
    assert isinstance(split, FileImages)
    return list(split.paths)


def test_both_splits(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    dataset = load_dataset("folder", tmp_path, image_size=20)
    assert dataset.name == "folder"
    assert dataset.classes == ("cat", "dog")
    assert dataset.input.size == (20, 20)
    assert dataset.held_out is None
    assert all(path.startswith(str(tmp_path / "train")) for path in paths_of(dataset.train))
    assert all(path.startswith(str(tmp_path / "val")) for path in paths_of(dataset.test))
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.warns(UserWarning, match=f"val_share: not used, since there is a folder {tmp_path / 'val'}"):
        again = load_dataset("folder", tmp_path, image_size=20, val_share=0.5)
    assert paths_of(again.train) == paths_of(dataset.train)


def test_test_images_are_held_out(tmp_path: Path) -> None:
    write_images(tmp_path / "train", a=20, b=5, c=2)
    dataset = load_dataset("folder", tmp_path, val_share=0.3)
    assert dataset.held_out == (0.3, 0)
    assert dataset.test.labels.bincount().tolist() == [6, 2, 1], "the share of each class, at least one"
    assert dataset.train.labels.bincount().tolist() == [14, 3, 1]
    train, test = set(paths_of(dataset.train)), set(paths_of(dataset.test))
    assert train.isdisjoint(test)
    assert len(train | test) == 27
    assert all(
        Path(path).parent.name == dataset.classes[label]
        for split in (dataset.train, dataset.test)
        for path, label in zip(paths_of(split), split.labels.tolist(), strict=True)
    )
    assert load_dataset("folder", tmp_path).test.labels.bincount().tolist() == [2, 1, 1], "a tenth by default"
    assert set(paths_of(load_dataset("folder", tmp_path, val_share=0.3, split_seed=1).test)) != test


def test_the_split_does_not_depend_on_place_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder, and a file system that lists its entries in another order."""
    write_images(tmp_path / "one" / "train", a=15, b=9)
    shutil.copytree(tmp_path / "one", tmp_path / "other" / "place")

    def test_names(folder: Path) -> list[str]:
        dataset = load_dataset("folder", folder, val_share=0.4)
        return [os.path.relpath(path, folder) for path in paths_of(dataset.test)]

    expected = test_names(tmp_path / "one")
    scandir = os.scandir

    class Shuffled:
        def __init__(self, path: str) -> None:
            self.found = scandir(path)

        def __enter__(self) -> list[os.DirEntry[str]]:
            entries = list(self.found)
            random.shuffle(entries)
            return entries

        def __exit__(self, *error: object) -> None:
            self.found.close()

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert test_names(tmp_path / "other" / "place") == expected
    assert test_names(tmp_path / "other" / "place") == expected


NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=8)


@property_test(60)
@given(
    st.dictionaries(NAMES, st.sets(NAMES, min_size=2, max_size=30), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
    st.integers(-5, 5),
    st.randoms(use_true_random=False),
)
def test_every_image_is_in_one_split(names: dict[str, set[str]], share: float, seed: int, order: random.Random) -> None:
    images = {name: sorted(f"/root/{name}/{file}" for file in files) for name, files in names.items()}
    train, test = hold_out(Path("/root"), images, share, seed)
    for name, paths in images.items():
        assert sorted(train[name] + test[name]) == paths
        assert abs(len(test[name]) - share * len(paths)) <= 1
        assert train[name]
        assert test[name]
    shuffled = {name: order.sample(paths, len(paths)) for name, paths in images.items()}
    _, other_test = hold_out(Path("/root"), shuffled, share, seed)
    assert {name: sorted(paths) for name, paths in other_test.items()} == test
    # An image that is added moves at most one other.
    name, paths = next(iter(images.items()))
    _, more = hold_out(Path("/root"), {name: [*paths, f"/root/{name}/x/new"]}, share, seed)
    assert len(set(test[name]) - set(more[name])) <= 1


def test_errors(tmp_path: Path) -> None:
    def error_of(message: str, **options: float) -> None:
        with pytest.raises((DataError, ValueError), match=message):
            load_dataset("folder", tmp_path, **options)

    error_of(f"folder: found none of train in {tmp_path}. Expected class folders of images, train/<class>/")
    (tmp_path / "train").mkdir()
    error_of(f"{tmp_path / 'train'}: expected a folder per class, found none. Expected class folders")
    write_images(tmp_path / "train", cat=1)
    error_of("expected at least two class folders, found one, cat")
    write_images(tmp_path / "train", dog=3)
    error_of(f"{tmp_path / 'train' / 'cat'}: expected at least 2 images, one of them to test on, found 1")
    for share in (0.0, 1.0, float("nan")):
        error_of("val_share: expected a number above 0 and below 1, got", val_share=share)
    write_images(tmp_path / "val", cat=1, bird=1)
    error_of(f"{tmp_path / 'val'}: class folder bird is not in {tmp_path / 'train'}")
    shutil.rmtree(tmp_path / "val" / "bird")
    error_of(f"{tmp_path / 'val'}: class folder dog is missing")
    write_images(tmp_path / "val", dog=1)
    broken = tmp_path / "val" / "dog" / "broken.png"
    broken.write_bytes(b"no image")
    error_of(f"{broken}: not a complete image")
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").symlink_to("nowhere")
    error_of(f"folder: expected a folder {tmp_path / 'val'}, found a broken link")
    (tmp_path / "val").unlink()
    (tmp_path / "val").touch()
    error_of(f"folder: expected a folder {tmp_path / 'val'}, found a file")
