"""Resizing and cropping for evaluation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hne.data import InputFormat


def resize_then_crop(image: Image.Image, size: tuple[int, int], resize: int) -> np.ndarray:
    """torchvision's ``Resize(resize)`` and ``CenterCrop(size)``, by the definitions of their sizes."""
    shorter = min(image.size)
    new = (int(resize * image.width / shorter), int(resize * image.height / shorter))
    image = image.resize(new, Image.Resampling.BILINEAR)
    missing = [max(0, wanted - got) for wanted, got in zip(size[::-1], image.size, strict=True)]
    padded = Image.new("RGB", (image.width + missing[0], image.height + missing[1]))
    padded.paste(image, (missing[0] // 2, missing[1] // 2))
    left, top = round((padded.width - size[1]) / 2.0), round((padded.height - size[0]) / 2.0)
    return np.asarray(padded.crop((left, top, left + size[1], top + size[0])))


@pytest.mark.parametrize(
    ("width", "height", "size", "tolerance"),
    [
        (500, 375, (224, 224), 0),
        (333, 500, (224, 224), 0),
        (333, 500, (223, 97), 0),
        (257, 300, (224, 221), 0),
        (40, 31, (224, 224), 0),
        (100, 100, (200, 301), 0),  # the crop is wider than the resized image
        (1300, 20, (224, 224), 1),  # long and narrow: only the crop is computed
        (20, 1300, (224, 224), 1),
        (11, 1300, (100, 300), 1),
    ],
)
def test_evaluation_resizes_and_crops(
    width: int, height: int, size: tuple[int, int], tolerance: int, rng: torch.Generator
) -> None:
    image = Image.fromarray(torch.randint(256, (height, width, 3), generator=rng, dtype=torch.uint8).numpy())
    found = InputFormat(3, size, (0.0,) * 3, (1.0,) * 3, resize=256).fit(image)
    assert found.shape == (*size, 3)
    assert np.abs(found.astype(int) - resize_then_crop(image, size, 256)).max() <= tolerance


@pytest.mark.parametrize(("width", "height"), [(2, 90000), (90000, 2)])
def test_a_long_and_narrow_image_is_squeezed(width: int, height: int) -> None:
    ramp = np.linspace(0, 250, 90000).round().astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp], 1 if height > width else 0))
    found = InputFormat(1, (64, 64), (0.0,), (1.0,)).fit(image)[..., 0].astype(int)
    expected = (np.arange(64) + 0.5) / 64 * 250
    assert np.abs(found - (expected[:, None] if height > width else expected[None])).max() <= 1


_PEAK = """
import resource
from PIL import Image
from hne.data import InputFormat
from hne.data.augment import RESIZED_CROP_DRAWS

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB

formats = [InputFormat(3, (224, 224), (0.0,) * 3, (1.0,) * 3, resize=resize) for resize in (256, None)]
for input_format in formats:
    input_format.fit(Image.new("RGB", (50, 50)))
before = peak()
for size in ((1, 30000), (30000, 1), (1, 2000000), (2000000, 1)):
    image = Image.new("RGB", size)
    image.save("narrow.ppm")
    for input_format in formats:
        input_format.fit(image)
        for noise in (0.0, 0.4, 0.99):
            input_format.read("narrow.ppm", [noise] * RESIZED_CROP_DRAWS)
print(peak() - before)
"""


def test_a_long_and_narrow_image_takes_little_memory(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", _PEAK], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 300  # megabytes; the whole resized image has thousands
