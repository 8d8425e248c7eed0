"""Errors that a user can act on: the command line prints them as one line, without a traceback."""

from __future__ import annotations


class HNEError(Exception):
    """Base class of the errors below."""


class DataError(HNEError, ValueError):
    """A data set is missing, truncated or in another format than expected."""


class CheckpointError(HNEError, ValueError):
    """A checkpoint is missing, damaged or from another run or model."""


class BackboneError(HNEError, ValueError):
    """A network cannot be cut into the blocks of a tree, or its parts do not compute what it computes."""


class TrainingError(HNEError, RuntimeError):
    """Training cannot start with the given options, or failed, for instance because the loss is not finite."""


class FolderLockedError(TrainingError):
    """Another process, or another thread, trains in the folder."""


class ResultError(HNEError, ArithmeticError):
    """A result is not a finite number, or a written program computes another result than its model."""


class FileError(HNEError, OSError):
    """A file or folder cannot be written. An earlier file of that name is unchanged."""
