"""Image files of a folder, without the files and folders that systems and tools leave there."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from pathlib import Path

from ..errors import DataError

EXTENSIONS = (
    *(".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2"),
)
_SYSTEM = frozenset(  # in lower case; hidden names are left out as well
    (
        *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "__macosx", "__pycache__"),
        *("$recycle.bin", "system volume information", "lost+found"),
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
    )
)
_TINY_IMAGENET = ("_boxes.txt", "_annotations.txt")  # text files beside the images


class LeftOut:
    """Entries below a folder that are not used, by the reason."""

    def __init__(self, root: str | Path) -> None:
        self.root = root
        self._paths: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, path: str) -> None:
        self._paths[reason].append(path)

    def update(self, other: LeftOut) -> None:
        for reason, paths in other._paths.items():
            self._paths[reason] += paths

    @property
    def remark(self) -> str:
        """For each reason the number of entries and an example, as the end of a message; empty without entries."""
        reasons = (
            f"{reason}: {len(paths)} ({os.path.relpath(min(paths), self.root)}{', ...' if len(paths) > 1 else ''})"
            for reason, paths in self._paths.items()
        )
        return f"; left out {'; '.join(reasons)}" if self._paths else ""

    def warn(self) -> None:
        """Warn once about all entries."""
        if self._paths:
            warnings.warn(f"{self.root}{self.remark}".replace("; ", ": ", 1), stacklevel=3)


def entries(folder: str | Path, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """List the folders and the image files directly in ``folder``, as sorted paths. Links are followed.

    Broken links, pipes and the like are listed as files if they have the extension of an image.

    Raises:
        DataError: ``folder`` cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
                    left_out.add("hidden or system entries", entry.path)
                elif _is_folder(entry):
                    folders.append(entry.path)
                elif entry.name.lower().endswith(EXTENSIONS):
                    files.append(entry.path)
                elif not entry.name.endswith(_TINY_IMAGENET):
                    left_out.add("files without an image extension", entry.path)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    return sorted(folders), sorted(files)


def images_below(folder: str | Path, left_out: LeftOut) -> list[str]:
    """List the image files in ``folder`` and all folders below it, sorted. Links are followed, except in circles.

    Raises:
        DataError: a folder cannot be read.
    """
    absolute = Path(folder).absolute()
    above = {*absolute.parents, *absolute.resolve().parents}  # a link to one of them leads back here
    paths = _walk(str(folder), left_out, tuple(map(_identity, above)))
    return sorted(paths, key=lambda path: path.split(os.sep))


def _walk(folder: str, left_out: LeftOut, above: tuple[tuple[int, int], ...]) -> list[str]:
    folders, files = entries(folder, left_out)
    if folders:
        above = (*above, _identity(folder))
    for inner in folders:
        if _identity(inner) in above:
            left_out.add("links back to a folder above", inner)
            continue
        within = _walk(inner, left_out, above)
        if not within and inner.lower().endswith(EXTENSIONS):
            left_out.add("folders named like images", inner)
        files += within
    return files


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
