"""``hne.load``: a trained model from what lies in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from . import checkpoint
from .hne import HNE, FusedHNE, NaiveHNE
from .pretrained import is_pretrained


def load(path: str | Path, *, naive: bool = False, templates: Sequence[nn.Module] = ()) -> HNE:
    """The trained model of a run, of a checkpoint, or of a folder that ``save_pretrained`` wrote, in eval mode.

    Its ``metadata`` describe data, training and quality, as far as they are known. No code of the files runs.

    Args:
        path: The file of a checkpoint, or a folder.
        naive: Load a :class:`NaiveHNE` instead of a :class:`FusedHNE`.
        templates: The template of each :class:`hne.Module`, see :func:`hne.models.checkpoint.load_model`.

    Raises:
        CheckpointError: There is none, it is damaged, or its network cannot be built.
    """
    path = Path(path).expanduser()
    if path.is_dir() and is_pretrained(path):
        return (NaiveHNE if naive else FusedHNE).from_pretrained(path, templates=templates)
    file = path / checkpoint.FILE_NAME if path.is_dir() else path
    model, config = checkpoint.load_model(file, naive=naive, templates=templates)
    model.metadata = checkpoint.description(config)
    if config.get("history"):
        evaluation = config["history"][-1].get("evaluation")
        model.metadata |= {} if evaluation is None else {"evaluation": evaluation}
    return model
