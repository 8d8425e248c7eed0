"""Inference with a deadline, inference by CUDA graphs, export, and the engines that run exported graphs."""

from .anytime_average import anytime_steps
from .anytime_export import ANYTIME_FORMATS, write_anytime
from .cuda_graphs import GraphedHNE, kernel_settings
from .engines import ENGINES, fastest, freezing, load_engine, missing
from .export import Ensemble, EnsembleMean, EnsembleMixture, write_onnx, write_pt2
from .predictor import Answer, AnytimePredictor
