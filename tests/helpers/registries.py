"""The registries of layers: examples in the documents add to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hne.executors import folding
from hne.layers import Layer, spec


@contextmanager
def restored_registries() -> Iterator[None]:
    """Undo registrations of specs, modules and kernel paths at the end of the ``with`` block."""
    registries: tuple[dict[Any, Any], ...] = (folding._KERNEL_PATHS, Layer.modules_by_spec, spec._SPECS)
    before = [dict(registry) for registry in registries]
    try:
        yield
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)
