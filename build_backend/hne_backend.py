"""PEP 517 build backend: setuptools, and the torch of the environment being installed into.

pip builds in an isolated environment, where a torch that is installed already is out of sight; one
listed under `[build-system] requires` would be downloaded again, in another version. But the paths
of the environment itself are still known there, so its torch is put back on the path. Only where
there is none is torch asked for.
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
    """Package folders of the environment being installed into, nearest first."""
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    return list(dict.fromkeys(paths))


def find_torch(paths: list[str]) -> str | None:
    """The folder among `paths` with a torch that is new enough to build against."""
    for path in paths:
        for distribution in metadata.distributions(name="torch", path=[path]):
            major, minor = distribution.version.split(".")[:2]
            if (int(major), int(minor)) >= TORCH_TARGET:
                return path
    return None


def _requires() -> list[str]:
    return [] if find_torch(environment_paths()) else [TORCH_REQUIREMENT]


def _show_torch() -> None:
    # Last: setuptools and ninja of the isolated environment keep the right of way.
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
    _show_torch()
    for stale in Path("build").glob("lib*"):  # or modules that are gone would be packed again
        shutil.rmtree(stale)
    return build_meta.build_wheel(folder, config_settings, metadata_directory)


def build_editable(folder: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    _show_torch()
    return build_meta.build_editable(folder, config_settings, metadata_directory)


def build_sdist(folder: str, config_settings: Settings = None) -> str:
    return build_meta.build_sdist(folder, config_settings)
