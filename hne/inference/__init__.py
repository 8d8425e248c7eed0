"""Inference with a deadline, inference by CUDA graphs, and export."""

from .cuda_graphs import GraphedHNE, kernel_settings
from .export import Ensemble, EnsembleMean, EnsembleMixture, write_onnx, write_pt2
from .predictor import Answer, AnytimePredictor
