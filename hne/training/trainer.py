"""The training loop, and the state from which a resumed run ends exactly where an uninterrupted one would."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import data
from typing_extensions import Self

from ..data import Dataset, training_batches
from ..distributed import World
from ..errors import CheckpointError, ResultError, TrainingError
from ..evaluation import Evaluation, RegressionEvaluation, evaluate_regression, evaluate_widths
from ..losses import Objective, gaussian_objective, narrow_objective, objective
from ..models import HNE, checkpoint
from ..reporting import ProgressBar
from .captured_step import CapturedStep, check_can_capture, training_step
from .config import LATER_OPTIONS, TrainConfig
from .history import EpochRecord
from .sandwich import SandwichStep, calibrate_widths, check_slimmable

CUSTOM = "custom"  # preset in the config of a model that was built elsewhere

_MOMENTUM = "momentum/"  # prefix of the optimizer's tensors in a checkpoint


class Trainer:
    """Trains a model, and holds everything that the next step depends on.

    With several processes, the batch size of the config is the global one. All processes draw the same order and the
    same augmentation and compute equal shares of each batch, so the mean of their gradients is the gradient of the
    global batch's loss. The last batch of an epoch is left out where it is incomplete.

    On a GPU, SGD is PyTorch's fused one, with the learning rate in a tensor. A run of ordinary steps and one by CUDA
    graphs (``cuda_graph`` of the config) therefore launch the same kernels.

    A slimmable model (:meth:`hne.HNE.set_widths_`) is trained by the sandwich rule (:class:`SandwichStep`); after each
    epoch the batch-norm statistics of its widths are computed from training images.

    A run is repeated and resumed exactly: all random numbers follow from the seed of the config. Where a data set of
    your own draws from a generator of its own, its images are beyond that (see :class:`hne.data.ItemImages`).

    Args:
        model: The model to train, of any origin; it is moved to the device of ``world``. :meth:`from_config` builds the
            one that a config describes.
        dataset: The data to train and evaluate on: a :class:`hne.data.Dataset`, or a pair (training, test) of map-style
            data sets of PyTorch (see :meth:`hne.data.Dataset.from_torch`, which has more options).
        config: How the model is trained. The options that describe model and data (``preset``, ``width``,
            ``num_models``, ``branches``, ``naive``, ``data``, ``image_size``, ``limit_train``, ...) are not used.
        world: The processes that train together; by default this one alone, on the device of the model.

    Attributes:
        model: The model.
        dataset: The data, in memory on the device where they are in memory.
        config: The config; of a given model, ``data`` is the name of the data set, and ``preset`` is "custom".
        batch_size: The global batch size; below that of the config only where there are fewer training images.
        epoch: Number of finished epochs.
        history: One record per finished epoch.

    Raises:
        TypeError: ``model`` is no :class:`hne.HNE`, ``config`` no :class:`TrainConfig`, or ``dataset`` no data set.
        ValueError: The channels or classes of model and data differ.
        DataError: A data set of PyTorch is empty, or its items are not images and labels.
        TrainingError: The processes cannot share the batch equally, the network does not suit the data, no parameter
            requires a gradient, or ``cuda_graph`` is not possible: without a GPU, or with several processes; or a
            slimmable model meets several processes, ``cuda_graph`` or a regression.
    """

    _MODEL: type = HNE  # the class of the models that it trains

    def __init__(
        self,
        model: HNE,
        dataset: Dataset | Sequence[data.Dataset],
        config: TrainConfig,
        world: World | None = None,
    ) -> None:
        if isinstance(model, TrainConfig):
            raise TypeError("model must be an HNE, got a config: Trainer.from_config(config, dataset) builds its model")
        if not isinstance(model, self._MODEL):
            expected = "an HNE (FusedHNE or NaiveHNE)" if self._MODEL is HNE else self._MODEL.__name__
            raise TypeError(f"model must be {expected}, got {type(model).__name__}")
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
        world = world or World(next(model.parameters()).device)
        dataset = as_dataset(dataset, model)
        _check_fits(model, dataset)
        if config.cuda_graph:
            check_can_capture(world)
        self.config = config = replace(config, data=dataset.name, preset=CUSTOM)
        self.dataset = dataset.to(world.device)
        self.world = world
        self.batch_size = _batch_size(config, dataset, world)
        torch.manual_seed(config.seed)
        self.model = model.to(world.device)
        if config.sync_bn and world.size > 1:
            self.model.sync_batch_norm_()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError("model: no parameter requires a gradient")
        self.parallel = world.parallel(self.model)
        fused = world.device.type == "cuda" or config.cuda_graph
        if model.widths:
            check_slimmable(config, dataset, world)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            torch.tensor(config.lr, dtype=torch.float32, device=world.device) if fused else config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=fused,
        )
        self.objective = self._objective()
        self._step = self._make_step()
        self.generator = torch.Generator().manual_seed(config.seed)  # order and augmentation
        self.epoch = 0
        self.history: list[EpochRecord] = []

    @classmethod
    def from_config(cls, config: TrainConfig, dataset: Dataset, world: World | None = None, **options: Any) -> Self:
        """A trainer of the model that a config describes, with weights from the seed of the config.

        Args:
            config: The model and how it is trained.
            dataset: The data to train and evaluate on, as the config describes them.
            world: The processes that train together; by default this one alone, on the CPU.
            options: Further arguments of a subclass.

        Raises:
            ValueError: The preset is unknown, or the tree does not fit it.
            DataError, TrainingError: As for :class:`Trainer`.
        """
        torch.manual_seed(config.seed)
        trainer = cls(config.build_model(dataset), dataset, config, world, **options)
        trainer.config = config  # which describes model and data
        return trainer

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch."""
        return len(self.dataset.train) // self.batch_size

    def train(self, *, eval_every: int = 1, quiet: bool = False) -> Iterator[EpochRecord]:
        """Train until the config's last epoch; yield a record after each epoch, when the trainer can be saved.

        Args:
            eval_every: Evaluate after this number of epochs, and after the last.
            quiet: Show no progress bars.
        """
        epochs = self.config.epochs
        while self.epoch < epochs:
            lr, start = self.config.learning_rate(self.epoch), time.perf_counter()
            images = self.steps_per_epoch * self.batch_size
            with self._progress_bar(f"epoch {self.epoch + 1}/{epochs}", images, quiet) as bar:
                loss = self._train_epoch(bar)
            seconds = time.perf_counter() - start
            if self.model.widths:
                calibrate_widths(
                    self.model, self.dataset, self.batch_size, self.config.seed, augment=self.config.augment
                )
            self.epoch += 1
            evaluation: Evaluation | RegressionEvaluation | None = None
            if self.epoch % eval_every == 0 or self.epoch == epochs:
                evaluation = self._evaluate(quiet)
            record = EpochRecord(self.epoch, lr, loss, seconds, images / seconds, evaluation)
            self.history.append(record)
            yield record

    def _evaluate(self, quiet: bool) -> Evaluation | RegressionEvaluation:
        """Evaluate the model on the test images."""
        self.world.share_buffers(self.model)
        images = len(self.dataset.test) * max(1, len(self.model.widths))
        with self._progress_bar("evaluating", images, quiet) as bar:
            try:
                return self._evaluate_function()(
                    self.model,
                    self.dataset,
                    channels_last=self.config.channels_last,
                    world=self.world,
                    progress=bar.update,
                )
            except ResultError as error:
                raise TrainingError(f"{error} after epoch {self.epoch}: {self._advice()}") from error

    def _evaluate_function(self) -> Callable[..., Evaluation | RegressionEvaluation]:
        """The function that evaluates the model."""
        return evaluate_widths if self.dataset.target is None else evaluate_regression

    def _advice(self) -> str:
        """How to keep the training from diverging."""
        return f"try a smaller lr than {self.config.lr:g}, or clip_grad_norm"

    def _train_epoch(self, bar: ProgressBar) -> float:
        """Train one epoch and return the mean loss of its steps."""
        config, world = self.config, self.world
        self.parallel.train()
        total = torch.zeros((), device=world.device)
        batches = training_batches(
            self.dataset.train,
            self.dataset.input,
            self.batch_size,
            self.generator,
            augment=config.augment,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
        )
        for step, (images, target) in enumerate(batches):
            self._set_learning_rate(config.learning_rate(self.epoch + step / self.steps_per_epoch))
            if not config.channels_last:
                images = images.contiguous()
            total += self._step(images, target)
            if bar.update(self.batch_size):  # item() waits for the device: call it only where it is seen
                bar.note(f"loss {total.item() / (step + 1):.3f}")
        mean = world.sum(total).item() / (world.size * self.steps_per_epoch)
        if not math.isfinite(mean):
            raise TrainingError(f"the loss is {mean} in epoch {self.epoch + 1}: {self._advice()}")
        for name, tensor in self.model.state_dict().items():  # the last step may have spoilt it after the last loss
            if not tensor.isfinite().all():
                raise TrainingError(f"{name} is not finite after epoch {self.epoch + 1}: {self._advice()}")
        return mean

    def _make_step(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that takes a training step with a batch and returns its loss."""
        clip = self.config.clip_grad_norm
        if self.config.cuda_graph:
            return CapturedStep(self.model, self._compute_loss, self.optimizer, clip_grad_norm=clip)
        if self.model.widths:
            narrow = narrow_objective(self.config.objective, self.config.alpha, self.config.temperature)
            return SandwichStep(self.model, self._forward, self.objective, narrow, self.optimizer, clip_grad_norm=clip)
        return functools.partial(training_step, self._compute_loss, self.optimizer, clip_grad_norm=clip)

    def _forward(self, images: Tensor, **options: Any) -> Tensor:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.amp):
            logits: Tensor = self.parallel(images, **options)
        return logits

    def _compute_loss(self, images: Tensor, target: Tensor) -> Tensor:
        return self._loss(self._forward(images), images, target)

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # a CUDA graph reads it anew
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _objective(self) -> Objective:
        """The objective as a function of logits and targets."""
        config = self.config
        if self.dataset.target is None:
            return objective(config.objective, config.alpha, config.temperature)
        return gaussian_objective(self.dataset.target.normalise, config.objective, config.alpha)

    def _loss(self, logits: Tensor, images: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch; a subclass may compute it from the images, too."""
        return self.objective(logits, target)

    def _progress_bar(self, description: str, images: int, quiet: bool) -> ProgressBar:
        """A progress bar in images, shown by the main process."""
        return ProgressBar(images, description, hidden=quiet or not self.world.main)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint for :meth:`restore`."""
        tensors = checkpoint.model_tensors(self.model)
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[_MOMENTUM + name] = buffer
        tensors["rng/torch"] = torch.get_rng_state()
        tensors["rng/data"] = self.generator.get_state()
        config = {
            "model": self.model.config(),
            "data": describe_dataset(self.dataset),
            "recipe": self.config.to_dict(),
            "epoch": self.epoch,
            "history": [record.to_dict() for record in self.history],
        }
        checkpoint.save(path, tensors, config)

    def restore(self, path: str | Path) -> None:
        """Continue from a checkpoint.

        Raises:
            CheckpointError: The checkpoint is damaged, of another config or data set, or not of a training run.
        """
        tensors, config = checkpoint.load(path)
        check_same_run(path, config, self.config, self.dataset)
        try:
            epoch = config["epoch"]
            history = [EpochRecord.from_dict(record) for record in config["history"]]
            states = tensors["rng/torch"], tensors["rng/data"]
            if epoch != len(history):
                raise ValueError(f"epoch {epoch} with {len(history)} records")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: not the state of a training run ({error!r})") from error
        checkpoint.restore_model(self.model, tensors, path)
        for name, parameter in self.model.named_parameters():
            if _MOMENTUM + name in tensors:
                buffer = tensors[_MOMENTUM + name].to(parameter.device)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        torch.set_rng_state(states[0])
        self.generator.set_state(states[1])
        self.epoch = epoch
        self.history = history


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """The entry ``data`` of checkpoints and summaries: name, classes, formats and sizes, as JSON-able values."""
    held_out = {} if dataset.held_out is None else {"held_out": dataset.held_out}
    return {
        "name": dataset.name,
        "classes": dataset.classes,
        "input": dataset.input.to_dict(),
        "target": None if dataset.target is None else asdict(dataset.target),
        "train": len(dataset.train),
        "test": len(dataset.test),
        **held_out,
    }


def check_same_run(path: str | Path, stored: Mapping[str, Any], config: TrainConfig, dataset: Dataset) -> None:
    """Check that a checkpoint or summary belongs to ``config`` on ``dataset``.

    Args:
        path: The file, for the message.
        stored: The entries ``recipe`` and ``data`` of the file.
        config: The expected config.
        dataset: The expected data set.

    Raises:
        CheckpointError: The file belongs to another run; the message names the first option that differs.
    """
    expected = {"recipe": config.to_dict(), "data": describe_dataset(dataset)}
    for entry, values in json.loads(json.dumps(expected)).items():
        found = stored.get(entry)
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{path}: not of a training run of this package: it has no entry {entry!r}")
        if entry == "recipe":
            found = {**LATER_OPTIONS, **found}
        for name in sorted(values.keys() | found.keys()):
            if values.get(name) != found.get(name):
                kind = "option" if entry == "recipe" else entry
                raise CheckpointError(
                    f"{path}: of another run: {kind} {name} was {found.get(name)!r}, now it is {values.get(name)!r}"
                )


def as_dataset(dataset: Dataset | Sequence[data.Dataset], model: HNE) -> Dataset:
    """The data set of a pair of PyTorch's; the number of classes is the model's unless the first one names them."""
    if isinstance(dataset, Dataset):
        return dataset
    if not isinstance(dataset, tuple | list) or len(dataset) != 2:
        got = f"{len(dataset)} values" if isinstance(dataset, tuple | list) else type(dataset).__name__
        raise TypeError(f"dataset must be an hne.data.Dataset or a pair of data sets (training, test), got {got}")
    train, val = dataset
    return Dataset.from_torch(train, val, classes=None if hasattr(train, "classes") else model.num_classes)


def _check_fits(model: HNE, dataset: Dataset) -> None:
    for name, ours, theirs in (
        ("num_classes", model.num_classes, dataset.outputs),
        ("in_channels", model.in_channels, dataset.input.channels),
    ):
        if ours != theirs:
            raise ValueError(f"model: expected {name}={theirs} for the data set {dataset.name}, got {ours}")
    try:
        model.macs(1, dataset.input.size)
    except ValueError as error:
        raise TrainingError(f"the network does not suit the images of {dataset.name}: {error}") from error


def _batch_size(config: TrainConfig, dataset: Dataset, world: World) -> int:
    """The config's batch size, or the number of training images if that is smaller; a multiple of the processes."""
    if config.batch_size % world.size:
        raise TrainingError(
            f"batch_size: expected a multiple of the {world.size} processes, "
            f"got {config.batch_size} (it is the global batch size)"
        )
    images = len(dataset.train)
    batch_size = min(config.batch_size, images - images % world.size)
    if batch_size < 2 * world.size:
        raise TrainingError(
            f"batch norm needs at least 2 images in each of the {world.size} process(es), "
            f"got {images} training images and a batch size of {config.batch_size}"
        )
    return batch_size
