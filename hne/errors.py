"""Errors that a user can act on: the command line prints them as one line, without a traceback."""

from __future__ import annotations


class HNEError(Exception):
    """Base class of the errors below."""


class DataError(HNEError, ValueError):
    """A data set is missing, truncated or not in the format it should have."""


class CheckpointError(HNEError, ValueError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class TrainingError(HNEError, RuntimeError):
    """Training cannot start with these options, or went wrong (a loss that is not finite)."""
