"""The manifest of a folder with exported steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FORMAT, VERSION = "hne-anytime", 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Step:
    """A step of anytime inference, which adds a leaf.

    Attributes:
        program: Name of its program.
        reads: The input of its program: features by number. Features 0 are the images, 1 those after the first block.
        keeps: The features that its program returns before the logits ``[B, L]`` of the leaf; later steps read them.
    """

    program: str
    reads: int
    keeps: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What is in a folder.

    Attributes:
        programs: Their format: ``onnx``, ``pt2`` or ``aoti``.
        steps: One for each model of the ensemble.
        num_classes: Number of logits.
        image: Channels, height and width of an image.
        macs: Multiply-adds of the first 1, 2, ... models.
        metadata: What is known besides, see :attr:`hne.HNE.metadata`.
    """

    programs: str
    steps: tuple[Step, ...]
    num_classes: int
    image: tuple[int, int, int]
    macs: tuple[int, ...]
    metadata: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder, and check its files.

        Raises:
            CheckpointError: There is none, it is of something else, or a file is missing or damaged.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: no JSON file that can be read ({error})") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not written by `hne export --anytime`")
        if values.get("version") != VERSION:
            raise CheckpointError(f"{path}: expected version {VERSION}, got {values.get('version')!r}")
        try:
            for name, digest in values["files"].items():
                _check_file(folder / name, digest)
            steps = tuple(Step(s["program"], s["reads"], tuple(s["keeps"])) for s in values["steps"])
            channels, height, width = values["image"]
            macs = tuple(values["macs"])
            return cls(
                values["programs"], steps, values["num_classes"], (channels, height, width), macs, values["metadata"]
            )
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: damaged ({error!r})") from error


def _check_file(path: Path, digest: str) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: missing: export again ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"{path}: damaged: the content does not agree with its SHA-256: export again")
