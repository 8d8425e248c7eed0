"""Inference within limits of time or launches."""

from .cuda_graphs import GraphedHNE
from .predictor import Answer, AnytimePredictor

__all__ = ["Answer", "AnytimePredictor", "GraphedHNE"]
