"""Inference beyond the model's own calls: deadlines, CUDA graphs, stand-alone programs."""

from .cuda_graphs import GraphedHNE
from .export import EnsembleMean, write_onnx, write_pt2
from .predictor import Answer, AnytimePredictor
