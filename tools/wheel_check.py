"""Install each wheel in a new environment and try it: `python tools/wheel_check.py dist/*.whl`.

Needs a Python with pip and venv, no compiler. Prints the time of every step; the first failure ends the check.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORWARD = """
import torch, hne, hne_kernels as K
from hne import FusedHNE
model = FusedHNE.from_preset("hne_resnet50_cifar", num_classes=10).double().eval()
images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
answers = {}
for name in ("cpp", "reference"):
    with torch.inference_mode(), K.use_backend(name):
        answers[name] = model.prefix_logits(images)
torch.testing.assert_close(answers["cpp"], answers["reference"])
print(f"  hne {hne.__version__}, torch {torch.__version__}, from {hne.__file__}")
"""


class WheelCheck:
    """A new environment in `folder`, and a wheel for it."""

    def __init__(self, folder: Path, wheel: Path, torch: str) -> None:
        self.folder, self.wheel, self.torch = folder, wheel.resolve(), torch
        self.bin = folder / "venv" / "bin"

    def run(self, title: str, *command: str | Path) -> None:
        """Run a command away from the checkout, so that only the installed package can be imported."""
        start = time.perf_counter()
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        result = subprocess.run([str(word) for word in command], cwd=self.folder, env=environ, text=True, check=False)
        print(f"{title}: {time.perf_counter() - start:.1f} s", flush=True)
        if result.returncode:
            sys.exit(f"{self.wheel.name}: {title} failed")

    def pip(self, title: str, *requirements: str) -> None:
        options = ("--disable-pip-version-check", "--quiet", "--only-binary", ":all:")
        self.run(title, self.bin / "python", "-m", "pip", "install", *options, *requirements)

    def check(self) -> None:
        """Install and run everything."""
        print(f"{self.wheel.name}, Python {sys.version.split()[0]}, {self.torch}", flush=True)
        self.run("environment", sys.executable, "-m", "venv", "venv")
        self.pip("install torch", self.torch)
        self.pip("install the wheel", str(self.wheel))
        self.run("import and forward pass", self.bin / "python", "-c", FORWARD)
        self.run("kernels of this machine", self.bin / "python", "-m", "hne_kernels.info")
        self.pip("install the extra train", f"{self.wheel}[train]")
        train = ("train", "--data", "digits", "--preset", "hne_tiny", "--epochs", "1", "--out", "run")
        self.run("hne train", self.bin / "hne", *train)
        self.run("hne info", self.bin / "hne", "info")
        self.pip("install pytest", "pytest", "pytest-xdist", "hypothesis")
        for name in ("tests", "tools", "build_backend", "conftest.py", "pytest.ini"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self.folder / name)
        options = ("-q", "-x", "-n", "auto", "-p", "no:benchmark")
        tests = ("tests/kernels/test_parity.py", "tests/kernels/test_state_record.py", "-k", "cpp or state_record")
        self.run("parity tests", self.bin / "python", "-m", "pytest", *options, *tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--torch", default="torch", help="requirement of torch, for example torch==2.11.0")
    args = parser.parse_args()
    for wheel in args.wheels:
        with tempfile.TemporaryDirectory() as folder:
            WheelCheck(Path(folder), wheel, args.torch).check()


if __name__ == "__main__":
    main()
