"""Adapters to other libraries. That to Lightning is in :mod:`hne.integrations.lightning`, which needs the package."""

from __future__ import annotations

from .torch_uncertainty import TorchUncertainty, stacked_members
