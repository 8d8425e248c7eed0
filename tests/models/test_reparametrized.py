"""Pruned and reparametrized weights are computed before they are read: training, inference, copies, saved states."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import networks
import pytest
import torch
from networks import NUM_CLASSES, build, each_model, images
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from hne import HNE, FusedHNE, NaiveHNE, objective
from hne.layers import SkippedModuleError

Change = Callable[[nn.Module], object]
MODULES = ["blocks.0.0.unit.conv", "blocks.1.0.depthwise.conv", "blocks.1.0.project.conv", "blocks.2.2.linear.conv"]

NAMES = (*MODULES, "head.conv")

HOOKS: dict[str, Change] = {
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.4),
    "pruned twice": lambda m: (prune.random_unstructured(m, "weight", 0.3), prune.l1_unstructured(m, "weight", 0.3)),
    "structured": lambda m: prune.ln_structured(m, "weight", 0.3, n=2, dim=0),
    "custom mask": lambda m: prune.custom_from_mask(m, "weight", torch.rand_like(m.weight).round()),  # type: ignore[arg-type]
    "weight norm, by a hook": lambda m: nn.utils.weight_norm(m),
    "spectral norm, by a hook": lambda m: nn.utils.spectral_norm(m),
}
PARAMETRIZATIONS: dict[str, Change] = {
    "weight norm": lambda m: parametrizations.weight_norm(m),
    "spectral norm": lambda m: parametrizations.spectral_norm(m),
    "orthogonal": lambda m: parametrizations.orthogonal(m),
}
CHANGES = HOOKS | PARAMETRIZATIONS
each_change = pytest.mark.parametrize("change", CHANGES)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


def changed(kind: type[HNE], change: str, rng: torch.Generator, names: tuple[str, ...] = NAMES) -> HNE:
    model = build(kind, networks.TREES["odd"], rng)
    for name in names:
        CHANGES[change](model.get_submodule(name))
    return model


def computed_from(model: HNE) -> HNE:
    """A plain model with the weights that the modules of ``model`` have when they are called."""
    plain = NaiveHNE(networks.TREES["odd"], networks.BLOCKS, num_classes=NUM_CLASSES).double().train(model.training)
    state = copy.deepcopy(model).state_dict()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                for hook in module._forward_pre_hooks.values():
                    hook(module, ())  # type: ignore[operator]
                for part in ("weight", "bias"):
                    if getattr(module, part, None) is not None:
                        state[f"{name}.{part}"] = getattr(module, part).detach().clone()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


def train(model: HNE, rng: torch.Generator, steps: int = 3) -> list[Tensor]:
    """Train for some steps; the gradients of the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        objective("I+HD")(model(images(rng, 4)), torch.arange(4) % NUM_CLASSES).backward()
        optimizer.step()
    return [parameter.grad for parameter in model.parameters()]


@each_change
def test_training_agrees_with_modules_that_are_called(change: str, rng: torch.Generator) -> None:
    """PyTorch itself computes the weights of the naive model, since it calls each convolution."""
    fused = changed(FusedHNE, change, rng).train()
    naive = fused.to_naive()
    seed = int(torch.randint(2**31, (), generator=rng))
    gradients = [train(model, torch.Generator().manual_seed(seed)) for model in (fused, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(fused.state_dict(), naive.state_dict(), rtol=1e-7, atol=1e-8)


@each_model
@each_change
def test_inference_uses_the_weights_of_now(kind: type[HNE], change: str, grad: bool, rng: torch.Generator) -> None:
    model, x = changed(kind, change, rng).train(), images(rng)
    with torch.enable_grad():
        train(model, rng)
    model.eval()
    expected = computed_from(model).eval()(x)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x, 4), expected[:4])
    torch.testing.assert_close(model.prefix_logits(x, (6,))[0], expected.mean(0))
    torch.testing.assert_close([y for _, y in model.anytime(x)][-1], expected.mean(0))


@each_model
def test_pruned_batch_norms_and_biases(kind: type[HNE], grad: bool, rng: torch.Generator) -> None:
    model, x = build(kind, networks.TREES["odd"], rng), images(rng)
    prune.l1_unstructured(model.get_submodule("blocks.1.0.expand.bn"), "weight", 0.5)
    prune.random_unstructured(model.get_submodule("blocks.1.1.project.bn"), "bias", 0.5)
    prune.random_unstructured(model.head.conv, "bias", 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for training in (False, True):
        expected = computed_from(model).train(training)
        torch.testing.assert_close(model.train(training)(x), expected(x))


@each_model
@pytest.mark.parametrize("change", ["spectral norm", "spectral norm, by a hook"])
def test_checks_do_not_iterate_spectral_norm(kind: type[HNE], change: str, rng: torch.Generator) -> None:
    """Checking images computes no weight: in training a power iteration would change the state of the norm."""
    model, x = changed(kind, change, rng, ("head.conv",)).eval(), images(rng)
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    model(x)
    model.check_images(x)
    model.train().check_images(x)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("change", HOOKS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "to_naive", "to_fused"])
def test_copies(how: str, change: str, rng: torch.Generator) -> None:
    model, x = changed(FusedHNE, change, rng).train(), images(rng)
    train(model, rng)
    model.eval()
    model(x)  # leaves a weight with a graph in each module, which copy.deepcopy does not accept
    twin: HNE
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
        twin = model.to_naive() if how == "to_naive" else model.to_fused()
    torch.testing.assert_close(twin(x), model(x))
    train(twin.train(), rng)
    with torch.no_grad():
        assert (twin.eval()(x) != model(x)).any()


@pytest.mark.parametrize("change", PARAMETRIZATIONS)
def test_copies_of_parametrized_models(change: str, grad: bool, rng: torch.Generator) -> None:
    model, x = changed(FusedHNE, change, rng), images(rng)
    for twin in (copy.deepcopy(model), model.to_naive(), model.to_fused()):
        torch.testing.assert_close(twin(x), model(x))
        assert twin.state_dict().keys() == model.state_dict().keys()


@each_model
@each_change
def test_states_load_into_a_model_changed_alike(kind: type[HNE], change: str, grad: bool, rng: torch.Generator) -> None:
    model, twin = (changed(kind, change, rng) for _ in range(2))
    x = images(rng)
    expected = model(x)
    assert (twin(x) != expected).any()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), expected)


@each_model
@each_change
def test_dtypes_follow(kind: type[HNE], change: str, rng: torch.Generator) -> None:
    """A weight that a hook has left in the module keeps its dtype until it is computed again."""
    model, x = changed(kind, change, rng).eval(), images(rng)
    with torch.no_grad():
        expected = model(x)
        y = model.float()(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)


@each_change
def test_reset_parameters_refuses(change: str, rng: torch.Generator) -> None:
    """A computed weight that is initialised anew would be computed again from the old parameters."""
    model = changed(FusedHNE, change, rng)
    with pytest.raises(SkippedModuleError, match="cannot initialise a pruned or parametrized weight"):
        model.reset_parameters()


@each_model
def test_a_finished_pruning_and_a_removed_parametrization(kind: type[HNE], grad: bool, rng: torch.Generator) -> None:
    model, x = build(kind, networks.TREES["odd"], rng), images(rng)
    pruned, normed = (model.get_submodule(name) for name in MODULES[:2])
    prune.l1_unstructured(pruned, "weight", 0.4)
    parametrizations.spectral_norm(normed)
    expected = model(x)
    prune.remove(pruned, "weight")
    parametrize.remove_parametrizations(normed, "weight")
    torch.testing.assert_close(model.eval()(x), expected)


class Rank1(nn.Module):
    """LoRA: a weight plus a trained product of two vectors."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(len(weight), 1, dtype=weight.dtype))
        self.b = nn.Parameter(torch.randn(1, weight[0].numel(), dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.a @ self.b).view_as(weight)


def test_low_rank_adaptation(rng: torch.Generator) -> None:
    model, x = build(FusedHNE, networks.TREES["odd"], rng).requires_grad_(False), images(rng)
    conv = model.get_submodule("blocks.1.1.expand.conv")
    parametrize.register_parametrization(conv, "weight", Rank1(conv.weight))  # type: ignore[arg-type]
    for parameter in (conv.parametrizations.weight[0].a, conv.parametrizations.weight[0].b):  # type: ignore[index,union-attr]
        parameter.requires_grad_()
    train(model, rng)
    torch.testing.assert_close(model.eval()(x), computed_from(model).eval()(x))
    parametrize.remove_parametrizations(conv, "weight")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), computed_from(model).eval()(x))


def test_training_of_a_part_of_the_ensemble(rng: torch.Generator) -> None:
    """Training a part of the ensemble computes the whole weight, of which it reads a part."""
    fused = changed(FusedHNE, "pruned", rng).train()
    naive = fused.to_naive()
    x = images(rng, 4)
    for model in (fused, naive):
        for _ in range(2):
            model(x, 2).square().sum().backward()
    for got, want in zip(fused.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
