"""Predictions beside the measured rows of the GPU check, and the calibration of the model by those rows.

``tools/gpu_predictions.json`` has a prediction for each row of the smoke table of the backend ``cuda`` that has a time.
``python tools/predicted_rows.py`` writes it, in several minutes and without a GPU, from the CUDA library of the
checkout.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PREDICTIONS = ROOT / "tools" / "gpu_predictions.json"
CALIBRATION = ROOT / "tools" / "gpu_calibration.json"
_DOMINANT = 0.7  # a row calibrates a kernel with this share of its predicted time


def sources() -> str:
    """Identifies the sources of the kernels that were predicted."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/cuda/*"), *ROOT.glob("csrc/*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class Predictions:
    """Predicted milliseconds by row."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # ms, backward ms, kernel
    kernels: dict[str, float] = field(default_factory=dict)  # predicted milliseconds in the networks, by base name
    sources: str = ""

    @classmethod
    def load(cls, path: Path = PREDICTIONS) -> Predictions:
        if not path.exists():
            return cls()
        record = json.loads(path.read_text())
        return cls(record["rows"], record["kernels"], record["sources"])

    def save(self, path: Path = PREDICTIONS) -> None:
        record = {"sources": self.sources, "kernels": self.kernels, "rows": self.rows}
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    def of_row(self, name: str) -> dict[str, Any]:
        """The prediction of a row; float16 takes the time of bfloat16. Empty if there is none."""
        return self.rows.get(name) or self.rows.get(name.replace(" float16 ", " bfloat16 "), {})

    @property
    def note(self) -> str:
        """Why the predictions do not belong to this checkout, or an empty text."""
        if not self.rows:
            return "no predictions: run tools/predicted_rows.py where there is nvcc"
        if self.sources != sources():
            return "the predictions are those of other kernel sources: run tools/predicted_rows.py where there is nvcc"
        return ""

    @property
    def most_important(self) -> list[str]:
        """The three kernels with the longest predicted time in the networks."""
        return sorted(self.kernels, key=lambda name: -self.kernels[name])[:3]


def base(kernel: str) -> str:
    """A kernel's name without template arguments."""
    return kernel.partition("<")[0]


def ratios(rows: Sequence[dict[str, Any]], predictions: Predictions) -> list[tuple[str, float, str]]:
    """Measured over predicted time of each row that has both, with the kernel that dominates it, if one does."""
    found = []
    for row in rows:
        predicted = predictions.of_row(row["row"])
        for column, kernel in (("ms", "kernel"), ("backward ms", "backward kernel")):
            if row.get("result") == "ok" and row.get(column) and predicted.get(column):
                ratio = float(row[column]) / float(predicted[column])
                suffix = "" if column == "ms" else " (backward)"
                found.append((row["row"] + suffix, ratio, str(predicted.get(kernel, ""))))
    return found


def calibration(rows: Sequence[dict[str, Any]], predictions: Predictions, source: str) -> dict[str, Any] | None:
    """The content of ``gpu_calibration.json``: the mean ratio of each kernel, and the median of all; None if none."""
    found = ratios(rows, predictions)
    if not found:
        return None
    by_kernel: dict[str, list[float]] = {}
    for _, ratio, kernel in found:
        if kernel:
            by_kernel.setdefault(kernel, []).append(math.log(ratio))
    return {
        "kernels": {kernel: math.exp(sum(logs) / len(logs)) for kernel, logs in sorted(by_kernel.items())},
        "everything": median(ratio for _, ratio, _ in found),
        "source": source,
    }


def _cells(predictions: Sequence[Any], key: str, kernel_key: str) -> dict[str, Any]:
    total = sum(p.seconds for p in predictions)
    by_kernel: dict[str, float] = {}
    for p in predictions:
        by_kernel[base(p.kernel)] = by_kernel.get(base(p.kernel), 0.0) + p.seconds
    largest = max(by_kernel, key=lambda name: by_kernel[name]) if by_kernel else ""
    dominant = largest if total and by_kernel[largest] >= _DOMINANT * total else ""
    return {key: round(total * 1e3, 5), kernel_key: dominant}


def main() -> None:
    import cost_model
    import machine_code
    from cost_launches import FOLDER, Call, emulation, record_ops
    from cost_prediction import Calibration, predict
    from cost_work import H100, Memory

    code = machine_code.load([Path(p) for p in sys.argv[1:]] or cost_model.default_code(), cost_model.TARGET, FOLDER)
    library, memory, workers = emulation(), Memory(), len(os.sched_getaffinity(0))
    plain = Calibration()  # a calibration divides measured times by uncalibrated predictions
    found = Predictions(sources=sources())
    for name, (forward, backward) in record_ops(library).items():
        found.rows[name] = _cells(predict(forward, code, memory, workers=workers, calibration=plain), "ms", "kernel")
        if backward is not None:
            launches = predict(backward, code, memory, workers=workers, calibration=plain)
            found.rows[name] |= _cells(launches, "backward ms", "backward kernel")
    for batch, training in ((128, False), (1, False), (128, True)):
        call = Call("resnet", batch, training)
        launches = predict(cost_model.recorded(call, library), code, memory, workers=workers, calibration=plain)
        cells = _cells(launches, "ms", "kernel") | {"kernel": ""}
        host = {"ms": round(max(cells["ms"], len(launches) * H100.host_launch_s * 1e3), 5)}
        if training:
            found.rows["cuda training step, autocast bfloat16, batch 128"] = cells | host
            found.rows["cuda captured training step, autocast bfloat16, batch 128"] = cells
        else:
            found.rows[f"cuda graphed inference, bfloat16, batch {batch}"] = cells
            found.rows[f"cuda inference, bfloat16, batch {batch}"] = cells | host
        for launch in launches:
            if launch.kernel and batch > 1:
                name = base(launch.kernel)
                found.kernels[name] = found.kernels.get(name, 0.0) + launch.seconds * 1e3
    found.save()


if __name__ == "__main__":
    main()
