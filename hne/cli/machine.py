"""The machine that times were measured on, for reports."""

from __future__ import annotations

import torch

from hne_kernels import environment_report


def machine_line() -> str:
    """Processor, threads and versions."""
    facts = dict(environment_report())
    version, machine = facts["versions"], facts["machine"]
    return (
        f"{machine['processor']}, {torch.get_num_threads()} thread(s), {machine['CPU instructions'].split()[0]}; "
        f"hne_kernels {version['hne_kernels']}, PyTorch {torch.__version__}"
    )
