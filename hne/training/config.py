"""The config of a training run: every option that its result depends on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from typing_extensions import Self

from ..data import DATASETS, Dataset
from ..hierarchy import Hierarchy
from ..models import HNE, FusedHNE, NaiveHNE

# cifar and imagenet: section 4.1 of the HNE paper. quick: short runs. tabular: regression.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "quick": {"epochs": 30, "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4, "schedule": "cosine"},
    "cifar": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "schedule": "cosine"},
    "imagenet": {
        "epochs": 150,
        "batch_size": 450,
        "lr": 0.1,
        "weight_decay": 1e-5,
        "schedule": "cyclic",
        "alpha": 0.75,
    },
    "tabular": {
        "epochs": 40,
        "batch_size": 64,
        "lr": 0.01,
        "weight_decay": 1e-2,
        "schedule": "cosine",
        "objective": "I",
        "augment": False,
    },
}

# Default protocol and preset of each data set.
DEFAULTS: dict[str, tuple[str, str]] = {
    "digits": ("quick", "hne_tiny"),
    "fashion-mnist": ("cifar", "hne_small_resnet50_cifar"),
    "cifar10": ("cifar", "hne_resnet50_cifar"),
    "cifar100": ("cifar", "hne_resnet50_cifar"),
    "imagenet": ("imagenet", "hne_mobilenetv2_075"),
    "folder": ("quick", "hne_mobilenetv2_075"),
    "diabetes": ("tabular", "hne_mlp"),
}

SCHEDULES = ("cosine", "halving", "cyclic")

# "cyclic" is that of ESPNetv2 (Mehta et al. 2019), which the HNE paper names for ImageNet: 5, 4, 3, 2, 1 times the base
# rate in five epochs, then from the beginning.
_CYCLE = 5
# Shares of the epochs after which "halving" and "cyclic" halve the rate: 60, 90, 110, 125, 135, 145 of 150.
_HALVINGS = tuple(epoch / 150 for epoch in (60, 90, 110, 125, 135, 145))

# Options that checkpoints of earlier versions do not have, with the values that their runs had.
LATER_OPTIONS: dict[str, Any] = {
    "cuda_graph": False,
    "val_share": None,
    "split_seed": None,
    "backbone": None,
    "backbone_arch": None,
    "perturb": 0.1,
    "freeze_trunk": False,
    "widths": None,
}


@dataclass(frozen=True)
class TrainConfig:
    """The config of a training run. Checkpoints store it, and a resumed run follows it to the same result.

    ``None`` stands for the whole data set (``limit_train``, ``limit_test``), the size and tree of the preset
    (``num_models``, ``branches``), full width alone (``widths``), the image size and split of the data set, no
    backbone, or no clipping. With a ``backbone`` (see :meth:`hne.HNE.from_backbone`), ``preset`` is a name for it.
    ``widths`` are those of a slimmable model (:meth:`hne.HNE.set_widths_`), relative to ``width``.
    """

    data: str
    protocol: str
    preset: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    schedule: str
    momentum: float = 0.9
    objective: str = "I+HD"
    alpha: float = 0.5
    temperature: float = 2.0
    width: float = 1.0
    widths: tuple[float, ...] | None = None
    num_models: int | None = None
    branches: tuple[int, ...] | None = None
    naive: bool = False
    backbone: str | None = None
    backbone_arch: str | None = None
    perturb: float = 0.1
    freeze_trunk: bool = False
    seed: int = 0
    augment: bool = True
    image_size: int | None = None
    val_share: float | None = None
    split_seed: int | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    clip_grad_norm: float | None = None
    amp: bool = False
    channels_last: bool = True
    sync_bn: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        for name in ("naive", "augment", "amp", "channels_last", "sync_bn", "cuda_graph", "freeze_trunk"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name in ("epochs", "batch_size"):
            _check_whole(name, getattr(self, name))
        for name in ("num_models", "image_size", "limit_train", "limit_test"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name))
        for branches in self.branches or ():
            _check_whole("branches", branches)
        for name in ("temperature", "width"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("lr", "clip_grad_norm"):
            value = getattr(self, name)
            if value is not None or name != "clip_grad_norm":
                _check_number(name, value, lambda number: number > 0, "a number above 0")
        _check_number("perturb", self.perturb, lambda number: number >= 0, "at least 0")
        self._check_backbone()
        if self.widths is not None:
            check_widths("widths", self.widths)
        _check_number("weight_decay", self.weight_decay, lambda number: number >= 0, "at least 0")
        _check_number("momentum", self.momentum, lambda number: 0 <= number < 1, "at least 0 and below 1")
        if self.val_share is not None:
            _check_number("val_share", self.val_share, lambda number: 0 < number < 1, "a number above 0 and below 1")
        if not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha!r}")
        for name in ("seed", "split_seed"):
            value = getattr(self, name)
            if name == "split_seed" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**64:
                raise ValueError(f"{name}: expected a whole number from -2^63 to 2^64 - 1, got {value!r}")

    def _check_backbone(self) -> None:
        """Check the options that go with a backbone, or without one."""
        if self.backbone is None:
            for name, default in (("backbone_arch", None), ("perturb", 0.1), ("freeze_trunk", False)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: expected only with a backbone, got {getattr(self, name)!r}")
        elif self.branches is None:
            raise ValueError("branches: expected the branches of each block of the backbone, such as 1,1,2,4, got none")
        elif self.width != 1:
            raise ValueError(f"width: a backbone keeps its channels, got {self.width:g}")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """A config of the given options; all others come from the protocol and the defaults of the data set.

        Args:
            options: Fields by name. ``data`` is ``digits`` by default.

        Raises:
            ValueError: An option has an unknown or impossible value.
        """
        data = options.setdefault("data", "digits")
        if data not in DEFAULTS:
            raise ValueError(f"data: expected one of {', '.join(DATASETS)}, got {data!r}")
        protocol, preset = DEFAULTS[data]
        protocol = options.get("protocol", protocol)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        if options.get("backbone") is not None:
            if "preset" in options:
                raise ValueError(f"preset: expected none beside a backbone, got {options['preset']!r}")
            preset = Path(options["backbone"]).name.replace(":", "-")
        return cls(**{**PROTOCOLS[protocol], "protocol": protocol, "preset": preset, **options})

    def learning_rate(self, epoch: float) -> float:
        """The learning rate after ``epoch`` epochs; a step is a fraction of an epoch."""
        progress = epoch / self.epochs
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * progress)) / 2
        peak = self.lr * (_CYCLE - int(epoch) % _CYCLE if self.schedule == "cyclic" else 1)
        return peak * 0.5 ** sum(progress >= halving for halving in _HALVINGS)

    def build_model(self, dataset: Dataset) -> HNE:
        """The model before training. Its weights are the backbone's, or drawn from torch's global generator."""
        model = self._build_ordinary_model(dataset)
        return model if self.widths is None else model.set_widths_(self.widths)

    def _build_ordinary_model(self, dataset: Dataset) -> HNE:
        kind = NaiveHNE if self.naive else FusedHNE
        hierarchy = None if self.branches is None else Hierarchy(self.branches, self.num_models)
        if self.backbone is not None and hierarchy is not None:
            return kind.from_backbone(
                self.backbone,
                hierarchy,
                num_classes=dataset.outputs,
                perturb=self.perturb,
                seed=self.seed,
                freeze_trunk=self.freeze_trunk,
                architecture=self.backbone_arch,
            )
        return kind.from_preset(
            self.preset,
            num_classes=dataset.outputs,
            in_channels=dataset.input.channels,
            width=self.width,
            num_models=None if hierarchy else self.num_models,
            hierarchy=hierarchy,
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: An option is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        values = {**LATER_OPTIONS, **values}
        if values.keys() != names:
            raise ValueError(f"a training config has the options {sorted(names)}, got {sorted(values)}")
        for name in ("branches", "widths"):
            values[name] = None if values[name] is None else tuple(values[name])
        return cls(**values)


def check_widths(name: str, widths: tuple[float, ...]) -> None:
    """Check that an option lists different widths above 0 and at most 1, of which one at least is below 1."""
    for width in widths:
        _check_number(name, width, lambda number: 0 < number <= 1, "numbers above 0 and at most 1")
    if len(set(widths)) < len(widths) or not set(widths) - {1}:
        raise ValueError(f"{name}: expected different widths, one at least below 1, got {widths}")


def _check_whole(name: str, value: object) -> None:
    """Check that an option is a whole number from 1 to 2^31 - 1."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if not 0 < value < 2**31:
        raise ValueError(f"{name}: expected a number above 0{'' if value < 1 else ' and below 2^31'}, got {value}")


def _check_number(name: str, value: object, valid: Callable[[float], bool], expected: str) -> None:
    """Check that an option is a finite number in its range."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected {expected}, got {value} (it must be finite)")
    if not valid(value):
        raise ValueError(f"{name}: expected {expected}, got {value}")
