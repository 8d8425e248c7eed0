"""Says which extensions there are; how they are compiled stands in build_backend/native.py.

Quick rebuild in place after a change under csrc/: `python setup.py build_ext --inplace`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))  # already there when the PEP 517 backend runs us

import native  # noqa: E402

setup(ext_modules=native.extensions(ROOT), cmdclass={"build_ext": native.build_command(ROOT)})
