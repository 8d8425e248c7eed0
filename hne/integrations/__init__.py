"""Adapters to other libraries."""

from __future__ import annotations

from .torch_uncertainty import TorchUncertainty, stacked_members
