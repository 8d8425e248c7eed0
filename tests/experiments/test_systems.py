"""The systems of ``hne compare``: what each costs to train, where it starts from, and MC dropout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hne import FusedHNE, Hierarchy
from hne.data import Dataset, load_dataset
from hne.distributed import World
from hne.experiments import MCDropout, System, SystemConfig, compared_systems, make_trainer, run_name, with_dropout
from hne.training import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", limit_train=40, limit_test=20)


def systems(dataset: Dataset, *, dropout: float = 0.1, fine_tune_epochs: int = 2, **options: Any) -> list[System]:
    base = TrainConfig.of(**{"width": 0.25, "epochs": 8, "batch_size": 10, **options})
    found = compared_systems(base, dataset, fine_tune_epochs=fine_tune_epochs, fine_tune_lr=0.02, dropout=dropout)
    return list(found)


@pytest.mark.parametrize("preset", ["hne_tiny", "hne_resnet18_cifar"])
@pytest.mark.parametrize(("epochs", "fine"), [(8, 2), (5, 1), (30, 9)])
def test_all_cost_the_same_to_train(preset: str, epochs: int, fine: int, digits: Dataset) -> None:
    """To half an epoch of each system, since epochs are whole."""
    single, *others = systems(digits, preset=preset, epochs=epochs, fine_tune_epochs=fine)
    budget = others[0].cost
    images, size = len(digits.train), digits.input.size
    unit = single.config.build_model(digits).macs(input_size=size) * images
    assert single.cost == unit * epochs
    assert budget == single.cost + fine * others[0].config.build_model(digits).macs(input_size=size) * images
    for system in others[1:]:
        config = system.config
        own = config.build_model(digits).macs(input_size=size) * images
        assert system.cost == own * config.epochs + (single.cost if getattr(config, "start", "") else 0)
        assert abs(system.cost - budget) <= own / 2 or config.epochs == 1


def test_trees_objectives_and_rates(digits: Dataset) -> None:
    found = {system.label: system.config for system in systems(digits, preset="hne_resnet18_cifar")}
    assert {label: (c.branches, c.objective, c.epochs, c.lr) for label, c in found.items()} == {
        "one network": ((1, 1, 1, 1), "I", 8, 0.05),
        "HNE of 8 from it": ((1, 2, 4, 8), "I+HD", 2, 0.02),
        "one network, trained on": ((1, 1, 1, 1), "I", 7, 0.02),
        "deep ensemble of 8": ((8, 8, 8, 8), "I", 2, 0.05),
        "deep ensemble of 2": ((2, 2, 2, 2), "I", 8, 0.05),
        "MC dropout": ((1, 1, 1, 1), "I", 15, 0.05),
    }
    start = run_name(found["one network"])
    assert {label for label, c in found.items() if isinstance(c, SystemConfig) and c.start == start} == {
        "HNE of 8 from it",
        "one network, trained on",
    }
    assert len({run_name(config) for config in found.values()}) == 6


def test_no_second_ensemble_where_the_budget_pays_for_one_or_all(digits: Dataset) -> None:
    """Of networks that are trained for as long as the first one."""
    little = systems(digits, epochs=8, fine_tune_epochs=1)
    assert [system.label for system in little if system.kind == "independent"] == ["deep ensemble of 8"]
    much = systems(digits, epochs=1, fine_tune_epochs=9, num_models=2)
    assert [system.label for system in much if system.kind == "independent"] == ["deep ensemble of 2"]


def test_the_options_of_the_first_run_change_the_names_of_those_that_start_from_it(digits: Dataset) -> None:
    one, two = systems(digits), systems(digits, lr=0.1)
    names = [{s.label: run_name(s.config) for s in found if s.config.lr == 0.02} for found in (one, two)]
    assert names[0].keys() == names[1].keys() == {"HNE of 8 from it", "one network, trained on"}
    assert not set(names[0].values()) & set(names[1].values())


def test_fine_tuning_starts_from_the_network(digits: Dataset) -> None:
    single, hne, continued = systems(digits, seed=3)[:3]
    network = make_trainer(single.config, digits, CPU, {}).model
    with torch.no_grad():
        for buffer in network.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    models = {run_name(single.config): network}
    x = torch.randn(4, 1, 8, 8)
    expected = network.eval()(x)
    for system, members in ((hne, 8), (continued, 1)):
        trainer = make_trainer(system.config, digits, CPU, models)
        assert trainer.model.num_models == members
        assert trainer.config == system.config
        torch.testing.assert_close(trainer.model.eval()(x, 1), expected, rtol=1e-4, atol=1e-5)
        assert len(list(trainer.train(quiet=True))) == system.config.epochs
        assert not torch.allclose(trainer.model.eval()(x, 1), expected, rtol=1e-3)
    torch.testing.assert_close(network.eval()(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.0}, "dropout: expected a number above 0 and below 1, got 0.0"),
        ({"dropout": 1.0}, "dropout: expected a number above 0"),
        ({"num_models": 1}, "num_models: expected at least 2 networks for an ensemble, got 1"),
        ({"num_models": 3}, "a doubling tree"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, digits: Dataset) -> None:
    with pytest.raises(ValueError, match=message):
        systems(digits, **options)


class TestMCDropout:
    """Passes through one network."""

    def network(self, rate: float) -> FusedHNE:
        plain = FusedHNE.from_preset("hne_tiny", num_classes=5, in_channels=1, hierarchy=Hierarchy.single(4))
        specs = [[layer.spec for layer in block] for block in plain.layers_of_blocks()]
        return FusedHNE(plain.hierarchy, with_dropout(specs, rate), num_classes=5, in_channels=1)

    def test_without_dropout_passes_are_the_network(self) -> None:
        network = self.network(0.0).eval()
        x = torch.randn(3, 1, 9, 9)
        with torch.inference_mode():
            passes = MCDropout(network, 4)(x)
            assert passes.shape == (4, 3, 5)
            torch.testing.assert_close(passes, network(x).expand(4, -1, -1))

    def test_passes_differ_by_dropout_alone(self) -> None:
        """Batch norms use their statistics, and keep them."""
        network = self.network(0.3)
        network.train()(torch.randn(16, 1, 9, 9))
        members = MCDropout(network, 5).eval()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        x = torch.randn(3, 1, 9, 9)
        with torch.inference_mode():
            passes = members(x)
        assert torch.cdist(passes.flatten(1), passes.flatten(1)).add(torch.eye(5)).min() > 1e-3
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        assert members(x, 2).shape == (2, 3, 5)

    def test_mean_of_many_passes(self) -> None:
        """Dropout scales what it keeps: a linear network has the mean without dropout."""
        blocks = with_dropout([[spec for block in self.linear() for spec in block]], 0.5)
        network = FusedHNE(Hierarchy((1,)), blocks, num_classes=4, in_channels=2).eval()
        x = torch.randn(1, 2, 6, 6)
        with torch.inference_mode():
            mean = MCDropout(network, 4000)(x).mean(0)
            dropouts = [module for module in network.modules() if isinstance(module, nn.Dropout)]
            assert len(dropouts) == 1
            dropouts[0].eval()
            torch.testing.assert_close(mean, network(x)[0], rtol=0.2, atol=0.1)

    def linear(self) -> list[list[Any]]:
        from hne.layers import Conv

        return [[Conv(8, activation="none")]]

    def test_cost(self) -> None:
        network = self.network(0.1)
        assert MCDropout(network, 4).macs(3, (8, 8)) == 3 * network.macs(1, 8)


def test_configs_are_data() -> None:
    config = replace(SystemConfig.of(), start="run", dropout=0.2)
    assert SystemConfig.from_dict(config.to_dict()) == config
