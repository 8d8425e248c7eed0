"""Hydra: an ensemble distilled into one network with a shared body and one head per member.

After "Hydra: Preserving Ensemble Diversity for Model Distillation" (Tran et al. 2020). The student is an :class:`HNE`
whose tree branches at the heads alone, or in the last blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import data

from ..averages import mixture
from ..data import Dataset
from ..distributed import World
from ..errors import TrainingError
from ..hierarchy import Hierarchy
from ..layers import ConvNorm
from ..losses import HydraLoss, Objective, gaussian_divergence, gaussians
from ..models import HNE, PRESETS
from .config import TrainConfig
from .teachers import Teacher, ask_teacher, prepare_teacher
from .trainer import Trainer, as_dataset

# Objectives of students, as checkpoints name them: one head per member, or one network for the members' average
# (Hinton et al. 2015).
HYDRA, HINTON = "Hydra", "Hinton"


@dataclass(frozen=True)
class StudentConfig(TrainConfig):
    """The config of a model that learns from a teacher.

    Attributes:
        teacher: Identifier of the teacher, so that a run resumes only with the same one; empty without a teacher.
        first_phase: Epochs of an earlier run that trained one head on the members' average. The heads start from it.
    """

    teacher: str = ""
    first_phase: int = 0


def student_configs(
    base: StudentConfig, num_models: int, *, own_blocks: int = 0, compare: bool = False
) -> dict[str, StudentConfig]:
    """The training runs of a distillation.

    Args:
        base: Config of the Hydra, with the epochs of both phases together.
        num_models: Members of the teacher, and heads of the student.
        own_blocks: Number of last blocks that each head has for itself; with 0, a head is a linear layer.
        compare: Add two single networks with the same number of epochs: ``distilled`` learns from the members'
            average, ``alone`` from the labels.

    Returns:
        Configs by name, in the order of training.

    Raises:
        ValueError: ``own_blocks`` exceeds the blocks of the preset, or ``first_phase`` the epochs.
    """
    blocks = len(PRESETS[base.preset].blocks)
    if not 0 <= own_blocks < blocks:
        raise ValueError(f"own_blocks: expected 0 to {blocks - 1} of the {blocks} of {base.preset}, got {own_blocks}")
    if not 0 <= base.first_phase < base.epochs:
        raise ValueError(f"first_phase: expected less than the {base.epochs} epochs of both, got {base.first_phase}")
    tree = Hierarchy.multi_branch(blocks, num_models, blocks - own_blocks)
    single = replace(base, objective=HINTON, branches=(1,) * blocks, num_models=1, first_phase=0)
    configs = {}
    if base.first_phase:
        configs["first-phase"] = replace(single, epochs=base.first_phase)
    configs["hydra"] = replace(
        base,
        objective=HYDRA,
        branches=tree.branches,
        num_models=num_models,
        epochs=base.epochs - base.first_phase,
    )
    if compare:
        configs["distilled"] = single
        configs["alone"] = replace(single, objective="I", teacher="")
    return configs


class DistillationTrainer(Trainer):
    """Trains a model to match the outputs of a teacher instead of the labels.

    A student with several heads is a Hydra: head i learns from member i of the teacher. A student with one head learns
    from the average of all members (Hinton et al. 2015).

    Args:
        model: The student, as for :class:`Trainer`.
        dataset: The data to train and evaluate on, as for :class:`Trainer`. The labels of the training images are read
            and not used.
        config: How the student is trained. ``temperature`` softens both sides; ``objective`` and ``alpha`` are not
            used.
        world: The processes that train together.
        teacher: A function of a batch of images, or the outputs for all images, see :data:`hne.training.Teacher`. A
            module is put into eval mode; its device should be that of ``world``.

    Raises:
        TypeError, ValueError: The teacher is of another kind, or its outputs do not fit; those of a function are
            checked in each batch (for NaN and infinity on a CPU only).
        TypeError, ValueError, DataError, TrainingError: As for :class:`Trainer`.
    """

    def __init__(
        self,
        model: HNE,
        dataset: Dataset | Sequence[data.Dataset],
        config: TrainConfig,
        world: World | None = None,
        *,
        teacher: Teacher,
    ) -> None:
        if model.widths:
            raise TrainingError(
                "model: expected an ordinary one, as smaller widths of a slimmable one learn from itself"
            )
        dataset = as_dataset(dataset, model)
        dataset = replace(dataset, train=dataset.train.indexed())  # the target of an image is its index
        super().__init__(model, dataset, replace(config, objective=HINTON if model.num_models == 1 else HYDRA), world)
        self.teacher = prepare_teacher(
            teacher, len(dataset.train), dataset.outputs, augment=config.augment, device=self.world.device
        )

    def _objective(self) -> Objective:
        if self.dataset.target is None:
            return HydraLoss(self.config.temperature)

        def regression(outputs: Tensor, members: Tensor) -> Tensor:
            mean, variance = gaussians(members)
            if len(outputs) == 1 < len(members):
                mean, variance = (moment[None] for moment in mixture(mean, variance))
            return gaussian_divergence(gaussians(outputs), (mean, variance))

        return regression

    def _loss(self, logits: Tensor, images: Tensor, target: Tensor) -> Tensor:
        members = ask_teacher(
            self.teacher,
            images,
            target,
            self.model.num_models,
            self.dataset.outputs,
            check_values=images.device.type == "cpu" and not self.config.cuda_graph,
        )
        return self.objective(logits, members)

    def _advice(self) -> str:
        return f"{super()._advice()}, and see that the teacher's outputs are finite"


@torch.no_grad()
def expand_branches(single: HNE, model: HNE) -> None:
    """Start every branch of ``model`` from the network ``single``.

    A projection shortcut that exists only in a branching layer starts as the identity.

    Args:
        single: A network with one branch per block.
        model: A tree of the same blocks, changed in place.

    Raises:
        ValueError: The blocks, inputs or outputs of the two differ.
    """
    for key in ("blocks", "in_channels", "num_classes"):
        if single.config()[key] != model.config()[key]:
            raise ValueError(f"single must be a network of the same {key} as model")
    source, target = single.state_dict(), model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, ConvNorm) and f"{name}.conv.weight" not in source:
            module.bn.reset_parameters()
            module.conv.weight.copy_(torch.eye(module.channels)[..., None, None].repeat(module.branches, 1, 1, 1))
    for name, tensor in source.items():
        if tensor.dim() == 0:  # the counter of a batch norm
            target[name].copy_(tensor)
        else:  # [channels, ...] into [branches * channels, ...]
            branches = len(target[name]) // len(tensor)
            target[name].copy_(tensor.repeat(branches, *(1,) * (tensor.dim() - 1)))
