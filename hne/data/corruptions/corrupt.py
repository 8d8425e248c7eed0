"""Corruptions of an image, in five severities (Hendrycks and Dietterich 2019).

Eight of their fifteen, with the strengths of their code: those of CIFAR-10-C for small images, of ImageNet-C for large
ones. The others need photographs (frost) or other image libraries.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .blur import defocus_blur
from .compression import jpeg_compression, pixelate
from .light import brightness, contrast
from .noise import gaussian_noise, impulse_noise, shot_noise

SEVERITIES = (1, 2, 3, 4, 5)
_LARGE = 65  # pixels of the shorter side


class _Corruption(NamedTuple):
    """A function of an image (float64 ``[H, W, C]``, 0 to 1), a strength, and a generator; its five strengths."""

    function: Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]
    small: tuple[Any, ...]
    large: tuple[Any, ...]


_CORRUPTIONS = {
    "gaussian_noise": _Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": _Corruption(shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": _Corruption(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": _Corruption(
        defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "brightness": _Corruption(brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": _Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": _Corruption(pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": _Corruption(jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
CORRUPTIONS = tuple(_CORRUPTIONS)


def check_corruption(name: str, severity: int) -> None:
    """Check name and severity of a corruption.

    Raises:
        ValueError: One is unknown.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption: expected one of {', '.join(CORRUPTIONS)}, got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected a whole number from 1 to 5, got {severity!r}")


def corrupt(image: np.ndarray, name: str, severity: int, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Corrupt an image.

    Args:
        image: uint8 ``[H, W, C]`` with one channel or three.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5. Up to 64 pixels (of the shorter side), the strength is that of CIFAR-10-C, beyond it that of
            ImageNet-C.
        seed: of the noise, one whole number or several, at least 0. Other corruptions and severities draw other noise.

    Returns:
        uint8 ``[H, W, C]``.

    Raises:
        ValueError: the name or the severity is unknown.
    """
    check_corruption(name, severity)
    corruption = _CORRUPTIONS[name]
    strengths = corruption.large if min(image.shape[:2]) >= _LARGE else corruption.small
    rng = np.random.default_rng((zlib.crc32(name.encode()), severity, *np.atleast_1d(seed)))
    changed = corruption.function(image / 255, strengths[severity - 1], rng)
    return np.rint(changed.clip(0, 1) * 255).astype(np.uint8)
