"""Hierarchical neural ensembles as models, their presets and checkpoints."""

from . import checkpoint
from .backbone import Conversion, load_backbone
from .hne import HNE, FusedHNE, NaiveHNE
from .load import load
from .presets import PRESETS, Preset, scaled
from .quantized import QuantizedHNE, quantize
