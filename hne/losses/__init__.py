"""Training objectives: the paper's, Hydra's, and those of a regression."""

from __future__ import annotations

from .gaussian import gaussian_divergence, gaussian_objective, gaussians
from .hydra import average_teacher, hydra_loss
from .modules import HierarchicalDistillationLoss, HierarchicalLoss, HydraLoss, IndependentLoss
from .objectives import OBJECTIVES, Objective, objective
from .slimmable import NarrowObjective, narrow_objective
