"""Streams, signals and error texts of the command line."""

from __future__ import annotations

import codecs
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import HNEError

# Symbols of our own texts, for streams that cannot encode them. Other characters are printed as \\xfc or \\u20ac.
_ASCII = {"\u00b1": "+-", "\u00d7": "x", "\u2212": "-", "\u2026": "..."}


class Terminated(BaseException):
    """A signal asks the process to end; raised so that temporary files are removed first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def usable_streams() -> Iterator[None]:
    """Let every character be printed in any encoding, and replace closed streams by the null device."""
    _open_closed_descriptors()
    codecs.register_error("hne.readable", _readable)
    before: list[tuple[Any, str]] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            before.append((stream, stream.errors))
            stream.reconfigure(errors="hne.readable")
    try:
        yield
    finally:
        for stream, errors in before:
            with suppress(ValueError, OSError):  # closed meanwhile, or its reader has gone
                stream.reconfigure(errors=errors)


@contextmanager
def cleaning_up_on_signals() -> Iterator[None]:
    """Raise :class:`Terminated` for SIGTERM and SIGHUP, unless torchrun or the caller handles them."""
    before = {}
    if threading.current_thread() is threading.main_thread() and "WORLD_SIZE" not in os.environ:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def discard_output() -> None:
    """Send the rest of the output, and what is still buffered, to the null device."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def explain(error: BaseException) -> str | None:
    """The error in one line that says what to do; None for a fault of this program, which deserves a traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, HNEError):
        return text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_out_of_memory(error):
        return f"not enough memory: try a smaller --batch-size, --width or --num-models ({text or 'out of memory'})"
    if isinstance(error, OSError):
        reason = "the disk is full: free some space" if error.errno == errno.ENOSPC else error.strerror or text
        return f"{os.fsdecode(error.filename)}: {reason}" if isinstance(error.filename, str | bytes) else reason
    if isinstance(error, ValueError | TypeError | RuntimeError | ImportError | SafetensorError) and not isinstance(
        error, NotImplementedError | RecursionError
    ):
        return f"{text or type(error).__name__} (--debug shows where)"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def _open_closed_descriptors() -> None:
    """Open the null device for closed standard descriptors, so that no file of ours gets their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _readable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(
        _ASCII.get(character) or character.encode("ascii", "backslashreplace").decode() for character in characters
    ), error.end


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated(number)
