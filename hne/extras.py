"""Packages that only a part of this package needs, named by an extra: ``pip install 'hne-kernels[train]'``."""

from __future__ import annotations

from importlib.util import find_spec


def require(extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed.

    Args:
        extra: Name of the extra.
        packages: Names by which they are imported.

    Raises:
        ModuleNotFoundError: One is missing; the message names the extra.
    """
    for package in packages:
        if not _is_installed(package):
            raise ModuleNotFoundError(f"{package} is not installed: pip install 'hne-kernels[{extra}]'", name=package)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # imported, but without a spec
        return False
