"""A Lightning module for a model and an objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ...losses import Objective
from ...losses import objective as objective_by_name
from ...models import HNE


class HNEModule(LightningModule):
    """Trains a model with an objective, by SGD with a cosine schedule as in the HNE paper.

    Batches are pairs of images ``[B, C, H, W]`` and targets. ``train_loss`` is logged; :class:`EnsembleMetrics` logs
    the metrics of each ensemble size in validation and test. For another optimiser or schedule, override
    ``configure_optimizers``. ``load_from_checkpoint(path, model=...)`` needs a model of the same network;
    ``module.model.save_pretrained(folder)`` saves the model in the format of this package.

    Args:
        model: the model, in train mode, which Lightning keeps.
        objective: one of :data:`hne.OBJECTIVES`; or a function or module of the members' logits ``[N, B, L]`` and the
            targets of a batch. :func:`hne.losses.gaussian_objective` makes that of a regression. Hydra's is
            ``lambda logits, teacher: hydra_loss(logits, teacher.transpose(0, 1))`` for batches of images and the
            logits ``[B, N, L]`` of a teacher.
        alpha, temperature: of an objective by name, see :func:`hne.objective`.
        lr: initial learning rate; it falls to 0 over the steps of the training, where their number is known.
        momentum, weight_decay: of SGD.

    Raises:
        ValueError: the name of the objective is unknown, or ``alpha`` or ``temperature`` is out of range.
    """

    def __init__(
        self,
        model: HNE,
        objective: str | Objective = "I+HD",
        *,
        alpha: float = 0.5,
        temperature: float = 2.0,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        by_name = isinstance(objective, str)
        self.save_hyperparameters(ignore=["model"] if by_name else ["model", "objective"])
        self.model = model
        self.objective = objective_by_name(objective, alpha, temperature) if isinstance(objective, str) else objective

    def forward(self, images: Tensor) -> Tensor:
        """Logits of all members ``[N, B, L]``."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The objective."""
        images, target = batch
        loss = self.objective(self(images), target)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Members' logits and targets, for :class:`EnsembleMetrics`."""
        images, target = batch
        return {"logits": self(images), "target": target}

    test_step = validation_step

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Mean logits of all members ``[B, L]``; a batch may have targets or not."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self.model.prefix_logits(images, (self.model.num_models,))[0]

    def configure_optimizers(self) -> Any:
        """SGD, and a cosine schedule by steps."""
        options = {name: self.hparams[name] for name in ("lr", "momentum", "weight_decay")}
        optimizer = torch.optim.SGD(self.model.parameters(), **options)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
