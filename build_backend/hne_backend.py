"""PEP 517 build backend: setuptools, built against the torch of the target environment.

pip builds in an isolated environment, which hides an installed torch. A torch in `[build-system] requires` would be
downloaded again, possibly in another version. The paths of the target environment are still known there, so this
backend puts its torch back on the path. It requires torch as a build dependency only where the environment has none.
"""

from __future__ import annotations

import shutil
import site
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from native import TORCH_TARGET
from setuptools import build_meta

Settings = Mapping[str, Any] | None

TORCH_REQUIREMENT = "torch>=" + ".".join(map(str, TORCH_TARGET))


def environment_paths() -> list[str]:
    """Package folders of the target environment, nearest first."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return list(dict.fromkeys(paths))


def find_torch(paths: list[str]) -> str | None:
    """Find the first of `paths` with a torch that is new enough to build against."""
    for path in paths:
        for distribution in metadata.distributions(name="torch", path=[path]):
            major, minor = distribution.version.split(".")[:2]
            if (int(major), int(minor)) >= TORCH_TARGET:
                return path
    return None


def _requires() -> list[str]:
    return [] if find_torch(environment_paths()) else [TORCH_REQUIREMENT]


def _add_torch_to_path() -> None:
    # Appended, so that setuptools and ninja of the isolated environment take precedence.
    path = find_torch(environment_paths())
    if path and path not in sys.path:
        sys.path.append(path)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _requires()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _requires()


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return []  # nothing is compiled


def prepare_metadata_for_build_wheel(folder: str, config_settings: Settings = None) -> str:
    return build_meta.prepare_metadata_for_build_wheel(folder, config_settings)


def prepare_metadata_for_build_editable(folder: str, config_settings: Settings = None) -> str:
    return build_meta.prepare_metadata_for_build_editable(folder, config_settings)


def build_wheel(folder: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _add_torch_to_path()
    for stale in Path("build").glob("lib*"):  # else deleted modules would end up in the wheel
        shutil.rmtree(stale)
    return build_meta.build_wheel(folder, config_settings, metadata_directory)


def build_editable(folder: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _add_torch_to_path()
    return build_meta.build_editable(folder, config_settings, metadata_directory)


def build_sdist(folder: str, config_settings: Settings = None) -> str:
    return build_meta.build_sdist(folder, config_settings)
