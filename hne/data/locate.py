"""The search for data files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError


def locate(
    dataset: str,
    names: Sequence[str],
    data_dir: str | Path | None,
    *,
    advice: str,
    system: Sequence[str] = (),
) -> Path:
    """Find the first of ``names`` that exists, in the first folder that has one.

    Args:
        dataset: name of the data set, for the error text.
        names: file names relative to a folder, preferred first.
        data_dir: the only folder to search; without it, ``$HNE_DATA`` and then ``system`` are searched.
        advice: how to get the files, for the error text.
        system: folders where packages of the operating system install the files.

    Raises:
        DataError: a folder cannot be read, or nothing was found; the text names the folders searched and how to get
            the files.
    """
    if data_dir is not None:
        folders = [Path(data_dir).expanduser()]
    else:
        environment = os.environ.get("HNE_DATA")
        folders = [Path(environment).expanduser()] if environment else []
        folders += [Path(folder) for folder in system]
    for folder in folders:
        for name in names:
            if _exists(folder / name):
                return folder / name
    places = ", ".join(f"{folder}{'' if folder.is_dir() else ' (no such folder)'}" for folder in folders)
    ways = "" if data_dir is not None else "; --data-dir DIR or HNE_DATA=DIR name another folder"
    raise DataError(
        f"{dataset}: found none of {', '.join(names)} in {places or 'any folder (none was named)'}. {advice}{ways}"
    )


def read_file(path: Path) -> bytes:
    """Read a whole file.

    Raises:
        DataError: it is missing, a folder or unreadable.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _exists(path: Path) -> bool:
    """Tell whether there is a file or folder; a broken link is an error, since somebody put it there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise DataError(f"{path}: a link to a file that does not exist") from error
        return False
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return True
