"""A Lightning callback for the metrics of each ensemble size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ...distributed import World
from ...evaluation import EnsembleTotals, Evaluation
from ...models import HNE


class EnsembleMetrics(Callback):
    """Logs the metrics of each ensemble size in validation and test: ``val_accuracy_1``, ``test_nll_8`` and so on.

    It works with :class:`HNEModule`, and with each module whose ``validation_step`` and ``test_step`` return a
    dictionary with the members' ``logits`` ``[N, B, L]`` and the classes ``target`` ``[B]``. Sums are taken over all
    processes. With several data loaders, the names end in ``/dataloader_idx_0``, ``/dataloader_idx_1`` and so on.

    Args:
        sizes: the ensemble sizes n, rising; by default the powers of two below N, then N.
        average: what an ensemble averages, ``logits`` or ``probabilities``.

    Attributes:
        evaluations: for each data loader of the latest validation or test, all metrics.
    """

    def __init__(self, sizes: Sequence[int] | None = None, average: str = "logits") -> None:
        self.sizes, self.average = sizes, average
        self.evaluations: tuple[Evaluation, ...] = ()
        self._totals: dict[int, EnsembleTotals] = {}
        self._size = (1, 1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._totals.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch.

        Raises:
            TypeError: the step has returned something else.
            ValueError: the logits are no logits of members for these classes.
        """
        logits, target = _logits_and_target(outputs)
        if dataloader_idx not in self._totals:
            self._totals[dataloader_idx] = EnsembleTotals(len(logits), self.sizes, self.average, logits.device)
        self._totals[dataloader_idx].add(logits, target)
        if isinstance(batch, Sequence) and isinstance(batch[0], Tensor) and batch[0].dim() == 4:
            height, width = batch[0].shape[2:]
            self._size = height, width

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def _log(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        world = World(pl_module.device, trainer.global_rank, trainer.world_size)
        model = getattr(pl_module, "model", None)

        def macs(n: int) -> int:
            return model.macs(n, self._size) if isinstance(model, HNE) else 0

        self.evaluations = tuple(totals.evaluation(macs, world) for _, totals in sorted(self._totals.items()))
        for index, evaluation in enumerate(self.evaluations):
            end = f"/dataloader_idx_{index}" if len(self.evaluations) > 1 else ""
            values = evaluation.columns() | {f"ece_{e.num_models}": e.ece for e in evaluation.ensembles}
            named = {f"{stage}_{name}{end}": value for name, value in values.items()}
            pl_module.log_dict(named, add_dataloader_idx=False)


def _logits_and_target(outputs: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(outputs, Mapping) or not {"logits", "target"} <= outputs.keys():
        got = sorted(map(str, outputs)) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise TypeError(f"EnsembleMetrics: expected a step that returns a dict with logits and target, got {got}")
    logits, target = outputs["logits"], outputs["target"]
    if logits.dim() != 3 or target.shape != logits.shape[1:2] or target.is_floating_point():
        raise ValueError(
            "EnsembleMetrics: expected logits [members, batch, classes] and classes [batch], "
            f"got {list(logits.shape)} and {target.dtype} {list(target.shape)}"
        )
    return logits, target
