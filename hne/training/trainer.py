"""Training: the loop, its state, and what makes a resumed run end where an uninterrupted one
would.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Dataset, training_batches
from ..distributed import World
from ..errors import CheckpointError, TrainingError
from ..evaluation import evaluate, evaluate_regression
from ..losses import Objective, likelihood_objective, objective
from ..models import checkpoint
from .config import Recipe
from .history import Row

CHECKPOINT = "checkpoint.safetensors"  # its name in the folder of a run

_MOMENTUM = "momentum/"  # prefix of the optimizer's tensors


class Run:
    """A training run: its recipe, and everything that its next step depends on.

    With several processes, the recipe's batch is the global one: all draw the same order and the
    same augmentation and compute equal shares, so that the mean of their gradients is the
    gradient of the global batch's loss. A last, incomplete batch of an epoch is left out.

    Args:
        recipe: what is trained, and how.
        dataset: what it is trained on.
        world: the processes that train together.

    Attributes:
        model: the network.
        batch_size: the global batch size; below the recipe's only if there are fewer images.
        epoch: number of epochs done.
        history: a row for each of them.

    Raises:
        TrainingError: the batch cannot be shared equally.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, world: World) -> None:
        self.recipe = recipe
        self.dataset = dataset.to(world.device)
        self.world = world
        self.batch_size = _batch_size(recipe, dataset, world)
        torch.manual_seed(recipe.seed)
        self.model = recipe.build_model(dataset).to(world.device)
        if recipe.sync_bn and world.size > 1:
            self.model.sync_batch_norm_()
        self.parallel = world.parallel(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.objective = self._objective()
        self.generator = torch.Generator().manual_seed(recipe.seed)  # order and augmentation
        self.epoch = 0
        self.history: list[Row] = []

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self.dataset.train) // self.batch_size

    def train(self, *, eval_every: int = 1, quiet: bool = False) -> Iterator[Row]:
        """Train until the recipe's last epoch; yield the row of every epoch, ready to be saved.

        Args:
            eval_every: evaluate after so many epochs, and after the last.
            quiet: no progress bars.
        """
        epochs = self.recipe.epochs
        while self.epoch < epochs:
            lr, start = self.recipe.learning_rate(self.epoch), time.perf_counter()
            images = self.steps_per_epoch * self.batch_size
            with self._bar(f"epoch {self.epoch + 1}/{epochs}", images, quiet) as bar:
                loss = self._train_epoch(bar)
            seconds = time.perf_counter() - start
            self.epoch += 1
            evaluation = None
            if self.epoch % eval_every == 0 or self.epoch == epochs:
                self.world.share_buffers(self.model)
                with self._bar("evaluating", len(self.dataset.test), quiet) as bar:
                    evaluation = (evaluate if self.dataset.target is None else evaluate_regression)(
                        self.model,
                        self.dataset,
                        channels_last=self.recipe.channels_last,
                        world=self.world,
                        progress=bar.update,
                    )
            row = Row(self.epoch, lr, loss, seconds, images / seconds, evaluation)
            self.history.append(row)
            yield row

    def _train_epoch(self, bar: tqdm) -> float:
        """Train one epoch and return the mean loss of its steps."""
        recipe, world = self.recipe, self.world
        self.parallel.train()
        total = torch.zeros((), device=world.device)
        batches = training_batches(
            self.dataset.train,
            self.dataset.input,
            self.batch_size,
            self.generator,
            augment=recipe.augment,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
        )
        for step, (images, target) in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = recipe.learning_rate(self.epoch + step / self.steps_per_epoch)
            if not recipe.channels_last:
                images = images.contiguous()
            with torch.autocast(world.device.type, torch.bfloat16, enabled=recipe.amp):
                logits = self.parallel(images)
            loss = self._loss(logits, images, target)
            self.optimizer.zero_grad()
            loss.backward()
            if recipe.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_grad_norm)
            self.optimizer.step()
            total += loss.detach()
            if bar.update(self.batch_size):  # redrawn: only then wait for the device
                bar.set_postfix(loss=f"{total.item() / (step + 1):.3f}", refresh=False)
        mean = world.sum(total).item() / (world.size * self.steps_per_epoch)
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} in epoch {self.epoch + 1}: try a smaller lr than {recipe.lr:g}, or clip_grad_norm"
            )
        return mean

    def _objective(self) -> Objective:
        """What is minimised, as a function of logits and target."""
        recipe = self.recipe
        if self.dataset.target is None:
            return objective(recipe.objective, recipe.alpha, recipe.temperature)
        if recipe.objective != "I":
            raise TrainingError(
                f"objective: expected I (each network by itself), the one for a regression as {recipe.data} is, "
                f"got {recipe.objective}"
            )
        return likelihood_objective(self.dataset.target.normalise)

    def _loss(self, logits: Tensor, images: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.objective(logits, target)

    def _bar(self, what: str, images: int, quiet: bool) -> tqdm:
        """A progress bar in images; silent where nobody watches (disable=None: no terminal)."""
        hidden = True if quiet or not self.world.main else None
        return tqdm(desc=what, total=images, unit="img", leave=False, disable=hidden)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint from which :meth:`restore` continues."""
        tensors = checkpoint.model_tensors(self.model)
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                tensors[_MOMENTUM + name] = buffer
        tensors["rng/torch"] = torch.get_rng_state()
        tensors["rng/data"] = self.generator.get_state()
        config = {
            "model": self.model.config(),
            "data": describe(self.dataset),
            "recipe": self.recipe.to_dict(),
            "epoch": self.epoch,
            "history": [row.to_dict() for row in self.history],
        }
        checkpoint.save(path, tensors, config)

    def restore(self, path: str | Path) -> None:
        """Continue where the run that wrote the checkpoint at ``path`` was.

        Raises:
            CheckpointError: it is damaged, or of another recipe or data set.
        """
        tensors, config = checkpoint.load(path)
        check_same_run(path, config, self.recipe, self.dataset)
        checkpoint.restore_model(self.model, tensors, path)
        for name, parameter in self.model.named_parameters():
            if _MOMENTUM + name in tensors:
                buffer = tensors[_MOMENTUM + name].to(parameter.device)
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        torch.set_rng_state(tensors["rng/torch"])
        self.generator.set_state(tensors["rng/data"])
        self.epoch = config["epoch"]
        self.history = [Row.from_dict(row) for row in config["history"]]


def describe(dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint says of its data set."""
    return {
        "name": dataset.name,
        "classes": dataset.classes,
        "input": dataset.input.to_dict(),
        "target": None if dataset.target is None else asdict(dataset.target),
        "train": len(dataset.train),
        "test": len(dataset.test),
    }


def check_same_run(path: str | Path, config: Mapping[str, Any], recipe: Recipe, dataset: Dataset) -> None:
    """Check that a run is that of ``recipe`` on ``dataset``.

    Args:
        path: of the file that tells, for the message.
        config: its ``recipe`` and ``data``, as JSON gives them.

    Raises:
        CheckpointError: it is another one; the message names the first option that differs.
    """
    here = {"recipe": recipe.to_dict(), "data": describe(dataset)}
    for part, expected in json.loads(json.dumps(here)).items():
        found = config.get(part, {})
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"{path}: of another run: {part} {name} was {found.get(name)!r}, now it is {expected.get(name)!r}"
                )


def _batch_size(recipe: Recipe, dataset: Dataset, world: World) -> int:
    """The recipe's batch size, or all images if there are fewer; equal shares for all processes."""
    if recipe.batch_size % world.size:
        raise TrainingError(
            f"batch_size: expected a multiple of the {world.size} processes, "
            f"got {recipe.batch_size} (it is the global batch size)"
        )
    images = len(dataset.train)
    batch_size = min(recipe.batch_size, images - images % world.size)
    if batch_size < 2 * world.size:
        raise TrainingError(
            f"batch norm needs at least 2 images in each of the {world.size} process(es), "
            f"got {images} training images and a batch size of {recipe.batch_size}"
        )
    return batch_size
