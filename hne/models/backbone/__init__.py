"""Ensembles from trained networks: how a backbone is cut, converted, checked and loaded."""

from .conversion import Conversion, ConvertedModule
from .ensemble import build, templates_from_config
from .sources import Origin, create, load_backbone
