"""Folders of images with files and folders that are no images or classes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from data_files import write_image_folders
from PIL import Image

from hne.data import image_files, load_dataset, ood_images
from hne.errors import DataError

IMAGE = Image.new("RGB", (9, 9), (10, 20, 30))


def names(paths: Iterator[object] | tuple[object, ...] | list[Path], root: Path) -> list[str]:
    return [os.path.relpath(str(path), root) for path in paths]


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize(
    "folder",
    [
        *(".ipynb_checkpoints", ".git", ".hidden", ".Trash-1000", "@eaDir", "__MACOSX", "__pycache__", "lost+found"),
        *("$RECYCLE.BIN", "System Volume Information", "#recycle", ".@__thumb"),
    ],
)
@pytest.mark.parametrize("place", ["train", "val", "train/cat", "val/dog", "train/cat/nested"])
def test_hidden_and_system_folders_are_left_out(folder: str, place: str, tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    (tmp_path / place / folder / "inner").mkdir(parents=True)
    IMAGE.save(tmp_path / place / folder / "copy.png")
    IMAGE.save(tmp_path / place / folder / "inner" / "copy.png")
    with pytest.warns(UserWarning, match="left out hidden or system entries: 1") as caught:
        dataset = load_dataset("imagenet", tmp_path, image_size=8)
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{tmp_path / place.split('/')[0]}: ")
    assert folder in str(caught[0].message)
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.test)) == (6, 6)


def test_hidden_and_system_files_are_left_out(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    for name in ("._0.JPEG", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"\0\5\x16\7 no image")
        (tmp_path / "train" / name).write_bytes(b"\0\5\x16\7 no image")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "dog" / "0.xml").write_text("no image")
    IMAGE.save(tmp_path / "train" / "stray.png")
    with pytest.warns(UserWarning, match="left out") as caught:
        dataset = load_dataset("imagenet", tmp_path, image_size=8)
    (message,) = (str(warning.message) for warning in caught)
    assert "hidden or system entries: 10 (" in message
    assert f"files without an image extension: 2 (dog{os.sep}0.xml, ...)" in message
    assert "images outside of class folders: 1 (stray.png)" in message
    assert len(dataset.train) == 6
    with pytest.warns(UserWarning, match="left out"):
        assert len(image_files(tmp_path / "train")) == 7
    with no_warnings():
        assert len(image_files(tmp_path / "val")) == 6


def test_extensions_of_any_case_and_nested_folders(tmp_path: Path) -> None:
    write_image_folders(tmp_path, per_class=1)
    nested = tmp_path / "train" / "cat" / "session 1" / "images"
    nested.mkdir(parents=True)
    for name in ("a.PNG", "b.Jpg", "c.JFIF", "d.TIF"):
        IMAGE.save(nested / name, "JPEG")  # the content counts
    with no_warnings():
        dataset = load_dataset("imagenet", tmp_path, image_size=8)
    assert dataset.train.labels.tolist() == [0] * 5 + [1]
    found = names(dataset.train.paths, tmp_path / "train" / "cat")
    assert found[:5] == ["0.JPEG", *(f"session 1{os.sep}images{os.sep}{name}" for name in sorted(os.listdir(nested)))]
    assert dataset.train.pixels(torch.arange(6)).shape == (6, 8, 8, 3)


def test_links_are_followed_except_in_circles(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    store = tmp_path / "store"
    (store / "deep").mkdir(parents=True)
    IMAGE.save(store / "deep" / "one.png")
    (tmp_path / "train" / "linked").symlink_to(store)
    (tmp_path / "val" / "linked").symlink_to(store)
    (tmp_path / "train" / "cat" / "up").symlink_to("..")
    (tmp_path / "train" / "cat" / "here").symlink_to(".")
    (tmp_path / "train" / "cat" / "link.png").symlink_to(store / "deep" / "one.png")
    with pytest.warns(UserWarning, match="links back to a folder above"):
        dataset = load_dataset("imagenet", tmp_path, image_size=8)
    assert dataset.classes == ("cat", "dog", "linked")
    found = names(dataset.train.paths, tmp_path / "train")
    assert f"cat{os.sep}link.png" in found
    assert f"linked{os.sep}deep{os.sep}one.png" in found
    assert len(set(found)) == len(found) < 20
    # The link from "cat" to the folder of all classes brings no image of another class.
    assert [name for name in found if f"{os.sep}up{os.sep}" in name] == []


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("dangling", "a link to a file that does not exist"),
        ("self", "cannot be read"),
        ("empty", "the file is empty"),
        ("pipe", "found a pipe, socket or device"),
        ("text", "in no format that Pillow knows"),
        ("fork", "in no format that Pillow knows"),
        ("header", "not a complete image"),
    ],
)
def test_files_that_are_no_images_are_found_before_training(
    kind: str, problem: str, split: str, tmp_path: Path
) -> None:
    write_image_folders(tmp_path)
    path = tmp_path / split / "dog" / "x.png"
    if kind in ("dangling", "self"):
        path.symlink_to("x.png" if kind == "self" else "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        content = {"empty": b"", "text": b"<html>Not found</html>", "fork": b"\0\5\x16\7\0\2\0\0", "header": b"P5\n3 x"}
        path.write_bytes(content[kind])
    with pytest.raises(DataError, match=rf"^{path}: .*{problem}[^\n]*$"):
        load_dataset("imagenet", tmp_path, image_size=8)
    with pytest.raises(DataError, match=rf"^{path}: .*{problem}"):
        ood_images(tmp_path / split, load_dataset("digits").input)
    (tmp_path / split / "dog" / "y.png").touch()
    with pytest.raises(DataError, match=rf"^{path}: .*{problem}.* \(1 more cannot be read\)$"):
        load_dataset("imagenet", tmp_path, image_size=8)


def test_only_selected_files_are_checked(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    (tmp_path / "val" / "dog" / "x.png").touch()
    found = {len(load_dataset("imagenet", tmp_path, image_size=8, limit_test=1).test)}
    assert found == {1}


def test_folders_named_like_images(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    (tmp_path / "train" / "cat" / "x.png").mkdir()
    with pytest.warns(UserWarning, match=rf"folders named like images: 1 \(cat{os.sep}x\.png\)"):
        dataset = load_dataset("imagenet", tmp_path, image_size=8)
    assert len(dataset.train) == 6
    (tmp_path / "train" / "y.png").mkdir()
    (tmp_path / "val" / "y.png").mkdir()
    with pytest.raises(DataError, match=r"y\.png: expected images, found none"):
        load_dataset("imagenet", tmp_path, image_size=8)


def test_folders_without_usable_images_say_what_they_have(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    for path in (tmp_path / "train" / "cat").iterdir():
        path.rename(path.with_name(f"._{path.name}"))
    with pytest.raises(DataError, match=r"cat: expected images, found none; left out hidden or system entries: 3 \("):
        load_dataset("imagenet", tmp_path, image_size=8)
    with pytest.raises(DataError, match=r"cat: found no image files .*; left out hidden or system entries: 3 \("):
        image_files(tmp_path / "train" / "cat")


def test_unreadable_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in refuses to list a folder, since the superuser may list all."""
    write_image_folders(tmp_path)
    locked = tmp_path / "train" / "dog"
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=rf"{locked}: cannot be read \(Permission denied\)"):
        load_dataset("imagenet", tmp_path, image_size=8)
    with pytest.raises(DataError, match=rf"{locked}: cannot be read \(Permission denied\)"):
        image_files(tmp_path / "train")


def test_images_without_class_folders_are_said(tmp_path: Path) -> None:
    write_image_folders(tmp_path)
    for split in ("val", "train"):
        for number, path in enumerate(sorted((tmp_path / split).glob("*/*"))):
            path.rename(tmp_path / split / f"{number}.JPEG")
        for name in ("cat", "dog"):
            (tmp_path / split / name).rmdir()
        folder = tmp_path / split
        with pytest.raises(DataError, match=f"{folder}: expected a folder per class, found 6 images outside of class"):
            load_dataset("imagenet", tmp_path, image_size=8)


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "train").touch()
    with pytest.raises(DataError, match=f"expected a folder {tmp_path / 'train'}, found a file"):
        load_dataset("imagenet", tmp_path)
