"""The teacher of ``hne distill``: a checkpoint, or a file of its outputs."""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from ..errors import DataError
from ..models import HNE, PRESETS, checkpoint
from ..reporting import ProgressBar
from ..training import (
    StudentConfig,
    Teacher,
    check_outputs,
    member_outputs,
    read_outputs,
)
from .loading import check_fits, checkpoint_path, held_out_options, load_model


@dataclass(frozen=True)
class TeacherFile:
    """A checkpoint or a file of outputs.

    Attributes:
        path: The file.
        model: The ensemble of a checkpoint.
        stored: Metadata of a checkpoint.
        outputs: The members' outputs, of a file of outputs; see :func:`hne.training.read_outputs`.
    """

    path: Path
    model: HNE | None
    stored: dict[str, Any]
    outputs: dict[str, Tensor]

    @classmethod
    def open(cls, path: Path, device: torch.device) -> TeacherFile:
        """Read a run's folder, a checkpoint or a file of outputs.

        Raises:
            CheckpointError: The folder has no checkpoint, or it is damaged.
            DataError: There is no such file, or it is no file of outputs.
        """
        file = checkpoint_path(path)
        if path.is_dir() or checkpoint.is_checkpoint(file):
            return cls(file, *load_model(file, device), {})
        if not file.is_file():
            raise DataError(f"{file}: no such file: expected a run of `hne train`, or a file of logits")
        return cls(file, None, {}, read_outputs(file))

    @property
    def num_models(self) -> int:
        """Number of members."""
        return len(self.outputs["train"]) if self.model is None else self.model.num_models

    def student_config(self, given: dict[str, Any], first_phase: int) -> StudentConfig:
        """The config of the Hydra: the given options, completed by the data set and the architecture of the teacher.

        Args:
            given: Options by name.
            first_phase: Epochs of the first phase.

        Raises:
            ValueError: The data set is unknown, since a file of outputs does not name it.
        """
        given = dict(given)
        if self.model is not None:
            trained = self.stored["recipe"]
            if trained["preset"] not in PRESETS and "preset" not in given:
                raise ValueError(f"--preset: expected the student's, since the network of {self.path} is no preset")
            given.setdefault("data", trained["data"])
            given.setdefault("image_size", trained["image_size"])
            if given["data"] == trained["data"]:
                given = {**held_out_options(self.stored["data"]), **given}
            if given.setdefault("preset", trained["preset"]) == trained["preset"]:
                given.setdefault("width", trained["width"])
        elif "data" not in given:
            raise ValueError("--data: expected the data set that the logits are for, since the file does not name it")
        else:
            given["augment"] = False
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        return StudentConfig.of(**given, teacher=f"sha256:{digest}", first_phase=first_phase)

    def check_fits(self, dataset: Dataset) -> None:
        """Check that the teacher was trained on, or its outputs are for, data like ``dataset``.

        Raises:
            CheckpointError: The images or classes of a checkpoint differ.
            DataError: The number of images or classes of the outputs differs.
        """
        if self.model is not None:
            check_fits(self.path, self.stored, dataset)
        check_outputs(self.path, self.outputs, dataset)

    def teacher(
        self, config: StudentConfig, dataset: Dataset, device: torch.device, args: argparse.Namespace
    ) -> Teacher:
        """The teacher for training; without augmentation, its outputs are computed once, in advance."""
        if self.model is None:
            return self.outputs["train"]
        if config.augment:
            return self.model
        with ProgressBar(len(dataset.train), hidden=args.quiet) as bar:
            images = dataset.train.to(device)
            return member_outputs(self.model, images, dataset.input, progress=bar.update)
