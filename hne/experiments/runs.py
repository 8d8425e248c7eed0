"""The runs of studies in one folder, by names that tell what each is, and how far it is."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from ..data import Dataset
from ..errors import CheckpointError, TrainingError
from ..evaluation import Evaluation
from ..models import checkpoint
from ..training.config import Recipe
from ..training.run_directory import SUMMARY
from ..training.trainer import CHECKPOINT, check_same_run


def run_name(recipe: Recipe) -> str:
    """The name of a run's folder: what distinguishes it for people, and a digest of the whole recipe, so that no two
    recipes share a folder."""
    tree = "preset" if recipe.branches is None else ".".join(map(str, recipe.branches))
    alpha = "" if recipe.objective in ("I", "H") else f"-alpha{recipe.alpha:g}"
    return (
        f"{recipe.data}-{recipe.preset}-x{recipe.width:g}-{tree}-{recipe.objective}{alpha}"
        f"-{recipe.epochs}ep-seed{recipe.seed}-{_digest(recipe)}"
    )


def _digest(recipe: Recipe) -> str:
    """Of all options but those that have their default: one that is new to :class:`Recipe` changes no name."""
    defaults = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
    values = {name: value for name, value in recipe.to_dict().items() if value != defaults.get(name, MISSING)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        epochs: that are done.
        evaluation: at its end; None before.
    """

    epochs: int
    evaluation: Evaluation | None = None


def progress(folder: Path, recipe: Recipe, dataset: Dataset) -> Progress:
    """How far the run of ``recipe`` on ``dataset`` in ``folder`` is.

    Raises:
        CheckpointError: the folder holds another run, or what it holds cannot be read.
    """
    summary, path = folder / SUMMARY, folder / CHECKPOINT
    if summary.exists():
        try:
            values = json.loads(summary.read_text())
            found = Progress(recipe.epochs, Evaluation.from_dict(values["evaluation"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{summary}: damaged, or written by another version of hne ({error!r}); remove {folder} to train anew"
            ) from error
        check_same_run(summary, values, recipe, dataset)
        return found
    if not path.exists():
        return Progress(0)
    _, config = checkpoint.load(path)
    check_same_run(path, config, recipe, dataset)
    return Progress(config["epoch"])


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from training in ``folder``, which is made if it is not there.

    The claim ends with the process at the latest, however that ends.

    Raises:
        TrainingError: another process has claimed it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"{folder}: another process trains here; wait for it, or name another --runs"
            ) from error
        yield
