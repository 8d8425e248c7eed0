"""The experiments of the HNE paper by name: what they compare, the runs that it takes, and what comes of them."""

from .designs import STUDIES, Curve, Panel, Study, panels, recipes
from .results import CurveResult, Estimate, PanelResult, Result, collect

__all__ = [
    "STUDIES",
    "Curve",
    "CurveResult",
    "Estimate",
    "Panel",
    "PanelResult",
    "Result",
    "Study",
    "collect",
    "panels",
    "recipes",
]
