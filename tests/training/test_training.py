"""Training: configs, the loop, and equal results of interrupted, distributed and plain runs."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hne_kernels as K
from hne import OBJECTIVES, metrics
from hne.data import Dataset, load_dataset, ood_images
from hne.distributed import World
from hne.errors import CheckpointError, TrainingError
from hne.evaluation import evaluate, evaluate_ood
from hne.models import checkpoint
from hne.training import CHECKPOINT, DEFAULTS, PROTOCOLS, TrainConfig, Trainer

HERE = World(torch.device("cpu"))
SMALL: dict[str, Any] = {"limit_train": 64, "limit_test": 40, "batch_size": 16, "width": 0.5, "num_models": 4}
SMALL_FLAGS = "--limit-train 64 --limit-test 40 --batch-size 16 --width 0.5 --num-models 4 --threads 1 --quiet"

pytestmark = pytest.mark.usefixtures("one_thread")


def start(**options: Any) -> Trainer:
    config = TrainConfig.of(**{**SMALL, "epochs": 1, **options})
    return Trainer.from_config(config, data(config), HERE)


def data(config: TrainConfig) -> Dataset:
    return load_dataset("digits", limit_train=config.limit_train, limit_test=config.limit_test)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return checkpoint.load(path)[0]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit the same network, momentum and generators, and the same figures of every epoch."""
    (a, config_a), (b, config_b) = checkpoint.load(one), checkpoint.load(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    for config in (config_a, config_b):
        for row in config["history"]:
            del row["seconds"], row["images_per_second"]
    assert config_a == config_b


# Configs ------------------------------------------------------------------------------------------------------------


def test_protocols_are_the_papers() -> None:
    cifar = TrainConfig.of(data="cifar100")
    assert (cifar.epochs, cifar.batch_size, cifar.lr, cifar.momentum) == (200, 128, 0.1, 0.9)
    assert (cifar.weight_decay, cifar.schedule, cifar.alpha, cifar.temperature) == (5e-4, "cosine", 0.5, 2)
    assert (cifar.preset, cifar.objective) == ("hne_resnet50_cifar", "I+HD")
    imagenet = TrainConfig.of(data="imagenet")
    assert (imagenet.epochs, imagenet.batch_size, imagenet.lr, imagenet.weight_decay) == (150, 450, 0.1, 1e-5)
    assert (imagenet.alpha, imagenet.preset) == (0.75, "hne_mobilenetv2_075")
    assert TrainConfig.of(data="digits", protocol="cifar", lr=0.3).lr == 0.3
    assert {protocol for protocol, _ in DEFAULTS.values()} == set(PROTOCOLS)


def test_cosine_schedule() -> None:
    config = TrainConfig.of(data="cifar10")
    assert config.learning_rate(0) == 0.1
    assert config.learning_rate(100) == pytest.approx(0.05)
    assert config.learning_rate(200) == pytest.approx(0)


HALVED = [60, 90, 110, 125, 135, 145]


def test_halving_schedule() -> None:
    config = TrainConfig.of(data="imagenet", schedule="halving")
    halved = [epoch for epoch in range(1, 150) if config.learning_rate(epoch) < config.learning_rate(epoch - 1)]
    assert halved == HALVED
    assert config.learning_rate(149) == 0.1 / 64
    assert TrainConfig.of(data="imagenet", schedule="halving", epochs=15).learning_rate(6) == 0.05, "stretched"


def test_cyclic_schedule() -> None:
    config = TrainConfig.of(data="imagenet")
    for epoch in range(150):
        rate = 0.1 * (5 - epoch % 5) / 2 ** sum(epoch >= halving for halving in HALVED)
        assert config.learning_rate(epoch) == config.learning_rate(epoch + 0.7) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "mnist"}, r"data: expected one of digits, .*, got 'mnist'"),
        ({"protocol": "svhn"}, r"protocol: expected one of quick, cifar, imagenet, tabular, got 'svhn'"),
        ({"schedule": "step"}, r"schedule: expected one of cosine, halving, cyclic, got 'step'"),
        ({"epochs": 0}, "epochs: expected a number above 0, got 0"),
        ({"lr": float("nan")}, "lr: expected a number above 0, got nan"),
        ({"clip_grad_norm": -1.0}, r"clip_grad_norm: expected a number above 0, got -1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay: expected at least 0, got -1\.0"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.of(**options)


def test_configs_survive_json() -> None:
    config = TrainConfig.of(branches=(1, 1, 2, 2), num_models=4)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="a training config has the options"):
        TrainConfig.from_dict({"lr": 1})


def test_model_of_a_config() -> None:
    trainer = start(branches=(1, 1, 2, 2), num_models=4)
    assert trainer.model.hierarchy.branches == (1, 1, 2, 2)
    assert trainer.model.num_models == 4
    assert type(start(naive=True).model).__name__ == "NaiveHNE"


# The loop -----------------------------------------------------------------------------------------------------------


def test_it_learns() -> None:
    trainer = start(width=1.0, limit_train=400, limit_test=200, epochs=8)
    records = list(trainer.train(eval_every=4))
    assert [record.epoch for record in records] == list(range(1, 9)) == list(range(1, trainer.epoch + 1))
    assert [record.evaluation is not None for record in records] == [False, False, False, True] * 2
    assert records[-1].loss < 0.8 * records[0].loss
    evaluation = records[-1].evaluation
    assert evaluation is not None
    assert evaluation.ensembles[-1].accuracy > 0.5
    assert records[0].lr == 0.05


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(name: str) -> None:
    trainer = start(objective=name, limit_train=16)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    (record,) = trainer.train()
    assert record.loss > 0
    moved = [key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])]
    assert moved == list(before)


@pytest.mark.parametrize("options", [{"amp": True}, {"channels_last": False}, {"augment": False}, {"momentum": 0.0}])
def test_options_train(options: dict[str, Any]) -> None:
    (record,) = start(**options).train()
    (usual,) = start().train()
    assert record.loss == pytest.approx(usual.loss, rel=0.05)


def test_seed_decides() -> None:
    losses = [next(iter(start(seed=seed).train())).loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_gradients_are_clipped() -> None:
    trainer = start(clip_grad_norm=1e-3, momentum=0.0, weight_decay=0.0, lr=1.0, limit_train=16)
    before = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    list(trainer.train())
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=0.05)


def test_divergence_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch \d: try a smaller lr than 1e\+20"):
        list(start(lr=1e20, epochs=3).train())


def test_batches_that_cannot_be_shared() -> None:
    config = TrainConfig.of(**SMALL, epochs=1)
    with pytest.raises(TrainingError, match="a multiple of the 3 processes, got 16"):
        Trainer.from_config(config, data(config), World(torch.device("cpu"), size=3))
    few = replace(config, limit_train=1)
    with pytest.raises(TrainingError, match=r"at least 2 images .* got 1 training images"):
        Trainer.from_config(few, data(few), HERE)
    assert start(limit_train=9, batch_size=64).batch_size == 9


def test_images_of_another_size_than_the_networks() -> None:
    message = r"the network does not suit the images of digits: .* 224x224 pixels .*, got 8x8"
    with pytest.raises(TrainingError, match=message):
        start(preset="hne_vit_tiny", width=1.0)


def test_evaluation_agrees_with_its_definition() -> None:
    trainer = start(limit_test=100)
    list(trainer.train())
    evaluation = evaluate(trainer.model, trainer.dataset, batch_size=7)
    with torch.no_grad():
        images = trainer.dataset.input.normalise(trainer.dataset.test.pixels(torch.arange(100)))
        members, target = trainer.model(images), trainer.dataset.test.labels
    prefixes = K.prefix_mean(members)
    for ensemble, logits in zip(evaluation.ensembles, prefixes, strict=True):
        assert ensemble.accuracy == pytest.approx((logits.argmax(1) == target).float().mean().item())
        assert ensemble.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-4)
        assert ensemble.macs == trainer.model.macs(ensemble.num_models, (8, 8))
    assert [ensemble.num_models for ensemble in evaluation.ensembles] == [1, 2, 4]
    for ensemble in evaluation.ensembles:
        n = ensemble.num_models
        answer = members[:n].mean(0, keepdim=True)
        assert ensemble.brier == pytest.approx(metrics.brier_score(answer, target).item(), rel=1e-4)
        gaps = metrics.calibration_gaps(answer, target)
        assert ensemble.ece == pytest.approx(metrics.expected_calibration_error(gaps, 100).item(), rel=1e-4)
        assert ensemble.diversity == pytest.approx(metrics.diversity(members[:n]).item(), rel=1e-4)
        assert ensemble.disagreement == pytest.approx(metrics.disagreement(members[:n]).item(), rel=1e-4)
        assert ensemble.entropy == pytest.approx(metrics.predictive_entropy(members[:n]).mean().item(), rel=1e-4)
        information = metrics.mutual_information(members[:n]).mean().item()
        assert ensemble.mutual_information == pytest.approx(information, rel=1e-3, abs=1e-7)
    single = (members.argmax(-1) == target).float().mean().item()
    assert evaluation.mean_member_accuracy == pytest.approx(single)
    assert evaluation.diversity == pytest.approx(members.std(0, correction=0).mean().item(), rel=1e-4)
    assert evaluation.images == 100


def test_ood_images_are_detected_by_uncertainty() -> None:
    trainer = start(limit_test=60)
    list(trainer.train())
    images = ood_images("digits", trainer.dataset.input).subset(torch.arange(100, 145))
    found = evaluate_ood(trainer.model, trainer.dataset, images, batch_size=7)
    assert [row.num_models for row in found] == [1, 2, 4]
    with torch.no_grad():
        inside, outside = (
            trainer.model(trainer.dataset.input.normalise(split.pixels(torch.arange(len(split)))))
            for split in (trainer.dataset.test, images)
        )
    for row in found:
        n = row.num_models
        for name, measure in (
            ("entropy", metrics.predictive_entropy),
            ("mutual_information", metrics.mutual_information),
        ):
            assert getattr(row, name) == pytest.approx(measure(outside[:n]).mean().item(), rel=1e-3, abs=1e-7)
        want = metrics.detection(metrics.predictive_entropy(inside[:n]), metrics.predictive_entropy(outside[:n]))
        assert row.by_entropy.auroc == pytest.approx(want.auroc, abs=2e-3)
        for score in ("max_probability", "max_logit", "energy"):
            want = metrics.detection(*(getattr(metrics, score)(logits[:n].mean(0)) for logits in (inside, outside)))
            assert getattr(row, f"by_{score}").auroc == pytest.approx(want.auroc, abs=2e-3)
    assert found[0].by_mutual_information.auroc == 0.5, "one network has no mutual information"


# Interruptions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"naive": True}, {"amp": True, "objective": "I+D"}, {"momentum": 0.0}])
def test_resumed_run_is_the_same_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    whole, first, second = (start(epochs=4, **options) for _ in range(3))
    list(whole.train())
    whole.save(tmp_path / "whole")
    interrupted = first.train()
    for _ in range(2):
        next(interrupted)
    first.save(tmp_path / "half")
    next(interrupted)  # work that is lost
    torch.manual_seed(99)
    second.restore(tmp_path / "half")
    assert second.epoch == 2
    list(second.train())
    second.save(tmp_path / "resumed")
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_another_run_cannot_be_resumed(tmp_path: Path) -> None:
    start().save(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"of another run: option lr was 0\.05, now it is 0\.2"):
        start(lr=0.2).restore(tmp_path / "run")
    trainer = start()
    trainer.dataset = replace(trainer.dataset, classes=tuple("abcdefghij"))
    with pytest.raises(CheckpointError, match="of another run: data classes was"):
        trainer.restore(tmp_path / "run")


def command(out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "hne", "train", "--out", str(out), *SMALL_FLAGS.split(), *flags]


def test_killed_run_resumes_to_the_same_result(tmp_path: Path) -> None:
    flags = ("--epochs", "40", "--eval-every", "15")
    uninterrupted = subprocess.Popen(command(tmp_path / "whole", *flags), stdout=subprocess.DEVNULL)
    killed = subprocess.Popen(command(tmp_path / "killed", *flags), stdout=subprocess.DEVNULL)
    path = tmp_path / "killed" / CHECKPOINT
    deadline = time.monotonic() + 100
    while not path.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    epoch = checkpoint.load(path)[1]["epoch"]
    assert 1 <= epoch < 40, "killed on its way"
    subprocess.run(command(tmp_path / "killed", *flags, "--resume"), check=True, stdout=subprocess.DEVNULL)
    assert uninterrupted.wait() == 0
    assert_same_run(tmp_path / "whole" / CHECKPOINT, path)
    with open(tmp_path / "killed" / "log.csv") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(1, 41)), "every epoch once"
    assert sorted(os.listdir(tmp_path / "killed")) == ["accuracy.png", CHECKPOINT, "log.csv", "summary.json"]


# Several processes --------------------------------------------------------------------------------------------------

# In float64, where rounding (of sums that two processes add up in another order) stays far below any real difference:
# a freshly initialised network with batch norm amplifies it by some 1e6.
DOUBLE = """
import sys, torch
torch.set_default_dtype(torch.float64)
from hne.cli import main
sys.exit(main())
"""


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    script = tmp_path / "double.py"
    script.write_text(DOUBLE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--epochs", "2", "--eval-every", "1", *SMALL_FLAGS.split()]
    runs = {
        "one": [sys.executable, str(script), "train", *flags],
        "two": [*launcher, str(script), "train", *flags, "--sync-bn"],
        "apart": [*launcher, str(script), "train", *flags],
    }
    processes = [
        subprocess.Popen([*line, "--out", str(tmp_path / name)], stdout=subprocess.DEVNULL)
        for name, line in runs.items()
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    one, two, apart = (tensors_of(tmp_path / name / CHECKPOINT) for name in runs)
    assert one.keys() == two.keys() == apart.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    rows = [checkpoint.load(tmp_path / name / CHECKPOINT)[1]["history"] for name in ("one", "two")]
    for row, other in zip(*rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"])
        for figures, others in zip(row["evaluation"]["ensembles"], other["evaluation"]["ensembles"], strict=True):
            assert others == pytest.approx(figures)
    # Without --sync-bn, only the batch statistics differ: the networks are other ones, the data are the same.
    assert torch.equal(apart["rng/data"], one["rng/data"])
    assert not torch.equal(apart["model/head.conv.bias"], one["model/head.conv.bias"])
