"""Training of networks with early exits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..evaluation import Evaluation, RegressionEvaluation, evaluate_exits
from ..rivals import EarlyExitNetwork
from .trainer import Trainer


class ExitTrainer(Trainer):
    """Trains a network with early exits as :class:`Trainer` does an HNE, and evaluates each exit by itself.

    Args:
        model: The network, in place of an HNE; for the other arguments, and errors, see :class:`Trainer`.
    """

    _MODEL = EarlyExitNetwork

    def _evaluate_function(self) -> Callable[..., Evaluation | RegressionEvaluation]:
        model: Any = self.model
        return lambda _, dataset, **options: evaluate_exits(model, dataset, **options)
