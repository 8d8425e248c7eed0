"""Hierarchical neural ensembles: networks that share the early blocks of a tree, with anytime inference.

After "Distilled Hierarchical Neural Ensembles with Adaptive Inference Cost" (Ruiz & Verbeek; AAAI 2021 as "Anytime
Inference with Distilled Hierarchical Neural Ensembles").
"""

from importlib import metadata

from hne_kernels import build_info

from .hierarchy import Hierarchy
from .inference import AnytimePredictor, GraphedHNE
from .layers import (
    AveragePool,
    BasicBlock,
    Bottleneck,
    Conv,
    DenseBottleneck,
    LayerNorm,
    MaxPool,
    Module,
    Norm,
    PatchEmbedding,
    PoolLinear,
    PreActivation,
    SelectToken,
    TransformerBlock,
)
from .losses import OBJECTIVES, objective
from .models import HNE, PRESETS, FusedHNE, NaiveHNE, QuantizedHNE, load, quantize

try:
    __version__: str = metadata.version("hne-kernels")
except metadata.PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = build_info()["version"]

__all__ = [
    "HNE",
    "OBJECTIVES",
    "PRESETS",
    "AnytimePredictor",
    "AveragePool",
    "BasicBlock",
    "Bottleneck",
    "Conv",
    "DenseBottleneck",
    "FusedHNE",
    "GraphedHNE",
    "Hierarchy",
    "LayerNorm",
    "MaxPool",
    "Module",
    "NaiveHNE",
    "Norm",
    "PatchEmbedding",
    "PoolLinear",
    "PreActivation",
    "QuantizedHNE",
    "SelectToken",
    "TransformerBlock",
    "load",
    "objective",
    "quantize",
]
