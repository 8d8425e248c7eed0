"""Backbones by name: architectures of torchvision and timm, with published weights or those of a file."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from typing_extensions import Self

from ...errors import BackboneError
from .families import last_linear

LIBRARIES = ("torchvision", "timm")


@dataclass(frozen=True)
class Origin:
    """Where a model's backbone came from. Checkpoints store it, since they hold no code: its modules are built anew.

    Attributes:
        architecture: Its name, such as ``torchvision:resnet18``.
        stages, head, input_size: The arguments of :meth:`hne.HNE.from_backbone`.
    """

    architecture: str
    stages: Any = None
    head: str | None = None
    input_size: Any = None

    @classmethod
    def of(cls, architecture: str, stages: Any, head: str | None, input_size: Any) -> Self | None:
        """The origin of a model; None if its stages have modules that are not the backbone's."""
        if stages is not None:
            stages = [list(stage) for stage in stages]
            if not all(isinstance(path, str) for stage in stages for path in stage):
                return None
        return cls(architecture, stages, head, list(input_size) if isinstance(input_size, tuple) else input_size)

    def config(self) -> dict[str, Any]:
        """The origin as a JSON-able dictionary."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def load_backbone(source: str, architecture: str | None = None) -> tuple[nn.Module, str]:
    """A trained network and the name of its architecture.

    Args:
        source: ``torchvision:NAME`` or ``timm:NAME``, with the published weights, which the library downloads or has in
            its cache; or a file of weights (``.safetensors``, or a ``state_dict`` saved by ``torch.save``).
        architecture: With a file, the name of the architecture, ``torchvision:NAME`` or ``timm:NAME``. The number of
            classes is that of the file.

    Raises:
        BackboneError: The library is missing, the name is unknown, the weights cannot be read or downloaded, or they do
            not fit the architecture.
    """
    library = source.partition(":")[0]
    if library in LIBRARIES:
        if architecture is not None:
            raise BackboneError(f"architecture: expected none for {source}, which names one, got {architecture!r}")
        return create(source, pretrained=True), source
    path = Path(source).expanduser()
    if not path.is_file():
        raise BackboneError(
            f"backbone: expected torchvision:NAME, timm:NAME or a file of weights, got {source!r}, which is no file"
        )
    if architecture is None:
        raise BackboneError(
            f"architecture: {source} holds weights without a network: name it as torchvision:NAME or timm:NAME"
        )
    state = _read(path)
    net = create(architecture)
    head = f"{last_linear(net)}.weight"
    if head in state and len(state[head]) != len(net.get_parameter(head)):
        net = create(architecture, num_classes=len(state[head]))
    _check_fits(net, state, source, architecture)
    net.load_state_dict(state, strict=False)  # files of old versions of PyTorch do not count batches
    return net, architecture


def create(name: str, *, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
    """A network of torchvision or timm by its name, ``LIBRARY:NAME``, in eval mode.

    Raises:
        BackboneError: See :func:`load_backbone`.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES or not model:
        raise BackboneError(f"architecture: expected torchvision:NAME or timm:NAME, got {name!r}")
    package = _import(library)
    options = {} if num_classes is None else {"num_classes": num_classes}
    known: Iterable[str] = package.models.list_models() if library == "torchvision" else package.list_models()
    base = model.partition(".")[0]  # timm appends the tag of the weights
    if base not in known and not model.startswith(("hf-hub:", "hf_hub:")):
        nearest = difflib.get_close_matches(base, known, n=1, cutoff=0.0)
        raise BackboneError(f"backbone: {library} has no model {model!r}; the nearest name is {nearest[0]!r}")
    with torch.random.fork_rng(devices=[]):  # weights of their own are drawn first
        try:
            if library == "timm":
                net = package.create_model(model, pretrained=pretrained, **options)
            else:
                net = package.models.get_model(model, weights="DEFAULT" if pretrained else None, **options)
        except (OSError, RuntimeError, ValueError) as error:  # no network, no weights of that name
            reason = str(error).rstrip(".")
            raise BackboneError(
                f"backbone: cannot get {name}: {reason}. Without a network, get its weights elsewhere and give the "
                f"file as the backbone and {name} as its architecture"
            ) from error
    return cast("nn.Module", net).eval()


def _import(library: str) -> Any:
    try:
        package = importlib.import_module(library)
        return importlib.import_module("torchvision.models") and package if library == "torchvision" else package
    except ImportError as error:
        raise BackboneError(f"backbone: {library} is not installed: pip install {library} ({error})") from error
    except (RuntimeError, AttributeError, OSError) as error:  # built for another version of PyTorch
        raise BackboneError(
            f"backbone: {library} cannot be imported beside PyTorch {torch.__version__}: {error}. Install the version "
            "that belongs to it"
        ) from error


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, without the prefix that DataParallel adds."""
    try:
        loaded: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        kind = "a safetensors file" if isinstance(error, SafetensorError) else "a file of weights"
        raise BackboneError(f"backbone: {path} cannot be read as {kind}: {first}") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise BackboneError(f"backbone: expected tensors by name in {path}, got {type(loaded).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def _check_fits(net: nn.Module, state: Mapping[str, Tensor], source: str, architecture: str) -> None:
    expected = net.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        shapes = [tuple(t[name].shape) if name in t else None for t in (expected, state)]
        if shapes[0] != shapes[1] and not (name.endswith("num_batches_tracked") and shapes[1] is None):
            raise BackboneError(
                f"backbone: {source} does not fit {architecture}: tensor {name} expected "
                f"{'none' if shapes[0] is None else shapes[0]}, found {'none' if shapes[1] is None else shapes[1]}"
            )
