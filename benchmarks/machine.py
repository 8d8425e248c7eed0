"""Description of the machine and the commit, for the line above every table.

``machine.py`` prints the name of this machine's table: ``cpu-`` and the instruction set of the kernels.
"""

from __future__ import annotations

import os
import subprocess
from importlib import metadata

import revision
import torch

import hne_kernels as K
from hne_kernels import extension
from hne_kernels.environment import processor_name


def machine() -> dict[str, str]:
    """Hardware and software versions, by name."""
    facts = {
        "cpu": processor_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "instructions": extension.cpu_library().cpu_capability(),
        "torch": torch.__version__,
        "backends": ", ".join(K.available_backends()),
    }
    if torch.cuda.is_available():
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "triton": metadata.version("triton") if "triton" in K.available_backends() else "not usable",
        }
    return facts


def _driver() -> str:
    """Version of the GPU driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def table_name() -> str:
    """The name of this machine's table in results: that of the instruction set, as it decides on the kernels."""
    return f"cpu-{extension.cpu_library().cpu_capability()}"


def describe() -> dict[str, str]:
    """The machine, the commit and the date."""
    return machine() | revision.describe()


if __name__ == "__main__":
    print(table_name())
