"""Hierarchical neural ensembles: networks that share the trunk of a tree, and answer at any time.

After "Distilled Hierarchical Neural Ensembles with Adaptive Inference Cost" (Ruiz & Verbeek; AAAI 2021 as "Anytime
Inference with Distilled Hierarchical Neural Ensembles").
"""

from .architectures import PRESETS
from .graphs import GraphedHNE
from .hierarchy import Hierarchy
from .layers import Bottleneck, Conv, PoolLinear
from .losses import OBJECTIVES, objective
from .model import HNE, FusedHNE, NaiveHNE
from .predictor import AnytimePredictor

__all__ = [
    "HNE",
    "OBJECTIVES",
    "PRESETS",
    "AnytimePredictor",
    "Bottleneck",
    "Conv",
    "FusedHNE",
    "GraphedHNE",
    "Hierarchy",
    "NaiveHNE",
    "PoolLinear",
    "objective",
]
