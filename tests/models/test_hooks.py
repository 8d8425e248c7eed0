"""Hooks, and modules that rely on being called: they run, or an error names them. Nothing is skipped silently."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from cuda_graphs import emulate
from networks import build, each_model, images
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import hne_kernels as K
from hne import HNE, FusedHNE, GraphedHNE, NaiveHNE
from hne.layers import SkippedModuleError

LAYERS = ["blocks.0.0", "blocks.1.0", "blocks.1.2", "blocks.2.1", "blocks.2.2"]  # of networks.BLOCKS


def model_of(kind: type[HNE], rng: torch.Generator) -> HNE:
    return build(kind, networks.TREES["odd"], rng)


def as_images(features: Tensor) -> Tensor:
    """Features ``[branches, batch, height, width, channels]`` in the layout of ``NaiveHNE``."""
    return features.permute(1, 0, 4, 2, 3).flatten(1, 2)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("early", [True, False], ids=["before the first call", "after it"])
def test_hooks_of_layers_see_the_features(early: bool, training: bool, grad: bool, rng: torch.Generator) -> None:
    x = images(rng)
    fused = model_of(FusedHNE, rng).train(training)
    naive = fused.to_naive()
    seen: dict[type, dict[str, tuple[Tensor, Tensor]]] = {FusedHNE: {}, NaiveHNE: {}}

    def watch(model: HNE, name: str) -> None:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[type(model)][name] = args[1], output

        model.get_submodule(name).register_forward_hook(hook)

    for model in (fused, naive):
        if not early:
            model(x)
        for name in LAYERS:
            watch(model, name)
        model(x)
    assert seen[FusedHNE].keys() == seen[NaiveHNE].keys() == set(LAYERS)
    for name, tensors in seen[FusedHNE].items():
        for got, want in zip(tensors, seen[NaiveHNE][name], strict=True):
            torch.testing.assert_close(as_images(got), want)


@each_model
@pytest.mark.parametrize("name", LAYERS)
def test_hooks_of_layers_may_change_the_output(kind: type[HNE], name: str, grad: bool, rng: torch.Generator) -> None:
    model, x = model_of(kind, rng), images(rng)
    before = model(x)
    handle = model.get_submodule(name).register_forward_hook(lambda layer, args, y: y * 2)
    changed = model(x)
    assert (changed != before).any()
    torch.testing.assert_close(changed, model.to_naive()(x))
    torch.testing.assert_close(model(x, 2), changed[:2])
    torch.testing.assert_close(model.prefix_logits(x, (1, 6))[1], changed.mean(0))
    torch.testing.assert_close([y for _, y in model.anytime(x)][-1], changed.mean(0))
    with model.frozen_parameters():
        handle.remove()
        torch.testing.assert_close(model(x), before)


@each_model
def test_hooks_of_the_model_and_backward_hooks(kind: type[HNE], rng: torch.Generator) -> None:
    model, x = model_of(kind, rng).train(), images(rng)
    called: list[str] = []
    gradients: list[Tensor] = []
    model.register_forward_pre_hook(lambda m, args: called.append("pre"))
    model.register_forward_hook(lambda m, args, y: called.append("post"))
    model.get_submodule("blocks.1.1").register_full_backward_hook(lambda m, inputs, outputs: gradients.append(*outputs))
    model(x).square().sum().backward()
    assert called == ["pre", "post"]
    (gradient,) = gradients
    assert gradient.isfinite().all()
    assert gradient.any()
    with torch.no_grad():
        model.eval()(x)
    assert called == ["pre", "post"] * 2


def test_global_hooks(grad: bool, rng: torch.Generator) -> None:
    """A global hook runs for the model and its layers; a warning says that it does not run for convolutions."""
    model, x = model_of(FusedHNE, rng), images(rng)
    expected = model(x)
    called: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, y: called.append(module))
    try:
        with pytest.warns(UserWarning, match="not for the convolutions and batch norms"):
            torch.testing.assert_close(model(x), expected)
        assert called == [*(layer for block in model.layers_of_blocks() for layer in block), model]
        naive = model.to_naive()
        called.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            naive(x)
        assert {module for module in naive.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))} < set(called)
    finally:
        handle.remove()
    called.clear()
    model(x)
    assert not called


def test_trackers_of_pytorch_work_without_a_warning(rng: torch.Generator) -> None:
    model, x = model_of(FusedHNE, rng), images(rng)
    with torch.no_grad(), warnings.catch_warnings(), FlopCounterMode(display=False):
        warnings.simplefilter("error")
        y = model(x)
    torch.testing.assert_close(y, model(x))


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda m: m.register_forward_hook(lambda *args: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "full backward": lambda m: m.register_full_backward_hook(lambda *args: None),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(lambda *args: None),
}
READ = ["blocks.0.0.unit.conv", "blocks.1.0.depthwise.bn", "blocks.1.0.shortcut.conv", "blocks.2.2.linear.conv"]
NEVER_CALLED = ["blocks", "blocks.1", "blocks.1.0.project", "blocks.2.2.linear", "head"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", [*READ, "head.conv", *NEVER_CALLED])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_hooks_that_would_not_run_are_errors(
    hook: str, name: str, training: bool, grad: bool, rng: torch.Generator
) -> None:
    model, x = model_of(FusedHNE, rng).train(training), images(rng)
    model(x)
    HOOKS[hook](model.get_submodule(name))
    for call in (model, model.prefix_logits):
        with pytest.raises(SkippedModuleError, match=rf"^{name}: .*would not run: register the hook on"):
            call(x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", [*READ, "head.conv"])
def test_the_naive_model_calls_convolutions_and_batch_norms(
    name: str, training: bool, grad: bool, rng: torch.Generator
) -> None:
    model, x = model_of(FusedHNE, rng).train(training), images(rng)
    called: list[torch.Size] = []
    model.get_submodule(name).register_forward_hook(lambda m, args, y: called.append(y.shape))
    naive = model.to_naive()
    naive(x)
    assert len(called) == 1
    if name != READ[0]:  # the first block has one branch only
        with pytest.raises(SkippedModuleError, match=f"^{name}: .*if it computes all models"):
            naive(x, 1)


@each_model
@pytest.mark.parametrize("name", NEVER_CALLED)
def test_both_models_refuse_hooks_of_modules_that_are_never_called(
    kind: type[HNE], name: str, rng: torch.Generator
) -> None:
    model = model_of(kind, rng)
    model.get_submodule(name).register_forward_hook(lambda *args: None)
    with pytest.raises(SkippedModuleError, match=rf"^{name}: a \w+ is never called"):
        model(images(rng))


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def replace(name: str, make: Callable[[Any], nn.Module]) -> Callable[[HNE], None]:
    """Replace the submodule ``name`` by ``make(submodule)``."""

    def change(model: HNE) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)).double().eval())

    return change


def doubled(conv: nn.Conv2d) -> nn.Module:
    conv.__class__ = Doubled
    return conv


def with_bias(conv: nn.Conv2d) -> nn.Module:
    return nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups)


def patch_forward(model: HNE) -> None:
    conv = model.get_submodule("blocks.1.1.expand.conv")
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2  # type: ignore[arg-type]


REPLACEMENTS: dict[str, tuple[str, Callable[[HNE], None]]] = {
    "identity": ("blocks.1.1.expand.bn", replace("blocks.1.1.expand.bn", lambda bn: nn.Identity())),
    "other norm": ("blocks.1.1.expand.bn", replace("blocks.1.1.expand.bn", lambda bn: nn.GroupNorm(1, 15))),
    "instance norm": (
        "blocks.1.1.expand.bn",
        replace("blocks.1.1.expand.bn", lambda bn: nn.InstanceNorm2d(15, affine=True)),
    ),
    "subclass": ("blocks.1.1.expand.conv", replace("blocks.1.1.expand.conv", doubled)),
    "patched forward": ("blocks.1.1.expand.conv", patch_forward),
    "wrapped": ("blocks.1.1.expand.conv", replace("blocks.1.1.expand.conv", nn.Sequential)),
    "bias": ("blocks.1.1.expand.conv", replace("blocks.1.1.expand.conv", with_bias)),
    "padding": (
        "blocks.1.0.depthwise.conv",
        lambda model: setattr(model.get_submodule("blocks.1.0.depthwise.conv"), "padding_mode", "circular"),
    ),
    "head": ("head.conv", replace("head.conv", doubled)),
}


@pytest.mark.parametrize("case", REPLACEMENTS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_replaced_modules(case: str, training: bool, grad: bool, rng: torch.Generator) -> None:
    """The kernels refuse a replaced convolution or batch norm by name, and the naive model calls it."""
    model, x = model_of(FusedHNE, rng), images(rng)
    name, change = REPLACEMENTS[case]
    reference = model.to_naive()
    change(model)
    change(reference)
    for m in (model, reference):
        m.train(training)
    with pytest.raises(SkippedModuleError, match=rf"^{name}: expected .* got .*to_naive"):
        model(x)
    called = []
    reference.get_submodule(name).register_forward_hook(lambda *args: called.append(1))
    assert reference(x).isfinite().all()
    assert called


@each_model
@pytest.mark.parametrize("name", ["blocks.1.0.expand", "blocks.2.2.linear", "head"])
def test_modules_of_another_kind(kind: type[HNE], name: str, grad: bool, rng: torch.Generator) -> None:
    model = model_of(kind, rng)
    replace(name, nn.Sequential)(model)
    with pytest.raises(SkippedModuleError, match=rf"^{name}: expected a \w+, .*got Sequential"):
        model(images(rng))


def test_a_patched_layer_is_called(grad: bool, rng: torch.Generator) -> None:
    model, x = model_of(FusedHNE, rng), images(rng)
    model(x)
    layer = model.get_submodule("blocks.1.1")
    forward = layer.forward
    layer.forward = lambda *args: K.materialize(forward(*args)) * 2
    expected = model.to_naive()
    twin = expected.get_submodule("blocks.1.1")
    del twin.forward
    twin.register_forward_hook(lambda layer, args, y: y * 2)
    torch.testing.assert_close(model(x), expected(x))


@torch.no_grad()
def test_graphs_refuse_hooks(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    model, x = model_of(FusedHNE, rng), images(rng)
    prune.l1_unstructured(model.head.conv, "weight", 0.5)
    graphed = GraphedHNE(model)
    torch.testing.assert_close(graphed(x), model(x))
    handle = model.get_submodule("blocks.0.1").register_forward_hook(lambda *args: None)
    for call in (lambda: graphed(x), lambda: graphed(x), lambda: GraphedHNE(model)):
        with pytest.raises(RuntimeError, match="would not run hooks"):
            call()
    handle.remove()
    torch.testing.assert_close(graphed(x), model(x))


@each_model
def test_copies_keep_hooks(kind: type[HNE], rng: torch.Generator) -> None:
    model, x = model_of(kind, rng), images(rng)
    model.get_submodule("blocks.0.1").register_forward_hook(lambda layer, args, y: y * 2)
    expected = model(x)
    for twin in (copy.deepcopy(model), model.to_naive(), model.to_fused()):
        torch.testing.assert_close(twin(x), expected)
