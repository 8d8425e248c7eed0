"""Training by Lightning (lightning.ai): a module for a model and an objective, and a callback for its metrics.

module = HNEModule(FusedHNE.from_preset("hne_tiny", num_classes=10), objective="I+HD", lr=0.05)
trainer = lightning.pytorch.Trainer(max_epochs=10, callbacks=[EnsembleMetrics()])
trainer.fit(module, training_loader, validation_loader)
"""

from __future__ import annotations

from ...extras import require

require("lightning", "lightning")

from .metrics import EnsembleMetrics
from .module import HNEModule
