"""Hydra: an ensemble distilled into one network with a shared body and a head for each of its members.

After "Hydra: Preserving Ensemble Diversity for Model Distillation" (Tran et al. 2020). The student is a tree whose
last level (or last blocks) alone branch: an :class:`HNE` like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..data import Dataset, Images, InputFormat, evaluation_batches
from ..distributed import World
from ..errors import DataError
from ..hierarchy import Hierarchy
from ..layers import ConvNorm as Unit
from ..losses import Objective, average_teacher, gaussian_divergence, gaussians, hydra_loss
from ..metrics import mixture
from ..models.hne import HNE
from ..models.presets import PRESETS
from .config import Recipe
from .trainer import Run

HYDRA, HINTON = "Hydra", "Hinton"  # objectives of students: a head for each member, or one network for their average

Teacher = Callable[[Tensor, Tensor], Tensor]
"""From a batch of images and their numbers in the training set to the members' outputs ``[N, B, L]``."""


@dataclass(frozen=True)
class StudentRecipe(Recipe):
    """A recipe of a network that learns from a teacher.

    Attributes:
        teacher: which one it is: tells a resumed run from another.
        first_phase: epochs of the averaged head that the heads start from, in a run of its own before this one.
    """

    teacher: str = ""
    first_phase: int = 0


def students(
    base: StudentRecipe, num_models: int, *, own_blocks: int = 0, compare: bool = False
) -> dict[str, StudentRecipe]:
    """The runs of a distillation by name, in the order in which they are to be trained.

    Args:
        base: of Hydra, with the epochs of both phases.
        num_models: members of the teacher, and heads of the student.
        own_blocks: last blocks that every head has for itself; 0 makes heads of linear layers.
        compare: whether one network learns from the average of the members (``distilled``), and one without a teacher
            (``alone``), in as many epochs.

    Raises:
        ValueError: so many blocks or epochs of the first phase there are not.
    """
    blocks = len(PRESETS[base.preset].blocks)
    if not 0 <= own_blocks < blocks:
        raise ValueError(f"own_blocks: expected 0 to {blocks - 1} of the {blocks} of {base.preset}, got {own_blocks}")
    if not 0 <= base.first_phase < base.epochs:
        raise ValueError(f"first_phase: expected less than the {base.epochs} epochs of both, got {base.first_phase}")
    tree = Hierarchy.multi_branch(blocks, num_models, blocks - own_blocks)
    single = replace(base, objective=HINTON, branches=(1,) * blocks, num_models=1, first_phase=0)
    runs = {}
    if base.first_phase:
        runs["first-phase"] = replace(single, epochs=base.first_phase)
    runs["hydra"] = replace(
        base,
        objective=HYDRA,
        branches=tree.branches,
        num_models=num_models,
        epochs=base.epochs - base.first_phase,
    )
    if compare:
        runs["distilled"] = single
        runs["alone"] = replace(single, objective="I", teacher="")
    return runs


class Distillation(Run):
    """A run whose network learns from a teacher instead of the labels.

    Args:
        recipe: its objective is ``HYDRA`` or ``HINTON``.
        dataset: what the teacher is asked about.
        world: the processes that train together.
        teacher: its members' outputs.
    """

    recipe: StudentRecipe

    def __init__(self, recipe: StudentRecipe, dataset: Dataset, world: World, teacher: Teacher) -> None:
        numbered = replace(dataset.train, labels=torch.arange(len(dataset.train)))  # a target is the image's number
        super().__init__(recipe, replace(dataset, train=numbered), world)
        self.teacher = teacher

    def _objective(self) -> Objective:
        temperature, one_head = self.recipe.temperature, self.recipe.objective == HINTON
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {temperature}")

        def of_classes(logits: Tensor, members: Tensor) -> Tensor:
            return hydra_loss(logits, average_teacher(members, temperature) if one_head else members, temperature)

        def of_numbers(outputs: Tensor, members: Tensor) -> Tensor:
            mean, variance = gaussians(members)
            if one_head:
                mean, variance = (moment[None] for moment in mixture(mean, variance))
            return gaussian_divergence(gaussians(outputs), (mean, variance))

        return of_classes if self.dataset.target is None else of_numbers

    def _loss(self, logits: Tensor, images: Tensor, target: Tensor) -> Tensor:
        return self.objective(logits, self.teacher(images, target))


# Teachers -------------------------------------------------------------------------------------------------------------


def online(model: HNE) -> Teacher:
    """A network that is asked about every batch, as it was augmented."""
    model.eval()

    @torch.no_grad()
    def outputs(images: Tensor, indices: Tensor) -> Tensor:
        return model(images)

    return outputs


def tabulated(outputs: Tensor) -> Teacher:
    """Outputs ``[N, images, L]`` that are known in advance: the training images must not be augmented."""
    return lambda images, indices: outputs[:, indices]


@torch.no_grad()
def tabulate(
    model: HNE,
    split: Images,
    input_format: InputFormat,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """What a network says about every image, not augmented: ``[N, images, L]``."""
    model.eval()
    parts = []
    for images, _ in evaluation_batches(split, input_format, batch_size, device=next(model.parameters()).device):
        parts.append(model(images))
        if progress is not None:
            progress(len(images))
    return torch.cat(parts, 1)


def read_outputs(path: Path) -> dict[str, Tensor]:
    """Outputs of an ensemble's members from a file: ``train`` ``[N, images, L]``, and perhaps ``test``.

    Args:
        path: a safetensors file with these names, or a NumPy array (.npy), which is ``train``.

    Raises:
        DataError: it is neither, or the arrays are not of that kind.
    """
    try:
        if path.suffix == ".npy":
            found = {"train": torch.from_numpy(np.load(path, allow_pickle=False))}
        else:
            found = load_file(path)
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise DataError(f"{path}: not a NumPy or safetensors file of outputs ({error})") from error
    if "train" not in found or not found.keys() <= {"train", "test"}:
        raise DataError(f"{path}: expected an array train, and perhaps test, found {', '.join(found) or 'none'}")
    for name, outputs in found.items():
        where = f"{path}: {name}: expected finite floating-point numbers [members, images, classes], found"
        if outputs.dim() != 3 or not outputs.is_floating_point():
            raise DataError(f"{where} {outputs.dtype} {tuple(outputs.shape)}")
        if not outputs.isfinite().all():
            raise DataError(f"{where} NaN or infinity")
    if len({outputs.shape[::2] for outputs in found.values()}) != 1:
        raise DataError(f"{path}: train and test are not of the same members and classes")
    return {name: outputs.float() for name, outputs in found.items()}


def check_outputs(path: Path, found: dict[str, Tensor], dataset: Dataset) -> None:
    """Check that outputs are those of a data set.

    Raises:
        DataError: the images or classes are not as many.
    """
    for name, outputs in found.items():
        images = len(dataset.train if name == "train" else dataset.test)
        if outputs.shape[1:] != (images, dataset.outputs):
            raise DataError(
                f"{path}: {name}: expected the outputs for the {images} images of {dataset.name}, "
                f"[members, {images}, {dataset.outputs}], found {tuple(outputs.shape)}"
            )


# Two phases -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def expand(single: HNE, model: HNE) -> None:
    """Let every branch of ``model`` start as the one network ``single`` of the same blocks.

    A projecting shortcut that only a branching layer needs starts as the identity.

    Raises:
        ValueError: the networks are not of the same blocks, inputs and outputs.
    """
    for part in ("blocks", "in_channels", "num_classes"):
        if single.config()[part] != model.config()[part]:
            raise ValueError(f"single must be a network of the same {part} as model")
    given, wanted = single.state_dict(), model.state_dict()
    for name, unit in model.named_modules():
        if isinstance(unit, Unit) and f"{name}.conv.weight" not in given:
            unit.bn.reset_parameters()
            unit.conv.weight.copy_(torch.eye(unit.channels)[..., None, None].repeat(unit.branches, 1, 1, 1))
    for name, source in given.items():
        tensor = wanted[name]  # [branches * n, ...], or a counter
        tensor.copy_(source.repeat(len(tensor) // len(source), *(1,) * (source.dim() - 1)) if source.dim() else source)
