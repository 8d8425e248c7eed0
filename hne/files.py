"""Files that are always complete: a failure during a write leaves the previous version in place."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from .errors import FileError, FolderLockedError, ResultError

# Names of temporary files: the machine, the process, a random part. No other program uses such names.
_TEMPORARY = re.compile(r"\.hne-tmp-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{12}(\.\w{1,16})?")
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_DAY = 24 * 3600

_LOCK = ".hne-lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF, errno.EIO)
_locked: set[tuple[str, int]] = set()  # folders that this process has locked, and the thread

_REASONS = {
    errno.ENOSPC: "the disk is full: free some space, or name another place",
    errno.EDQUOT: "the disk quota is used up: free some space, or name another place",
    errno.EFBIG: "larger than a file may be here: name another place",
    errno.EACCES: "permission denied: name another place, or change the permissions",
    errno.EPERM: "permission denied: name another place, or change the permissions",
    errno.EROFS: "the file system is read-only: name another place",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EISDIR: "is a folder, expected a file: add a file name",
    errno.ENOTDIR: "a part of the path is a file, expected a folder: name another place",
    errno.EEXIST: "is a file, expected a folder: name another place",
    errno.ELOOP: "a link that leads back to itself: name another place",
}


# One file -------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of a temporary file, whose content becomes that of ``path`` if the block ends without an error.

    - A regular file, or a new one, is replaced by a rename within its folder. The content is on disk before the rename,
      and the rename is on disk before this function returns: a killed process or a power failure leaves either the old
      file or the new one. The file keeps its mode, and its owner if the process may set it; a new file has the mode
      that the umask gives. Another hard link to the old file keeps the old content.
    - A symbolic link stays, and the file that it names is replaced.
    - Pipes, devices, and descriptors (``/dev/stdout``, ``/dev/fd/3``) receive the content when the block has ended.
    - An existing file that cannot be renamed over (its folder is read-only, or the file is a mount point) is
      overwritten in place. Only this case can leave a part of the file, after a crash during the copy.

    The temporary file has the suffix of ``path``, and is removed however the block ends.

    Args:
        path: The file.

    Raises:
        FileError: The file cannot be written. The message names ``path``, also for an ``OSError`` of the block.
    """
    path = Path(path)
    with _errors_naming(path), ExitStack() as stack:
        target = _regular_target(path)
        if target is None:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hne-"))) / f"file{_suffix(path)}"
            yield temporary
            _write_through(temporary, path)
            return
        temporary = target.with_name(_temporary_name(target))
        stack.callback(_remove, temporary)
        before = _status(target)
        try:
            mode = _create(temporary, before)
        except OSError as error:
            if before is None or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hne-"))) / f"file{_suffix(path)}"
            mode = None
        yield temporary
        if mode is None:
            _overwrite(temporary, target)
            return
        _sync(temporary)
        _inherit(temporary, mode, before)
        try:
            temporary.replace(target)
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            _overwrite(temporary, target)
        _sync(target.parent)


@contextmanager
def replacing_text(path: str | Path) -> Iterator[TextIO]:
    """Yield a text file in UTF-8 that replaces ``path``; see :func:`replacing`. Lines end as they are written."""
    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8. Bytes of file names that are no UTF-8 are written as ``\\udcXX``."""
    with replacing_text(path) as file:
        file.write(text)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write indented JSON.

    Raises:
        ResultError: A number is NaN or infinite, which JSON cannot represent; the message names the first one.
        FileError: As :func:`replacing`.
    """
    write_text(path, to_json(values, path, indent=2) + "\n")


def to_json(values: Any, path: str | Path, *, indent: int | None = None) -> str:
    """The JSON of some values.

    Args:
        values: Values that JSON can represent.
        path: The file they are for, for the error text.
        indent: As for ``json.dumps``.

    Raises:
        ResultError: A number is NaN or infinite; the message names the first one.
    """
    wrong = first_not_finite(values)
    if wrong is not None:
        name, number = wrong
        raise ResultError(f"{path}: not written: {name} is {number}, expected a finite number")
    return json.dumps(values, indent=indent, allow_nan=False)


def first_not_finite(values: Any, name: str = "") -> tuple[str, float] | None:
    """Name and value of the first number that is NaN or infinite in nested dicts and sequences; None without one."""
    if isinstance(values, float):
        return None if math.isfinite(values) else (name, values)
    items: list[tuple[str, Any]] = []
    if isinstance(values, Mapping):
        items = [(f"{name}.{key}" if name else str(key), value) for key, value in values.items()]
    elif isinstance(values, list | tuple):
        items = [(f"{name}[{index}]", value) for index, value in enumerate(values)]
    return next((found for key, value in items if (found := first_not_finite(value, key)) is not None), None)


def check_writable(path: str | Path) -> None:
    """Check that :func:`replacing` can write ``path``, before the work that gives its content. Writes nothing.

    Raises:
        FileError: It cannot.
    """
    path = Path(path)
    with _errors_naming(path):
        target = _regular_target(path)
        if target is not None and not target.exists() and not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "", str(path))


@contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Yield a path to read ``path`` by, for libraries that refuse names that are not UTF-8."""
    if is_utf8(path):
        yield path
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield Path(f"/dev/fd/{descriptor}")
    finally:
        os.close(descriptor)


def is_utf8(path: Path) -> bool:
    """Whether all bytes of a path are UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


# Folders --------------------------------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, if they are missing.

    Raises:
        FileError: It cannot be created, or is a file.
    """
    with _errors_naming(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in ``folder``.

    Only names that :func:`replacing` gives are removed, and only if their process has ended. Files of another machine
    are removed a day after their last change.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is not None and entry.is_file(follow_symlinks=False) and _abandoned(match, entry):
                _remove(Path(entry.path))


@contextmanager
def lock_folder(folder: Path, *, again: bool = False) -> Iterator[None]:
    """Keep other processes and threads from training in ``folder``, which is created if necessary.

    The operating system releases the lock when the process ends in any way. Readers need no lock. On file systems
    without locks this function only warns.

    Args:
        folder: The folder.
        again: Whether this thread may hold the lock already.

    Raises:
        FolderLockedError: The lock is held.
        FileError: The folder or the lock file ``.hne-lock`` cannot be created.
    """
    make_folder(folder)
    key = (os.path.realpath(folder), threading.get_ident())
    if again and key in _locked:
        yield
        return
    path = folder / _LOCK
    with _errors_naming(path):
        descriptor = _lock(path)
    _locked.add(key)
    try:
        yield
    finally:
        _locked.discard(key)
        _remove(path)  # before the lock is released, so that no other process holds a lock on a removed file
        os.close(descriptor)


def _lock(path: Path) -> int:
    """Open and lock a file that is still at ``path`` afterwards; return its descriptor."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except PermissionError:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # left behind by another user
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    warnings.warn(
                        f"{path.parent}: cannot be locked ({error.strerror}): no other process may train here",
                        stacklevel=1,
                    )
                    return descriptor
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise FolderLockedError(
                    f"{path.parent}: another process trains here; wait for it, or name another folder"
                ) from error
            now = _status(path)
            if now is not None and os.path.samestat(now, os.fstat(descriptor)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder of the lock removed the file meanwhile


# Parts ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` about ``path``, its folder or its temporary file into a :class:`FileError` that names it."""
    try:
        yield
    except (FileError, BrokenPipeError):
        raise
    except OSError as error:
        name = error.filename
        if name is not None and not isinstance(name, int):
            other = Path(os.fsdecode(name))
            real = Path(os.path.realpath(path))
            temporary = _TEMPORARY.fullmatch(other.name) or other.parent.name.startswith("hne-")
            if not temporary and other not in (path, *path.parents, real, *real.parents):
                raise  # an error about another file
        if error.errno == errno.ENOENT:
            reason = f"no such folder: create {path.parent} first"
        else:
            reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise FileError(f"{path}: cannot be written: {reason}") from error


def _regular_target(path: Path) -> Path | None:
    """The regular or new file that ``path`` names, with all links followed; None for anything to be written through.

    Raises:
        OSError: It is a folder, its folder is missing, or it may not be written.
    """
    if _descriptor(path) is not None:
        return None
    status = _status(path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "", str(path))
        return None
    target = Path(os.path.realpath(path))
    if re.fullmatch(r"/proc/\d+(/task/\d+)?/fd", os.path.realpath(path.parent)):
        return None  # of another process
    if status is None:
        os.stat(target.parent)
        if len(os.fsencode(target.name)) > os.pathconf(target.parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, "", str(path))
    elif not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "", str(path))
    return target


def _descriptor(path: Path) -> int | None:
    """The number of the descriptor of this process that ``path`` names, as ``/dev/stdout`` does."""
    name = os.path.abspath(path)
    for _ in range(40):
        folder, base = os.path.split(name)
        real = os.path.realpath(folder)
        ours = re.fullmatch(rf"/proc/{os.getpid()}(/task/\d+)?/fd|/dev/fd", real)
        if ours and base.isdecimal():
            return int(base)
        name = os.path.join(real, base)
        if not os.path.islink(name):
            return None
        name = os.path.join(real, os.readlink(name))
    return None


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _suffix(path: Path) -> str:
    """The suffix of a file, which chooses the format of a figure; empty if it is no usual one."""
    return path.suffix if re.fullmatch(r"\.\w{1,16}", path.suffix, re.ASCII) else ""


def _temporary_name(path: Path) -> str:
    return f".hne-tmp-{_HOST}-{os.getpid()}-{secrets.token_hex(6)}{_suffix(path)}"


def _create(temporary: Path, before: os.stat_result | None) -> int:
    """Create the temporary file; return the mode of the finished file."""
    wanted = 0o666 if before is None else stat.S_IMODE(before.st_mode) & 0o777
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, wanted | 0o600)
    try:
        created = stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
    return created if before is None else stat.S_IMODE(before.st_mode)


def _inherit(temporary: Path, mode: int, before: os.stat_result | None) -> None:
    """Give the finished file its mode, and owner and group of the old file if this process may set them."""
    status = os.stat(temporary)
    if before is not None and (status.st_uid, status.st_gid) != (before.st_uid, before.st_gid):
        with suppress(OSError):
            os.chown(temporary, -1, before.st_gid)
        with suppress(OSError):
            os.chown(temporary, before.st_uid, -1)
    if stat.S_IMODE(os.stat(temporary).st_mode) != mode:
        with suppress(PermissionError):
            os.chmod(temporary, mode)


def _overwrite(temporary: Path, target: Path) -> None:
    """Copy into an existing file. Its space is reserved first, so that a full disk leaves the old content."""
    size = os.path.getsize(temporary)
    with open(temporary, "rb") as source, open(target, "r+b") as file:
        before = os.fstat(file.fileno()).st_size
        if size > before:
            try:
                os.posix_fallocate(file.fileno(), before, size - before)
            except OSError as error:
                file.truncate(before)
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        shutil.copyfileobj(source, file)
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())


def _write_through(temporary: Path, path: Path) -> None:
    """Copy into a pipe, a device or a descriptor."""
    descriptor = _descriptor(path)
    file: BinaryIO
    if descriptor is None:
        file = open(path, "wb", buffering=0)  # noqa: SIM115
    else:
        for stream in (sys.stdout, sys.stderr):  # text printed earlier comes first
            if stream is not None:
                stream.flush()
        file = os.fdopen(os.dup(descriptor), "wb", buffering=0)
    with file, open(temporary, "rb") as source:
        while chunk := source.read(1 << 20):
            view = memoryview(chunk)
            while view:  # a pipe may take a part
                view = view[file.write(view) :]


def _abandoned(match: re.Match[str], entry: os.DirEntry[str]) -> bool:
    """Whether the process that wrote a temporary file has ended."""
    if match["host"] == _HOST:
        try:
            os.kill(int(match["pid"]), 0)
        except (ProcessLookupError, OverflowError):
            return True
        except OSError:
            pass  # alive, of another user
    return time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
