"""Anytime inference by exported programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .engines import Program, choose_engine, load_programs
from .manifest import Manifest


class AnytimeSession:
    """Runs the steps that ``hne export --anytime`` wrote, with the answers of the model.

    It takes the place of a model in :class:`hne.AnytimePredictor`, which adds deadlines and confidence::

        session = AnytimeSession("exported", engine="onnxruntime")
        for n, logits in session.anytime(images): ...
        answer = AnytimePredictor(session, deadline_ms=20, confidence=0.95)(images)

    Args:
        folder: The folder.
        engine: ``torch`` for programs of the formats pt2 and aoti; ``onnxruntime`` or ``openvino`` for onnx. By default
            the first of these that is installed.

    Attributes:
        manifest: What is in the folder.
        num_models: Number of models of the ensemble.
        num_classes: Number of logits.
        metadata: See :attr:`hne.HNE.metadata`.

    Raises:
        CheckpointError: The folder has no manifest, or a file is missing or damaged.
        ValueError: The engine does not run the programs.
        ModuleNotFoundError: The engine is not installed.
    """

    def __init__(self, folder: str | Path, engine: str | None = None) -> None:
        folder = Path(folder).expanduser()
        self.manifest = manifest = Manifest.read(folder)
        self.num_models, self.num_classes = len(manifest.steps), manifest.num_classes
        self.metadata = manifest.metadata
        self.engine = engine = choose_engine(manifest.programs) if engine is None else engine
        names = [step.program for step in manifest.steps]
        self._programs = load_programs(engine, folder, names, manifest.programs)

    def anytime(self, x: Tensor) -> AnytimeSteps:
        """Iterate over ``(n, logits)`` for n = 1, 2, ... N: mean logits ``[B, L]`` of the first n models.

        Args:
            x: Images ``[B, C, H, W]``, float32, on the CPU.

        Raises:
            ValueError: The images have another shape or dtype.
        """
        if x.dim() != 4 or tuple(x.shape[1:]) != self.manifest.image or x.dtype != torch.float32:
            expected = [f"batch, {', '.join(map(str, self.manifest.image))}"]
            raise ValueError(f"x: expected float32 [{expected[0]}], got {x.dtype} {list(x.shape)}")
        return AnytimeSteps(self.manifest, self._programs, x)


class AnytimeSteps(Iterator[tuple[int, Tensor]]):
    """The answers for a batch, one model after the other.

    Attributes:
        num_models: Models evaluated so far.
        member: Logits ``[B, L]`` of the latest model alone; None before the first step.
    """

    def __init__(self, manifest: Manifest, programs: list[Program], images: Tensor) -> None:
        self.num_models = 0
        self.member: Tensor | None = None
        self._steps, self._programs = manifest.steps, programs
        self._features = {0: images}
        self._total = torch.zeros(len(images), manifest.num_classes)

    def __next__(self) -> tuple[int, Tensor]:
        if self.num_models == len(self._steps):
            raise StopIteration
        step = self._steps[self.num_models]
        *kept, self.member = self._programs[self.num_models](self._features[step.reads])
        self._features |= dict(zip(step.keeps, kept, strict=True))
        self._total = self._total + self.member
        self.num_models += 1
        return self.num_models, self._total / self.num_models

    def select(self, samples: Tensor) -> None:
        """Continue with some samples of the batch. Later answers contain these samples, in the given order.

        Args:
            samples: Indices of the samples in the current batch, ``[K]`` int64; or a mask ``[B]`` (bool).

        Raises:
            RuntimeError: There is no answer yet.
        """
        if self.member is None:
            raise RuntimeError("select() chooses by an answer: ask for the first one before")
        self.member, self._total = self.member[samples], self._total[samples]
        self._features = {number: features[samples] for number, features in self._features.items()}
