"""Checkpoints: one safetensors file with the tensors, and a JSON config in its metadata.

Reading a checkpoint runs no code (no pickle). A SHA-256 over config and tensors detects a damaged file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, FileError
from ..files import is_utf8, replacing, to_json, utf8_path
from .backbone import templates_from_config
from .hne import HNE, FusedHNE, NaiveHNE
from .quantized import QuantizedHNE

FORMAT = "hne-checkpoint"
VERSION = "1"
FILE_NAME = "checkpoint.safetensors"  # in the folder of a run

_MODEL = "model/"  # prefix of the network's tensors
_QUANTIZED = "quantized"  # entry of the config of a network in int8, and prefix of its tensors


def save(path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a checkpoint. A crash leaves either the old file or the complete new one.

    Args:
        path: The file.
        tensors: Any tensors; :func:`model_tensors` gives those of a network.
        config: Values that JSON can represent.

    Raises:
        FileError: The file cannot be written.
        ResultError: The config has a number that is NaN or infinite.
    """
    tensors = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    text = to_json(config, path)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": text,
        "sha256": _digest(text, tensors),
    }
    with replacing(Path(path)) as temporary:
        try:
            if is_utf8(temporary):
                save_file(tensors, temporary, metadata)
            else:
                temporary.write_bytes(to_bytes(tensors, metadata))
        except SafetensorError as error:
            full = "No space left" in str(error)
            reason = "the disk is full: free some space, or name another place" if full else str(error)
            raise FileError(f"{path}: cannot be written: {reason}") from error


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its tensors (on the CPU) and its config.

    Raises:
        CheckpointError: The file is missing or damaged, has another version, or is not a checkpoint of an HNE.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with utf8_path(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or truncated or damaged ({error})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: a safetensors file, but no checkpoint of an HNE "
            f"(expected metadata format={FORMAT!r}, found {metadata.get('format')!r})"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: expected version {VERSION} of the checkpoint format, "
            f"found {metadata.get('version')!r}: written by another version of hne"
        )
    text = metadata.get("config", "")
    if metadata.get("sha256") != _digest(text, tensors):
        raise CheckpointError(f"{path}: damaged: the content does not agree with its SHA-256")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its config is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: its config is a {type(config).__name__}, expected an object")
    return tensors, config


def is_checkpoint(path: str | Path) -> bool:
    """Whether the metadata of a file say that it is a checkpoint; the file may be damaged nevertheless."""
    return _metadata(path).get("format") == FORMAT


def is_quantized(path: str | Path) -> bool:
    """Whether the metadata of a file say that it is a network in int8; the file may be damaged nevertheless."""
    try:
        config = json.loads(_metadata(path).get("config", ""))
    except ValueError:
        return False
    return isinstance(config, dict) and _QUANTIZED in config


def _metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; none if it cannot be read."""
    try:
        with utf8_path(Path(path)) as name, safe_open(name, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def description(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that go with the model wherever it goes, as far as they are there."""
    return {name: config[name] for name in ("data", "recipe", "calibration") if name in config}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network by their names in a checkpoint."""
    return {_MODEL + name: tensor for name, tensor in model.state_dict().items()}


def save_quantized(path: str | Path, model: QuantizedHNE, config: Mapping[str, Any]) -> None:
    """Write a checkpoint of a network in int8, with further entries of its config. Errors as :func:`save`."""
    tensors = {f"{_QUANTIZED}/{number:05d}": tensor for number, tensor in enumerate(model.tensors)}
    save(path, tensors, {**config, "model": model.config(), _QUANTIZED: model.layer_configs()})


def load_quantized(path: str | Path) -> tuple[QuantizedHNE, dict[str, Any]]:
    """The network of a checkpoint of :func:`save_quantized`, and its config.

    Raises:
        CheckpointError: As :func:`load`; or the file is that of another network, or does not fit itself.
    """
    tensors, config = load(path)
    if _QUANTIZED not in config:
        raise CheckpointError(f"{path}: not in int8: expected a file of `hne quantize`")
    try:
        ordered = [tensor for _, tensor in sorted(tensors.items())]
        return QuantizedHNE.from_config(config["model"], config[_QUANTIZED], ordered), config
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot build its network ({error})") from error


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copy the network's tensors of a checkpoint into ``model``.

    Raises:
        CheckpointError: Names or shapes differ; the message gives the first difference.
    """
    found = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    expected = model.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        shapes = [tuple(t[name].shape) if name in t else None for t in (expected, found)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path}: does not fit its network: tensor {name} expected "
                f"{shapes[0] or 'not to be there'}, found {shapes[1] or 'none'}"
            )
    model.load_state_dict(found)


def load_model(
    path: str | Path, *, naive: bool = False, templates: Sequence[nn.Module] = ()
) -> tuple[HNE, dict[str, Any]]:
    """The network of a checkpoint, in eval mode on the CPU, and the checkpoint's config.

    Args:
        path: A checkpoint of either class.
        naive: Build a :class:`NaiveHNE` instead of a :class:`FusedHNE`.
        templates: The template of each :class:`hne.Module` in the order of the layers: modules of the same classes and
            shapes, with any weights. A checkpoint holds no code. They are not needed for a network that came from a
            backbone by its name: its architecture is built anew, by the library that it is from.

    Raises:
        CheckpointError: As :func:`load`; or the network cannot be built from the config and the templates, or the
            tensors do not fit it.
    """
    tensors, config = load(path)
    if _QUANTIZED in config:
        raise CheckpointError(f"{path}: in int8, for inference only: expected a checkpoint with float weights")
    try:
        described = config["model"]
        model = (NaiveHNE if naive else FusedHNE).from_config(described, templates or templates_from_config(described))
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot build its network ({error})") from error
    restore_model(model, tensors, path)
    return model.eval(), config


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with copies of those that share memory (tied weights), which safetensors does not write."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
