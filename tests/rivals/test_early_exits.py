"""Networks with early exits: structure, cost, laziness, and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hne import PRESETS, Conv, FusedHNE, Hierarchy
from hne.data import load_dataset
from hne.evaluation import Evaluation, evaluate_exits
from hne.experiments import RivalConfig
from hne.rivals import BlockExits, EarlyExitNetwork, MSDNet
from hne.training import ExitTrainer, TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = PRESETS["hne_tiny"].blocks


def networks() -> list[EarlyExitNetwork]:
    return [
        BlockExits(TINY, num_classes=5, in_channels=2),
        MSDNet(num_classes=5, in_channels=2, exits=3, base=2, step=2, channels=4, growth=3),
    ]


def test_msdnet_has_the_parameters_of_its_authors_version() -> None:
    """check_msdnet/log.txt of github.com/kalviny/MSDNet-PyTorch: 4,839,544 for CIFAR-10 with ten exits."""
    with torch.device("meta"):
        model = MSDNet(num_classes=10, exits=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_839_544


def test_msdnet_has_the_multiply_adds_of_its_authors_version() -> None:
    """Seven exits for CIFAR-100, against models/msdnet.py of github.com/kalviny/MSDNet-PyTorch at commit f654595.

    The figures are sums over its convolutions and linear layers, counted by their output shapes. Like its
    op_counter.py, they are without lazy evaluation, which saves what is finer than the last layers before an exit need.
    """
    not_lazy = [14_967_296, 25_259_008, 36_780_544, 45_972_480, 56_933_888, 66_529_280, 75_487_744]
    model = MSDNet(num_classes=100)
    macs = [model.macs(exits) for exits in range(1, 8)]
    assert macs[5:] == not_lazy[5:], "one scale is left"
    assert all(lazy < whole for lazy, whole in zip(macs[:5], not_lazy[:5], strict=True))
    finest = [1024 * (channels * 6 + 9 * 6 * 6) for channels in (28, 34)]  # of the third and the fourth layer
    middle = (1024 * 34 * 6 + 256 * 9 * 6 * 6) + 256 * (68 * 12 + 9 * 12 * 6)  # of the fourth layer
    assert macs[0] == not_lazy[0] - sum(finest) - middle


@pytest.mark.parametrize("layers", [(3, 2), (1, 1), (1, 3)])
def test_msdnet_computes_only_what_exits_depend_on(layers: tuple[int, int]) -> None:
    base, step = layers
    for count in range(1, 5):
        model = MSDNet(num_classes=5, exits=4, base=base, step=step, channels=4, growth=2)
        computed: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(lambda module, *_, computed=computed: computed.append(module))
        model(torch.randn(2, 3, 16, 16), count).sum().backward()
        assert len(computed) == len(set(computed)), "nothing is computed twice"
        needed = {m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.grad is not None}
        assert set(computed) == needed


def test_msdnet_ends_scales_after_each_third() -> None:
    model = MSDNet(num_classes=10, exits=4, base=3, step=2, channels=4, growth=2)
    scales = [len(layer.same) for layer in model.layers if hasattr(layer, "same")]
    assert scales == [3, 3, 3, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("index", range(2))
def test_multiply_adds_are_those_that_are_computed(index: int) -> None:
    model = networks()[index].eval()
    for count in range(1, model.num_models + 1):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 2, 12, 16), count)
        assert model.macs(count, (12, 16)) == counter.get_total_flops() // 2
    assert model.macs() == model.macs(model.num_models, 32)


def test_block_exits_cost_the_network_and_their_classifiers() -> None:
    model, single = BlockExits(TINY, num_classes=5), FusedHNE(Hierarchy.single(len(TINY)), TINY, num_classes=5)
    channels = [block[-1].channels for block in TINY]
    assert model.macs(input_size=24) == single.macs(input_size=24) + 5 * sum(channels[:-1])


@pytest.mark.parametrize("index", range(2))
@pytest.mark.parametrize("training", [False, True])
def test_later_layers_are_not_computed(index: int, training: bool, rng: torch.Generator) -> None:
    torch.manual_seed(index)
    model = networks()[index].train(training)
    x = torch.randn(3, 2, 13, 12, generator=rng)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    everything = model(x)
    assert everything.shape == (model.num_models, 3, 5)
    for count in range(1, model.num_models + 1):
        model.load_state_dict(state)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if _is_after(model, name, count):
                    parameter.fill_(float("nan"))
        torch.testing.assert_close(model(x, count), everything[:count], rtol=1e-4, atol=1e-5)


def _is_after(model: Any, name: str, count: int) -> bool:
    """Whether a parameter belongs to something that only exits after ``count`` need."""
    kind, number, *_ = name.split(".")
    if isinstance(model, BlockExits):
        return int(number) >= count
    last = list(map(int, model.exits))[count - 1]
    return (kind == "layers" and int(number) >= last) or (kind == "exits" and int(number) > last)


def test_block_exits_agree_in_training_and_inference(rng: torch.Generator) -> None:
    model = BlockExits(TINY, num_classes=5, in_channels=2).double()
    for _ in range(2):
        model(torch.randn(4, 2, 12, 12, generator=rng, dtype=torch.float64))
    x = torch.randn(3, 2, 12, 12, generator=rng, dtype=torch.float64)
    expected = model.eval()(x)  # with gradients: nothing is folded
    assert expected.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
        model.exits[0].conv.weight.mul_(2)
        torch.testing.assert_close(model(x)[1:], expected[1:])
        assert not torch.allclose(model(x)[0], expected[0]), "changed weights are noticed"


@pytest.mark.parametrize("index", range(2))
def test_gradients_reach_everything(index: int) -> None:
    model = networks()[index]
    model(torch.randn(2, 2, 16, 16)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_wrong_arguments() -> None:
    model = networks()[1]
    with pytest.raises(ValueError, match="num_models must be a number of exits from 1 to 3, got 4"):
        model(torch.zeros(1, 2, 8, 8), 4)
    with pytest.raises(ValueError, match=r"x must be images \[batch, 2, height, width\], got shape \(1, 3, 8, 8\)"):
        model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="step: expected a whole number of at least 1, got 0"):
        MSDNet(num_classes=5, step=0)
    with pytest.raises(ValueError, match="num_classes: expected a whole number of at least 1, got 0"):
        BlockExits([[Conv(4)]], num_classes=0)
    with pytest.raises(ValueError, match="rival: expected one of exits, msdnet, got 'pruned'"):
        RivalConfig.like(TrainConfig.of(), "pruned")
    with pytest.raises(TypeError, match="model must be EarlyExitNetwork, got Linear"):
        ExitTrainer(nn.Linear(2, 2), load_dataset("digits", limit_train=8, limit_test=8), TrainConfig.of())  # type: ignore[arg-type]


@pytest.mark.parametrize("rival", ["exits", "msdnet"])
def test_training_resumes_exactly(rival: str, tmp_path: Path) -> None:
    dataset = load_dataset("digits", limit_train=32, limit_test=40)
    config = RivalConfig.like(TrainConfig.of(epochs=2, batch_size=16, width=0.25), rival)
    whole = ExitTrainer.from_config(config, dataset)
    records = list(whole.train(quiet=True))
    first = ExitTrainer.from_config(config, dataset)
    next(first.train(quiet=True))
    first.save(tmp_path / "checkpoint.safetensors")
    second = ExitTrainer.from_config(config, dataset)
    second.restore(tmp_path / "checkpoint.safetensors")
    (last,) = second.train(quiet=True)
    assert last.evaluation == records[-1].evaluation
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_evaluation_is_that_of_each_exit() -> None:
    dataset = load_dataset("digits", limit_train=16, limit_test=50)
    model = MSDNet(num_classes=10, in_channels=1, exits=3, base=1, step=1, channels=4, growth=2)
    evaluation = evaluate_exits(model, dataset, batch_size=20)
    with torch.inference_mode():
        logits = model.eval()(dataset.input.normalise(dataset.test.pixels(torch.arange(50))))
    accuracy = (logits.argmax(-1) == dataset.test.labels).double().mean(1)
    assert [e.accuracy for e in evaluation.ensembles] == pytest.approx(accuracy.tolist())
    assert [e.num_models for e in evaluation.ensembles] == [1, 2, 3]
    assert [e.macs for e in evaluation.ensembles] == [model.macs(n, 8) for n in (1, 2, 3)]
    assert Evaluation.from_dict(evaluation.to_dict()) == evaluation
    assert evaluation.images == 50
