"""Few Python frames of this project lie between ``model(x)`` and an op."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import networks
import pytest
import torch
from networks import build, images
from placements import Placement

import hne
import hne_kernels as K
from hne import FusedHNE

PACKAGES = tuple(str(Path(package.__file__ or "").parent) for package in (hne, K))


def depths(model: FusedHNE, x: torch.Tensor) -> dict[str, int]:
    """For each op of this project that ``model(x)`` calls, the largest number of this project's frames on the stack."""
    found: dict[str, int] = {}

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or frame.f_code.co_name != "__call__" or not frame.f_code.co_filename.endswith("_ops.py"):
            return
        name = str(frame.f_locals["self"])
        if not name.startswith("hne."):
            return
        depth, caller = 0, frame.f_back
        while caller is not None:
            if caller.f_code.co_filename.endswith("_ops.py"):
                return  # an op called by another op, as by its own autocast rule
            depth += caller.f_code.co_filename.startswith(PACKAGES)
            caller = caller.f_back
        found[name] = max(found.get(name, 0), depth)

    sys.setprofile(watch)
    try:
        model(x)
    finally:
        sys.setprofile(None)
    assert found
    return found


@pytest.fixture
def kernels(backend: Placement) -> Placement:
    """The backends with kernels of this project."""
    if backend.backend == "reference":
        pytest.skip("plain PyTorch: no op of this project is called")
    return backend


def test_inference(kernels: Placement, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["doubling"], rng, torch.float32).to(kernels.device)
    x = images(rng, 1, (4, 4), torch.float32).to(kernels.device)
    with torch.no_grad():
        model(x)
        assert max(depths(model, x).values()) <= 4
        with torch.autocast(kernels.device, torch.bfloat16):
            model(x)
            assert max(depths(model, x).values()) <= 4


def test_training(kernels: Placement, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["doubling"], rng, torch.float32).train().to(kernels.device)
    x = images(rng, 2, (4, 4), torch.float32).to(kernels.device)
    assert max(depths(model, x).values()) <= 6
