"""Noise of cameras: Gaussian noise, shot noise, impulse noise."""

from __future__ import annotations

import numpy as np


def gaussian_noise(image: np.ndarray, std: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise of a normal distribution, as in low light."""
    return image + rng.normal(0, std, image.shape)


def shot_noise(image: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """Count the photons of a Poisson process; white has ``photons`` of them on average."""
    return rng.poisson(image * photons) / photons


def impulse_noise(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Set a share of the values to black or white, as by errors of bits."""
    draws = rng.random(image.shape)
    return np.where(draws < share, draws < share / 2, image)
