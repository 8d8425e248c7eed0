"""The rivals of the HNE paper's Figure 6 as training runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data import Dataset
from ..distributed import World
from ..models import PRESETS, scaled
from ..rivals import BlockExits, MSDNet
from ..training import ExitTrainer, TrainConfig, Trainer

RIVALS = ("exits", "msdnet")


@dataclass(frozen=True)
class RivalConfig(TrainConfig):
    """The config of a network with early exits.

    Attributes:
        rival: ``exits`` for exits after the blocks of the preset, or ``msdnet``, whose channels are multiplied by
            ``width`` and rounded.
    """

    rival: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rival not in RIVALS:
            raise ValueError(f"rival: expected one of {', '.join(RIVALS)}, got {self.rival!r}")

    @classmethod
    def like(cls, config: TrainConfig, rival: str) -> RivalConfig:
        """The config of a rival with the options of another config; its objective is ``I``."""
        options = {**config.to_dict(), "branches": None, "num_models": None, "objective": "I", "widths": None}
        return cls(**options, rival=rival)

    def build_model(self, dataset: Dataset) -> Any:
        sizes = {"num_classes": dataset.outputs, "in_channels": dataset.input.channels}
        if self.rival == "exits":
            return BlockExits(scaled(PRESETS[self.preset].blocks, self.width), **sizes)
        channels, growth = (max(1, round(self.width * number)) for number in (16, 6))
        return MSDNet(channels=channels, growth=growth, **sizes)


def study_trainer(config: TrainConfig, dataset: Dataset, world: World) -> Trainer:
    """The trainer of a run of a study."""
    kind = ExitTrainer if isinstance(config, RivalConfig) else Trainer
    return kind.from_config(config, dataset, world)
