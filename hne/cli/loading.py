"""Loading of models and data, as the options of a command name them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data import (
    DATASETS,
    RESIZABLE,
    Corruption,
    Dataset,
    Images,
    InputFormat,
    corrupted_images,
    load_dataset,
    ood_images,
    ood_samples,
)
from ..errors import CheckpointError
from ..models import HNE, QuantizedHNE, checkpoint
from ..training import CHECKPOINT, TrainConfig


def checkpoint_path(path: Path) -> Path:
    """The file of a checkpoint, which may be named by its folder."""
    return path / CHECKPOINT if path.is_dir() else path


def load_model(path: Path, device: torch.device, *, naive: bool = False) -> tuple[HNE, dict[str, Any]]:
    """The model of a checkpoint, in eval mode on ``device``, and the checkpoint's metadata.

    Raises:
        CheckpointError: The checkpoint cannot be read, has numbers that are not finite, or was not written by a
            training run, so that its metadata do not describe its data.
    """
    file = checkpoint_path(path)
    model, stored = checkpoint.load_model(file, naive=naive)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{file}: {name} is not finite: the training diverged; train again with a smaller lr")
    _check_description(file, stored, model)
    return model.to(device), stored


def load_network(path: Path, device: torch.device) -> tuple[HNE | QuantizedHNE, dict[str, Any]]:
    """As :func:`load_model`; or the network of a file of ``hne quantize``, which computes on the CPU only."""
    file = checkpoint_path(path)
    if not checkpoint.is_quantized(file):
        return load_model(path, device)
    model, stored = checkpoint.load_quantized(file)
    if device.type != "cpu":
        raise ValueError(f"a network in int8 computes on the CPU, not on {device.type}: add --device cpu")
    _check_description(file, stored, model)
    return model, stored


def _check_description(file: Path, stored: dict[str, Any], model: HNE | QuantizedHNE) -> None:
    """Check that metadata describe the data and the options of a training run."""
    try:
        data, recipe = stored["data"], stored["recipe"]
        channels, classes = InputFormat.from_dict(data["input"]).channels, list(data["classes"])
        if data.get("target") is None and (channels, len(classes)) != (model.in_channels, model.num_classes):
            raise ValueError(f"{channels} channels and {len(classes)} classes")
        for values, names in ((data, ("name",)), (recipe, ("data", "preset", "width", "image_size"))):
            for name in names:
                values[name]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: does not describe its data ({error!r}): this command needs a checkpoint of a training command; "
            "a network that was saved in Python is used in Python (hne.evaluation, hne.inference)"
        ) from error


def load_test_data(args: argparse.Namespace, stored: dict[str, Any]) -> Dataset:
    """The data set of ``--data``, or by default the one that the checkpoint was trained on.

    Args:
        args: The options of a command with :func:`add_checkpoint` and :func:`add_data`.
        stored: Metadata of the checkpoint.

    Raises:
        CheckpointError: The images or classes differ from those of the training data.
    """
    trained = stored["data"]
    name = getattr(args, "data", trained["name"])
    if name not in DATASETS:
        raise CheckpointError(
            f"{checkpoint_path(args.checkpoint)}: trained on {name}, a data set that was made in Python: "
            "--data names one to test on"
        )
    dataset = load_dataset(
        name,
        args.data_dir,
        image_size=trained["input"]["size"][0] if name in RESIZABLE else None,
        **(held_out_options(trained) if name == trained["name"] else {}),
        limit_test=getattr(args, "limit_test", None),
    )
    check_fits(args.checkpoint, stored, dataset)
    return dataset


def held_out_options(trained: Mapping[str, Any]) -> dict[str, Any]:
    """The options that hold out the same test images as in a training; ``trained`` is the entry "data" of its file."""
    held_out = trained.get("held_out")
    return {} if held_out is None else dict(zip(("val_share", "split_seed"), held_out, strict=True))


def image_counts(dataset: Dataset) -> str:
    """The numbers of images to train and to test on, and which are tested on if they are held out from the former."""
    text = f"{len(dataset.train)} training and {len(dataset.test)} test images"
    if dataset.held_out is None:
        return text
    share, seed = dataset.held_out
    return f"{text} (held out: {share:g} of each class, split seed {seed})"


def load_training_data(args: argparse.Namespace, config: TrainConfig) -> Dataset:
    """The data set of a config."""
    return load_dataset(
        config.data,
        args.data_dir,
        image_size=config.image_size,
        val_share=config.val_share,
        split_seed=config.split_seed,
        limit_train=config.limit_train,
        limit_test=config.limit_test,
    )


def load_ood_images(args: argparse.Namespace, dataset: Dataset) -> Images | None:
    """The out-of-distribution images of ``--ood`` in the format of ``dataset``; None without that option.

    Raises:
        ValueError: ``dataset`` is a regression, and the option names nothing of :data:`hne.data.OOD_SAMPLES`.
    """
    if args.ood is None:
        return None
    if dataset.target is not None:
        return ood_samples(args.ood, dataset)
    return ood_images(args.ood, dataset.input, args.data_dir, limit=getattr(args, "limit_test", None))


def load_corruptions(args: argparse.Namespace, dataset: Dataset) -> tuple[Corruption, ...]:
    """The corrupted images of ``--corruptions``; none without that option.

    Raises:
        ValueError: A severity is unknown.
        DataError: There are no such images, or they do not fit ``dataset``.
    """
    if args.corruptions is None:
        return ()
    return corrupted_images(
        args.corruptions,
        dataset,
        severities=args.severities,
        seed=args.corruption_seed,
        limit=getattr(args, "limit_test", None),
    )


def check_fits(path: Path, stored: dict[str, Any], dataset: Dataset) -> None:
    """Check that a data set has the classes and the image shape of a checkpoint's training data.

    Args:
        path: The checkpoint, for the message.
        stored: Metadata of the checkpoint.
        dataset: The data set.

    Raises:
        CheckpointError: They differ.
    """
    trained = stored["data"]
    expected = trained["input"]
    actual = dataset.input
    if (list(dataset.classes), actual.channels, list(actual.size)) != (
        trained["classes"],
        expected["channels"],
        expected["size"],
    ):
        raise CheckpointError(
            f"{checkpoint_path(path)}: trained on {trained['name']} "
            f"({_shape(len(trained['classes']), expected['channels'], expected['size'])}), does not "
            f"fit {dataset.name} ({_shape(len(dataset.classes), actual.channels, actual.size)})"
        )


def _shape(classes: int, channels: int, size: Any) -> str:
    return f"{classes} classes, images {channels}x{size[0]}x{size[1]}"
