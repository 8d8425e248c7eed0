"""Build one of the two libraries: ``gpu_build.py cpu`` or ``gpu_build.py cuda``. Both may run at the same time.

Each build has its own folder for object files, and leaves the other library out. The libraries are written below
``build/gpu_check``; ``gpu_check.py`` copies them beside the Python files when both are done.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "gpu_check"
sys.path.insert(0, str(ROOT / "build_backend"))

import native  # noqa: E402

NAMES = {"cpu": native.CPU_LIBRARY, "cuda": native.CUDA_LIBRARY}


def command(part: str) -> type[Any]:
    """The ``build_ext`` command of the package, limited to one library."""

    class BuildPart(native.build_command(ROOT)):  # type: ignore[misc]  # the base is made by a function
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(FOLDER / part)

        def build_extension(self, extension: Extension) -> None:
            # The command still knows both, because the CPU library stores the targets of the CUDA library.
            if extension.name == NAMES[part]:
                super().build_extension(extension)

    return BuildPart


def main() -> None:
    part = sys.argv[1]
    setup(
        ext_modules=native.extensions(ROOT),
        cmdclass={"build_ext": command(part)},
        script_args=["-q", "build_ext", f"--build-lib={FOLDER / 'lib'}"],
    )


if __name__ == "__main__":
    main()
