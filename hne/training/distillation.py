"""Hydra: an ensemble distilled into one network with a shared body and one head per member.

After "Hydra: Preserving Ensemble Diversity for Model Distillation" (Tran et al. 2020). The student is an :class:`HNE`
whose tree branches at the heads alone, or in the last blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data import Dataset
from ..distributed import World
from ..hierarchy import Hierarchy
from ..layers import ConvNorm
from ..losses import Objective, average_teacher, gaussian_divergence, gaussians, hydra_loss
from ..metrics import mixture
from ..models import HNE, PRESETS
from .config import TrainConfig
from .teachers import Teacher
from .trainer import Trainer

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

    Args:
        config: The student; its objective is ``HYDRA`` or ``HINTON``.
        dataset: The data to train and evaluate on.
        world: The processes that train together.
        teacher: Gives the members' outputs for each training batch.
    """

    config: StudentConfig

    def __init__(self, config: StudentConfig, dataset: Dataset, world: World, teacher: Teacher) -> None:
        indexed = dataset.train.indexed()  # the target of an image is its index
        super().__init__(config, replace(dataset, train=indexed), world)
        self.teacher = teacher

    def _objective(self) -> Objective:
        temperature, one_head = self.config.temperature, self.config.objective == HINTON
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {temperature}")

        def classification(logits: Tensor, members: Tensor) -> Tensor:
            return hydra_loss(logits, average_teacher(members, temperature) if one_head else members, temperature)

        def regression(outputs: Tensor, members: Tensor) -> Tensor:
            mean, variance = gaussians(members)
            if one_head:
                mean, variance = (moment[None] for moment in mixture(mean, variance))
            return gaussian_divergence(gaussians(outputs), (mean, variance))

        return classification if self.dataset.target is None else regression

    def _loss(self, logits: Tensor, images: Tensor, target: Tensor) -> Tensor:
        return self.objective(logits, self.teacher(images, target))


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
