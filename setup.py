"""Registers the extensions; build_backend/native.py compiles them.

Quick rebuild after a change below csrc/: `python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))  # already on the path when the PEP 517 backend runs this file

import native  # noqa: E402

setup(
    version=native.version(os.environ),
    ext_modules=native.extensions(ROOT),
    cmdclass={"build_ext": native.build_command(ROOT)},
    options={"bdist_wheel": {"py_limited_api": native.OLDEST_PYTHON}},
)
