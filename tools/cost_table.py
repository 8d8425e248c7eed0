"""Tables of the predicted cost of a network's kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cost_launches import Call
from cost_prediction import Calibration, Prediction
from cost_work import H100, Machine

_FEW = 0.01  # operations of PyTorch with a smaller share of the time are one line


def label(prediction: Prediction) -> str:
    """The kernel without the parts of its name that are the same everywhere."""
    if not prediction.kernel:
        return prediction.op
    name = re.sub(r"Precision<BFloat16, false>,? ?", "", prediction.kernel)
    name = re.sub(r"BFloat16(, )?", "", name).replace("<>", "").replace(", >", ">")
    return name.replace("_kernel", "").replace("true", "1").replace("false", "0")


@dataclass
class Group:
    """The launches of one kernel."""

    name: str
    launches: list[Prediction]

    def sum(self, attribute: str) -> float:
        return sum(getattr(launch, attribute) for launch in self.launches)

    def mean(self, attribute: str) -> float:
        return self.sum(attribute) / len(self.launches)

    def count(self, kind: str) -> float:
        return sum(launch.kinds.get(kind, 0.0) for launch in self.launches) / len(self.launches)

    @property
    def seconds(self) -> float:
        return self.sum("seconds")

    @property
    def bound(self) -> str:
        """What the largest part of the time is spent on."""
        times: dict[str, float] = {}
        for launch in self.launches:
            times[launch.bound] = times.get(launch.bound, 0.0) + launch.seconds
        return max(times, key=lambda name: times[name])

    def floor_share(self, machine: Machine) -> float:
        """The time of the bytes that must move, over the predicted time."""
        return self.sum("must_bytes") / machine.memory_bytes_per_s / self.seconds if self.seconds else 0.0


def groups(predictions: Sequence[Prediction]) -> list[Group]:
    """The launches by kernel, the longest first; PyTorch's small operations together."""
    found: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        found.setdefault(label(prediction), []).append(prediction)
    total = sum(prediction.seconds for prediction in predictions)
    large: list[Group] = []
    few: list[Group] = []
    for name, launches in found.items():
        small = not launches[0].kernel and sum(launch.seconds for launch in launches) < _FEW * total
        (few if small else large).append(Group(name, launches))
    if few:
        rest = [launch for group in few for launch in group.launches]
        large.append(Group(f"torch, {len(few)} other operations", rest))
    return sorted(large, key=lambda group: -group.seconds)


_COLUMNS = ("launches", "must MB", "memory MB", "cache MB", "instr", "scalar", "div", "bl/SM", "issue us", "us", "by")


def _cells(group: Group, machine: Machine) -> list[str]:
    ours = bool(group.launches[0].kernel)
    return [
        f"{len(group.launches)}",
        f"{group.sum('must_bytes') / 1e6:.1f}",
        f"{group.sum('memory_bytes') / 1e6:.1f}",
        f"{group.sum('cache_bytes') / 1e6:.1f}",
        f"{group.mean('instructions'):.0f}" if ours else "",
        f"{group.count('scalar global'):.0f}" if ours else "",
        f"{group.count('division') / 3:.0f}" if ours else "",  # I2F, MUFU.RCP, F2I
        f"{group.mean('resident'):.1f}".removesuffix(".0") if ours else "",
        f"{group.sum('issue_s') * 1e6:.1f}" if ours else "",
        f"{group.seconds * 1e6:.1f}",
        group.bound,
        f"{group.floor_share(machine):.0%}",
    ]


HEAD = (*_COLUMNS, "of floor", "kernel")
LEGEND = (
    "must: inputs and outputs once; memory, cache: predicted traffic of device memory and of the second cache; "
    "instr: instructions of a warp, with scalar (16-bit) global accesses and divisions; bl/SM: blocks of a "
    "multiprocessor; issue: time if every issue slot were used; us: predicted time; by: what takes longest; "
    "of floor: time of the bytes that must move at 3.0 TB/s over the predicted time"
)


def title(call: Call, predictions: Sequence[Prediction], calibration: Calibration, machine: Machine = H100) -> str:
    total = sum(prediction.seconds for prediction in predictions)
    floor = sum(prediction.must_bytes for prediction in predictions) / machine.memory_bytes_per_s
    text = (
        f"PREDICTION for an {machine.name} ({calibration.source}), {call}, bfloat16: {total * 1e3:.3f} ms as a CUDA "
        f"graph, {len(predictions)} launches; bytes that must move {floor * 1e3:.3f} ms ({floor / total:.0%})"
    )
    by_host = len(predictions) * machine.host_launch_s
    return f"{text}; launched one by one at least {by_host * 1e3:.1f} ms" if call.training else text


def table(
    call: Call, predictions: Sequence[Prediction], calibration: Calibration, machine: Machine = H100
) -> list[str]:
    """The title, and one aligned line per kernel."""
    rows = [list(HEAD), *([*_cells(group, machine), group.name] for group in groups(predictions))]
    everything = Group("total", list(predictions))
    cells = _cells(everything, machine)
    cells[4:8] = ["", "", "", ""]
    cells[8] = f"{everything.sum('issue_s') * 1e6:.1f}"
    rows.append([*cells, "total"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1][:80]]))
    return [title(call, predictions, calibration, machine), *lines]


def each_launch(predictions: Sequence[Prediction]) -> list[str]:
    """A line for every launch, in order."""
    return [
        f"{p.seconds * 1e6:8.1f} us  {p.bound:6}  busy {p.busy_s * 1e6:8.1f}  must {p.must_bytes / 1e6:8.2f} MB  "
        f"memory {p.memory_bytes / 1e6:8.2f} MB  cache {p.cache_bytes / 1e6:8.2f} MB  blocks {p.blocks:6} "
        f"({p.resident}/SM, {p.tail:.0%} idle)  {p.op}: {label(p)}"
        for p in predictions
    ]


def markdown(found: Sequence[tuple[Call, Sequence[Prediction]]], calibration: Calibration) -> list[str]:
    """A table for benchmarks/NOTES.md: a row for each call."""
    machine = H100
    lines = [
        "| call | launches | bytes that must move | predicted bytes | instructions alone | prediction | of floor |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for call, predictions in found:
        whole = Group(str(call), list(predictions))
        lines.append(
            f"| {call} | {len(predictions)} | {whole.sum('must_bytes') / 1e6:.0f} MB | "
            f"{whole.sum('memory_bytes') / 1e6:.0f} MB | {whole.sum('issue_s') * 1e3:.2f} ms | "
            f"{whole.seconds * 1e3:.2f} ms | {whole.floor_share(machine):.0%} |"
        )
    return [
        *lines,
        "",
        f"Predictions of `tools/cost_model.py` for an {machine.name}, {calibration.source}; not measured.",
    ]
