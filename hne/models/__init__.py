"""The hierarchical ensembles, their presets and checkpoints."""

from . import checkpoint
from .hne import HNE, FusedHNE, NaiveHNE
from .presets import PRESETS, Preset, scaled

__all__ = ["HNE", "PRESETS", "FusedHNE", "NaiveHNE", "Preset", "checkpoint", "scaled"]
