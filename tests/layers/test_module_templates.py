"""Templates of ``hne.Module``: new weights for the copies, costs, configs and checkpoints, and what is refused."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import each_model, each_tree, images
from templates import Gate, Patches, Shuffle, encoder, in_place_first, module_layers, network, stem
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hne import HNE, Bottleneck, Conv, FusedHNE, Hierarchy, Module, NaiveHNE
from hne.errors import CheckpointError
from hne.layers import spec_from_config
from hne.models import checkpoint


def one_layer(spec: Module, branches: int = 3, in_channels: int = 3) -> FusedHNE:
    return FusedHNE(Hierarchy((branches,)), [[spec]], num_classes=2, in_channels=in_channels)


def copies_of(model: HNE) -> list[nn.Module]:
    (layer,) = module_layers(model)
    return list(layer.copies)


def trained(module: nn.Module) -> nn.Module:
    """The module, with weights and running statistics that no initialisation would give."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(4, 5)
    return module


# New weights ----------------------------------------------------------------------------------------------------------


def test_further_copies_are_drawn_anew() -> None:
    template = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Shuffle(4)))
    first, *others = copies_of(one_layer(Module(template)))
    for name, value in template.state_dict().items():
        assert torch.equal(first.state_dict()[name], value)
    for module in others:
        conv, norm, shuffle = module
        assert conv.weight.abs().max() <= 27**-0.5  # as nn.Conv2d initialises
        assert torch.equal(norm.weight, torch.ones(4))
        assert torch.equal(norm.running_var, torch.ones(4))
        assert int(norm.num_batches_tracked) == 0
        assert 0.5 < shuffle.scale.mean() / 4.5 < 1.5  # noise on the value of the template
    for name, value in others[0].named_parameters():
        assert name.startswith("1.") or not torch.equal(value, others[1].get_parameter(name))


def test_all_parameters_of_attention_are_drawn_anew() -> None:
    """PyTorch initialises attention by ``_reset_parameters()``."""
    template = trained(encoder(6))
    _, module = copies_of(one_layer(Module(template), 2, in_channels=6))
    for name, value in module.named_parameters():
        assert (value.abs() <= 1).all(), name


def test_a_module_improves_on_what_its_submodules_draw() -> None:
    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def reset_parameters(self) -> None:
            nn.init.zeros_(self.conv.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    _, module = copies_of(one_layer(Module(Zero()), 2))
    assert not module.conv.weight.any()


@pytest.mark.parametrize("perturb", [0.2, 0])
def test_perturbed_copies(perturb: float) -> None:
    template = trained(nn.Sequential(nn.Conv2d(3, 50, 3), nn.BatchNorm2d(50)))
    template[0].bias.data.zero_()
    first, *others = copies_of(one_layer(Module(template, perturb=perturb)))
    for name, value in template.state_dict().items():
        assert torch.equal(first.state_dict()[name], value)
        for module in others:
            noise = module.state_dict()[name] - value
            if "running" in name or "num" in name or not value.any() or not perturb:
                assert not noise.any()
            elif value.numel() > 1000:
                assert 0.8 * perturb < noise.std() / value.square().mean().sqrt() < 1.2 * perturb
            else:
                assert noise.all()


def test_parameters_without_gradient_are_those_of_the_template() -> None:
    """So are the running statistics of a frozen batch norm, which belong to its parameters."""
    template = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    template[1].requires_grad_(False)
    template[2].bias.requires_grad_(False)
    for perturb in (None, 0.1):
        _, module = copies_of(one_layer(Module(template, perturb=perturb), 2))
        for name, value in template.state_dict().items():
            kept = name.startswith("1.") or name == "2.bias"
            assert torch.equal(module.state_dict()[name], value) == kept, name
        assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in template.parameters()]


def test_reset_parameters() -> None:
    model = one_layer(Module(trained(stem())), 2)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    model.reset_parameters()
    first, second = "blocks.0.0.copies.0.0.weight", "blocks.0.0.copies.1.0.weight"
    assert torch.equal(model.state_dict()[first], before[first])
    assert not torch.equal(model.state_dict()[second], before[second])
    assert torch.equal(model.state_dict()["blocks.0.0.copies.1.1.running_var"], torch.ones(8))
    nn.utils.prune.l1_unstructured(model.blocks[0][0].copies[0][0], "weight", 0.5)
    with pytest.raises(RuntimeError, match=r'Missing key.*"0.weight_orig"'):
        model.reset_parameters()


def test_the_seed_determines_the_copies() -> None:
    models = []
    spec = Module(Shuffle(4))
    for _ in range(2):
        torch.manual_seed(1)
        models.append(one_layer(spec, in_channels=4).state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_templates_on_the_meta_device() -> None:
    """All copies are initialised by ``reset_parameters()``, once they have memory."""
    with torch.device("meta"):
        model = FusedHNE(Hierarchy((2,)), [[Conv(8), Module(in_place_first())]], num_classes=2)
        assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    model.reset_parameters()
    first, second = copies_of(model)
    assert 0 < first[1].weight.abs().max() <= 72**-0.5
    assert not torch.equal(first[1].weight, second[1].weight)
    assert torch.equal(first[2].running_mean, torch.zeros(6))
    assert model.macs(input_size=5) == 2 * (9 * 3 * 8 * 25 + 9 * 8 * 6 * 25 + 6 * 2)


def test_under_inference_mode(rng: torch.Generator) -> None:
    x = images(rng, dtype=torch.float32)
    with torch.inference_mode():
        template = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        model = one_layer(Module(template)).eval()
        first, second, _ = copies_of(model)
        assert not torch.equal(first[1].weight, second[1].weight)
        assert torch.equal(second[2].weight, torch.ones(4))
        torch.testing.assert_close(model(x), model.to_naive()(x))
    model = one_layer(Module(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))
    with torch.inference_mode():
        model.reset_parameters()
    assert torch.equal(copies_of(model)[1][1].weight, torch.ones(4))


# Cost -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", ["modules", "mixed"])
@each_tree
def test_macs_are_the_computed_ones(tree: Hierarchy, blocks: str, rng: torch.Generator) -> None:
    model = network(NaiveHNE, tree, rng, blocks)
    for size in ((9, 12), (16, 8)):
        for n in {1, tree.num_models}:
            # With gradients: without, PyTorch computes encoder layers by an op that it does not count.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(images(rng, 2, size), n)
            assert counter.get_total_flops() == 2 * 2 * model.macs(n, size)


def test_macs_of_attention() -> None:
    model = one_layer(Module(encoder(6)), 2, in_channels=6)
    tokens = 5 * 4
    linear = tokens * 6 * (3 * 6 + 6 + 10 + 10)
    assert model.macs(input_size=(5, 4)) == 2 * (linear + 2 * tokens * tokens * 6 + 6 * 2)


class DependsOnValues(nn.Module):
    """Does not run on the meta device."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = encoder(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.sum().item() < 1e9 else -x)


def test_macs_of_a_template_that_does_not_run_without_values() -> None:
    layers = [module_layers(one_layer(Module(t), 1, in_channels=6))[0] for t in (encoder(6), DependsOnValues(6))]
    assert layers[0].macs((5, 4)) == layers[1].macs((5, 4)) > 0


def test_runs_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer(Module(stem()))
    cost = model.macs()
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    assert model.macs() == cost
    assert copy.deepcopy(model).macs() == cost


def test_output_size() -> None:
    (layer,) = module_layers(one_layer(Module(Patches(3, 5))))
    assert (layer.channels, layer.spec.tokens, layer.output_size((8, 6))) == (5, False, (12, 1))
    (layer,) = module_layers(one_layer(Module(Gate(3, 5))))
    assert (layer.channels, layer.output_size((8, 6))) == (5, (1, 1))
    (layer,) = module_layers(one_layer(Module(nn.Linear(3, 5))))
    assert (layer.channels, layer.spec.tokens, layer.output_size((8, 6))) == (5, True, (48, 1))
    for channels in (32, 64):  # a linear layer fits rows of so many columns, too
        (layer,) = module_layers(one_layer(Module(nn.Linear(channels, 5)), in_channels=channels))
        assert (layer.channels, layer.spec.tokens) == (5, True)


# Configs and checkpoints ----------------------------------------------------------------------------------------------


@each_model
def test_config(kind: type[HNE], rng: torch.Generator) -> None:
    model = network(kind, networks.TREES["odd"], rng)
    config = json.loads(json.dumps(model.config()))
    assert [layer["template"] for block in config["blocks"] for layer in block if layer["layer"] == "Module"] == [
        "Shuffle", "Sequential", "Sequential", "TransformerEncoderLayer", "Gate"
    ]  # fmt: skip
    twin = kind.from_config(config, model.templates()).double().eval()
    assert twin.config() == config
    twin.load_state_dict(model.state_dict())
    x = images(rng)
    assert torch.equal(twin(x), model(x))
    assert twin.macs() == model.macs()
    assert "Module(Shuffle)" in repr(twin)


def test_config_of_a_spec() -> None:
    template = nn.Conv2d(3, 4, 1)
    spec = Module(template, 4, (9, 8), False, perturb=0.1)
    config = json.loads(json.dumps(spec.config()))
    assert spec_from_config(config, [template]) == spec
    assert spec_from_config(config, iter([template, None])) == spec
    assert Module(template) == Module(template) != Module(nn.Conv2d(3, 4, 1))
    assert spec.scaled(1) is spec
    with pytest.raises(ValueError, match=r"width must be 1 in a network with .*Module\(Conv2d\).*, got 0.5"):
        spec.scaled(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [], r"templates: expected one for each Module of the network \(Shuffle, .*Gate\), got 0"),
        (lambda t: t[:-1], "templates: expected one for each Module of the network .*, got 4"),
        (lambda t: [*t, nn.ReLU()], "templates: expected one for each Module of the network .*, got 6"),
        (lambda t: t[::-1], "templates: expected a Shuffle, got Gate"),
        (lambda t: [Shuffle(10), *t[1:]], r"blocks\[0\]\[1\]: Module.template Shuffle must be callable with .* 8 chan"),
        (lambda t: [*t[:-1], Gate(5, 8)], r"blocks\[2\]\[3\]: Module.channels must be .* template Gate, 8, got 7"),
    ],
)
def test_other_templates(
    change: Callable[[list[nn.Module]], list[nn.Module]], message: str, rng: torch.Generator
) -> None:
    model = network(FusedHNE, networks.TREES["odd"], rng)
    with pytest.raises(ValueError, match=message):
        FusedHNE.from_config(model.config(), change(model.templates()))


def test_templates_that_nobody_needs() -> None:
    config = FusedHNE(Hierarchy((1,)), [[Conv(4)]], num_classes=2).config()
    with pytest.raises(ValueError, match=r"templates: expected one for each Module .*\(it has none\), got 1"):
        FusedHNE.from_config(config, [nn.ReLU()])


@pytest.mark.parametrize("naive", [False, True])
def test_checkpoint(naive: bool, tmp_path: Path, rng: torch.Generator) -> None:
    model, x, path = network(FusedHNE, networks.TREES["odd"], rng, dtype=torch.float32), images(rng), tmp_path / "model"
    checkpoint.save(path, checkpoint.model_tensors(model), {"model": model.config()})
    with pytest.raises(CheckpointError, match=rf"^{path}: cannot build its network \(templates: expected one for each"):
        checkpoint.load_model(path, naive=naive)
    templates = [Shuffle(8), in_place_first(), *model.templates()[2:]]  # other weights
    loaded, _ = checkpoint.load_model(path, naive=naive, templates=templates)
    assert type(loaded) is (NaiveHNE if naive else FusedHNE)
    torch.testing.assert_close(loaded.double()(x), model.double()(x))
    templates[1] = nn.Sequential(nn.Hardswish(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))
    with pytest.raises(
        CheckpointError, match=r"tensor blocks.1.0.copies.0.1.weight expected \(6, 8, 1, 1\), found \(6, 8, 3, 3\)"
    ):
        checkpoint.load_model(path, naive=naive, templates=templates)


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_weights_that_are_tied_within_a_template(tmp_path: Path, rng: torch.Generator) -> None:
    model = one_layer(Module(Tied())).double()
    weights = [(module.first.weight, module.second.weight) for module in copies_of(model)]
    assert all(first is second for first, second in weights)
    assert not torch.equal(weights[0][0], weights[1][0])
    model(images(rng)).sum().backward()
    assert len(list(model.parameters())) == 2 * 3 + 2
    path = tmp_path / "tied"
    checkpoint.save(path, checkpoint.model_tensors(model), {"model": model.config()})
    loaded, _ = checkpoint.load_model(path, templates=[Tied()])
    module = copies_of(loaded)[2]
    assert module.first.weight is module.second.weight
    assert torch.equal(module.first.weight.double(), weights[2][0].float().double())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "to_naive().to_fused()"])
def test_copies_of_a_network_are_independent(how: str, rng: torch.Generator) -> None:
    model, x = network(FusedHNE, networks.TREES["odd"], rng), images(rng)
    with torch.no_grad():
        expected = model(x)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        elif how == "torch.save":
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        else:
            twin = model.to_naive().to_fused()
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), expected)
        assert not model(x).any()
    assert twin.macs() == model.macs()
    twin.reset_parameters()


# What is refused ------------------------------------------------------------------------------------------------------


class Function(nn.Module):
    """Any function of a feature map."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Extra(nn.Module):
    def get_extra_state(self) -> dict[str, int]:
        return {}

    def set_extra_state(self, state: Any) -> None: ...


def _quantised() -> nn.Module:
    engines = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
    if not engines:
        pytest.skip("this PyTorch has no engine for quantised modules")
    torch.backends.quantized.engine = engines[0]
    return torch.ao.nn.quantized.dynamic.Linear(3, 3)


SPECS: dict[str, tuple[Callable[[], Module], type[Exception], str]] = {
    "no module": (lambda: Module(torch.relu), TypeError, "Module.template must be an nn.Module, got <built-in"),
    "a class": (lambda: Module(nn.ReLU), TypeError, "Module.template must be an nn.Module, got <class"),
    "lazy": (
        lambda: Module(nn.Sequential(nn.ReLU(), nn.LazyConv2d(4, 1))),
        ValueError, "Module.template: LazyConv2d '1' has no parameters yet: call the template once before",
    ),
    "quantised": (
        lambda: Module(nn.Sequential(_quantised())),
        ValueError, "Module.template: Linear '0' is quantised, and cannot be trained",
    ),
    "extra state": (
        lambda: Module(nn.Sequential(Extra())),
        TypeError, "its state_dict must have tensors only, for checkpoints; got a dict for '0._extra_state'",
    ),
    "channels": (lambda: Module(nn.ReLU(), 0), ValueError, "Module.channels must be at least 1, got 0"),
    "size": (lambda: Module(nn.ReLU(), input_size=0), ValueError, "Module.input_size must be at least 1, got 0"),
    "sizes": (lambda: Module(nn.ReLU(), input_size=(3, 0)), ValueError, "Module.input_size must be at least 1, got 0"),
    "three sizes": (
        lambda: Module(nn.ReLU(), input_size=(3, 4, 5)), ValueError, r"must be one or two ints, got \(3, 4, 5\)"
    ),
    "tokens": (lambda: Module(nn.ReLU(), tokens="yes"), TypeError, "Module.tokens must be a bool or None, got 'yes'"),
    "noise": (
        lambda: Module(nn.ReLU(), perturb=-1), ValueError, "Module.perturb must be a number of at least 0, got -1"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("case", SPECS)
def test_bad_specs(case: str) -> None:
    make, error, message = SPECS[case]
    with pytest.raises(error, match=message):
        make()


RUNS: dict[str, tuple[Callable[[], Module], type[Exception], str]] = {
    "other channels": (
        lambda: Module(nn.Conv2d(4, 4, 1)), ValueError,
        r"Conv2d must be callable with one tensor of 3 channels, as a feature map or tokens of size 32x32, 64x64, "
        r"224x224 .*raised RuntimeError: .*to have 4 channels",
    ),
    "several inputs": (
        lambda: Module(nn.Bilinear(3, 3, 4)), ValueError,
        "Bilinear must be callable with one tensor .*TypeError: .*input2",
    ),
    "several outputs": (
        lambda: Module(nn.LSTM(3, 4, batch_first=True)), TypeError,
        "LSTM must return one floating-point tensor, got a tuple",
    ),
    "integers": (
        lambda: Module(Function(lambda x: x.argmax(1))), TypeError,
        "Function must return one floating-point tensor, got a tensor of torch.int64",
    ),
    "none": (
        lambda: Module(Function(lambda x: None)), TypeError, "must return one floating-point tensor, got a NoneType"
    ),
    "mean of the batch": (
        lambda: Module(Function(lambda x: x.mean(0, keepdim=True))), ValueError,
        r"or a vector \[batch, channels\] for a batch of 2, got shape \(1, 3, 32, 32\)",
    ),
    "merged batch": (
        lambda: Module(Function(lambda x: x.flatten(0, 1))), ValueError, r"for a batch of 2, got shape \(6, 32, 32\)"
    ),
    "a number": (lambda: Module(Function(torch.mean)), ValueError, r"for a batch of 2, got shape \(\)"),
    "channels": (
        lambda: Module(nn.Conv2d(3, 4, 1), 5), ValueError,
        "Module.channels must be the output channels of the template Conv2d, 4, got 5",
    ),
    "another size": (
        lambda: Module(nn.Sequential(nn.Flatten(), nn.Linear(3 * 9, 4)), input_size=4), ValueError,
        "Sequential must be callable with one tensor of 3 channels, as a feature map or tokens of size 4x4 .*mat1",
    ),
    "unclear form": (
        lambda: Module(nn.Linear(3, 4), input_size=3), ValueError,
        "Module.tokens must be True or False, as an input of size 3x3 has as many columns as channels; got None",
    ),
    "tokens for a convolution": (
        lambda: Module(nn.Conv2d(3, 4, 3), tokens=True), ValueError, "of 3 channels, as tokens of size 32x1, 64x1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_templates_that_do_not_fit(case: str) -> None:
    make, error, message = RUNS[case]
    with pytest.raises(error, match=rf"^blocks\[0\]\[0\]: .*{message}"):
        one_layer(make())


@each_model
def test_channels_that_depend_on_the_size(kind: type[HNE], rng: torch.Generator) -> None:
    spec = functools.partial(Module, nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()))
    model = kind(Hierarchy((2,)), [[spec()]], num_classes=2).double()
    with pytest.raises(
        ValueError, match="has 1800 output channels for an input of 32x32, but 140 for 9x12: give input"
    ):
        model(images(rng))
    with pytest.raises(
        ValueError, match="has 1800 output channels for an input of 32x32, but 140 for 9x12: give input"
    ):
        model.macs(input_size=(9, 12))
    model = kind(Hierarchy((2,)), [[spec(input_size=(9, 12))]], num_classes=2).double()
    assert model(images(rng)).shape == (2, 3, 2)


def test_templates_that_share_parameters() -> None:
    shared = nn.Conv2d(3, 3, 1)
    blocks = [[Module(nn.Sequential(nn.ReLU(), shared))], [Conv(3), Module(shared)]]
    with pytest.raises(
        ValueError, match=r"^blocks\[1\]\[1\]: its template shares the parameter weight with that of blocks\[0\]\[0\]"
    ):
        FusedHNE(Hierarchy((1, 2)), blocks, num_classes=2)


def test_one_template_for_two_layers() -> None:
    model = FusedHNE(Hierarchy((1,)), [[Module(nn.Conv2d(3, 3, 1))] * 2], num_classes=2)
    first, second = (layer.copies[0].weight for layer in module_layers(model))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_synchronised_batch_norm() -> None:
    model = FusedHNE(Hierarchy((1, 2)), [[Conv(4)], [Module(nn.BatchNorm2d(4)), Bottleneck(4, 2)]], num_classes=2)
    assert model.sync_batch_norm_(False) is model
    with pytest.raises(
        ValueError, match=r"^blocks\.1\.0 is a Module\(BatchNorm2d\) with batch norms of torch.nn: use .*c"
    ):
        model.sync_batch_norm_()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert isinstance(converted.blocks[1][0].copies[1], nn.SyncBatchNorm)
    assert converted.sync_batch_norm_() is converted
