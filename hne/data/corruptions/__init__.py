"""Corruptions of images, made on the fly or read from files (Hendrycks and Dietterich 2019)."""

from __future__ import annotations

from .corrupt import CORRUPTIONS, SEVERITIES, corrupt
from .images import CorruptedImages
from .source import Corruption, corrupted_images
