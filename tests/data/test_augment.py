"""Augmentation: random crops and flips."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hne.data import MemoryImages
from hne.data.augment import RESIZED_CROP_DRAWS, crop_and_flip, resized_crop_box


def test_crop_and_flip_is_a_window_of_the_padded_image(rng: torch.Generator) -> None:
    images = torch.randint(1, 256, (200, 9, 7, 3), generator=rng, dtype=torch.uint8)
    noise = torch.rand(200, 3, generator=rng, dtype=torch.float64)
    noise[0], noise[1] = 0, 1 - 2**-53
    result = crop_and_flip(images, noise, pad=2, flip=True)
    for image, (row, column, flip), got in zip(images.numpy(), noise.tolist(), result.numpy(), strict=True):
        top, left = int(row * 5), int(column * 5)
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        window = padded[top : top + 9, left : left + 7]
        np.testing.assert_array_equal(got, window[:, ::-1] if flip < 0.5 else window)


def test_augmentation_is_uniform() -> None:
    images = MemoryImages(torch.zeros(1, 8, 8, 1).byte(), torch.zeros(1).long(), pad=4, flip=True)
    noise = images.draw(9000, torch.Generator().manual_seed(0))
    offsets = (noise[:, :2] * 9).long()
    for axis in range(2):
        counts = offsets[:, axis].bincount(minlength=9).double()
        assert (counts - 1000).abs().max() < 150  # five standard deviations
    assert abs((noise[:, 2] < 0.5).double().mean() - 0.5) < 0.03


def test_no_padding_and_no_flip_change_nothing(rng: torch.Generator) -> None:
    images = torch.randint(0, 256, (20, 8, 8, 1), generator=rng, dtype=torch.uint8)
    noise = torch.rand(20, 3, generator=rng, dtype=torch.float64)
    assert torch.equal(crop_and_flip(images, noise, pad=0, flip=False), images)


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    noise=st.lists(st.floats(0, 1, exclude_max=True), min_size=RESIZED_CROP_DRAWS, max_size=RESIZED_CROP_DRAWS),
)
def test_resized_crop_lies_in_the_image(width: int, height: int, noise: list[float]) -> None:
    left, top, right, bottom = resized_crop_box(width, height, noise)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_resized_crop_has_the_right_area_and_aspect() -> None:
    noise = torch.rand(2000, RESIZED_CROP_DRAWS, generator=torch.Generator().manual_seed(0)).tolist()
    boxes = torch.tensor([resized_crop_box(400, 400, row) for row in noise]).double()
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = w * h / 400**2, w / h
    assert 0.24 < area.min() < 0.27
    assert area.max() <= 1
    assert aspect.min() > 0.73
    assert aspect.max() < 1.36
    assert abs(aspect.log().mean()) < 0.02, "as often wide as tall"
