"""Any module as a layer: parity with plain PyTorch, in all executions."""

from __future__ import annotations

import copy
import functools
from typing import Any

import networks
import pytest
import torch
from networks import each_model, each_tree, images
from templates import BLOCKS, Shuffle, in_place_first, module_layers, network
from torch import Tensor, nn

import hne
from hne import HNE, AnytimePredictor, Conv, FusedHNE, Hierarchy, Module, NaiveHNE
from hne.layers import ModuleLayer, SkippedModuleError

each_network = pytest.mark.parametrize("blocks", BLOCKS)


def logits_of_copies(model: HNE, x: Tensor, num_models: int) -> Tensor:
    """The logits of a network of modules, computed by calls of its copies, each node of the tree once."""
    tree = model.hierarchy

    @functools.cache
    def features(number: int, branch: int) -> Tensor:
        if number < 0:
            return x
        y = features(number - 1, branch * tree.levels[number - 1] // tree.levels[number] if number else 0)
        for layer in model.layers_of_blocks()[number]:
            y = layer.copies[branch](y.clone())  # some write to their input
        return y

    weight, bias = (t.unflatten(0, (model.num_models, -1)) for t in model.head.conv.parameters())
    last = tree.num_blocks - 1
    pooled = [features(last, tree.ancestor(leaf, last)) for leaf in range(num_models)]
    return torch.stack([y @ weight[leaf, ..., 0, 0].T + bias[leaf] for leaf, y in enumerate(pooled)])


@each_tree
@each_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_plain_pytorch(training: bool, kind: type[HNE], tree: Hierarchy, rng: torch.Generator) -> None:
    """Logits, gradients and running statistics are those of calls of the copies."""
    model = network(kind, tree, rng, "modules").train(training)
    for n in (tree.num_models, 1, max(1, tree.num_models - 1)):
        twin = copy.deepcopy(model)
        x = images(rng)
        x, y = (t.requires_grad_() for t in (x, x.clone()))
        logits, want = model(x, n), logits_of_copies(twin, y, n)
        torch.testing.assert_close(logits, want)
        torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
        cotangent = torch.randn(logits.shape, generator=rng, dtype=logits.dtype)
        logits.backward(cotangent)
        want.backward(cotangent)
        torch.testing.assert_close(x.grad, y.grad)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            got, expected = (torch.zeros_like(p) if t.grad is None else t.grad for t in (p, q))
            torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")
        model.zero_grad()


@each_network
@each_tree
def test_fused_and_naive_training_agree(tree: Hierarchy, blocks: str, rng: torch.Generator) -> None:
    naive = network(NaiveHNE, tree, rng, blocks).train()
    fused = naive.to_fused()
    before = copy.deepcopy(naive.state_dict())
    for n in (tree.num_models, 1, max(1, tree.num_models - 1)):
        x, target = images(rng, 4), torch.randint(5, (4,), generator=rng)
        for model in (naive, fused):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            hne.objective("I+HD")(model(x, n), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in naive.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")
    for name, value in before.items():
        if "copies" in name and name.endswith(("weight", "running_mean")):
            assert not torch.equal(value, naive.state_dict()[name]), name


@each_model
def test_only_computed_branches_update_their_statistics(kind: type[HNE], rng: torch.Generator) -> None:
    model = network(kind, networks.TREES["odd"], rng, "modules").train()
    layer = model.blocks[1][0]
    before = [module[2].running_mean.clone() for module in layer.copies]
    model(images(rng), 4)  # of six leaves, so two of three branches
    changed = [not torch.equal(module[2].running_mean, old) for module, old in zip(layer.copies, before, strict=True)]
    assert changed == [True, True, False]
    assert [int(module[2].num_batches_tracked) for module in layer.copies] == [1, 1, 0]


@each_network
@each_tree
@each_model
def test_prefix_and_anytime(kind: type[HNE], tree: Hierarchy, blocks: str, grad: bool, rng: torch.Generator) -> None:
    model = network(kind, tree, rng, blocks)
    x = images(rng, 5)
    untouched = x.clone()
    leaves = model.to_naive()(x)
    for n in range(1, tree.num_models + 1):
        torch.testing.assert_close(model(x, n), leaves[:n])
    prefix = torch.stack([leaves[:n].mean(0) for n in model.prefix_sizes])
    torch.testing.assert_close(model.prefix_logits(x), prefix)
    samples = torch.arange(5)
    steps = model.anytime(x)
    for n, y in steps:
        torch.testing.assert_close(y, leaves[:n, samples].mean(0))
        if len(samples) > 1:
            steps.select(torch.arange(1, len(samples)))
            samples = samples[1:]
    assert torch.equal(x, untouched)


def test_predictor(rng: torch.Generator) -> None:
    model = network(FusedHNE, networks.TREES["doubling"], rng, dtype=torch.float32)
    x = images(rng, 4, dtype=torch.float32)
    answer = AnytimePredictor(model, deadline_ms=1e6)(x)
    assert answer.num_models.tolist() == [4] * 4
    torch.testing.assert_close(answer.logits, model(x).mean(0))


def test_features_are_read_in_place(rng: torch.Generator) -> None:
    """Between kernels, a copy reads a channels-last view of its branch, not a copy."""
    template = nn.Conv2d(4, 6, 3, padding=1)
    model = FusedHNE(Hierarchy((2, 4)), [[Conv(4)], [Module(template), Conv(5, 1)]], num_classes=3).double().eval()
    seen: list[Tensor] = []
    features: list[Tensor] = []
    model.blocks[0][0].register_forward_hook(lambda layer, args, y: features.append(y))
    for module in model.blocks[1][0].copies:
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(images(rng))
    assert len(seen) == 4
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    step = features[0].stride(0) * features[0].element_size()
    assert [x.data_ptr() - features[0].data_ptr() for x in seen] == [0, 0, step, step]


@each_network
@each_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_an_empty_batch(training: bool, kind: type[HNE], blocks: str, grad: bool, rng: torch.Generator) -> None:
    model = network(kind, networks.TREES["odd"], rng, blocks).train(training)
    before = {name: b.clone() for name, b in model.named_buffers() if name.endswith(("_mean", "_var"))}
    logits = model(images(rng, 0))
    assert logits.shape == (6, 0, 5)
    if grad:
        logits.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    torch.testing.assert_close({name: b for name, b in model.named_buffers() if name in before}, before)


@each_model
@pytest.mark.parametrize(
    ("blocks", "training", "bound"),
    [("modules", False, 0.1), ("modules", True, 0.1), ("mixed", False, 0.25)],  # ten times what is usual
)
def test_autocast(blocks: str, training: bool, bound: float, kind: type[HNE], grad: bool, rng: torch.Generator) -> None:
    model = network(kind, networks.TREES["odd"], rng, blocks, torch.float32).train(training)
    x = images(rng, 4, dtype=torch.float32)
    want = copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert (logits - want).norm() < bound * want.norm()


@each_model
def test_dtypes(kind: type[HNE], rng: torch.Generator) -> None:
    model = network(kind, networks.TREES["odd"], rng, "modules", torch.float32)
    x = images(rng, dtype=torch.float32)
    want = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(model(x), want.float(), rtol=1e-4, atol=1e-4)
    narrow = model.bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow - want).norm() < 0.1 * want.norm()


# Hooks, changes and copies --------------------------------------------------------------------------------------------


@each_model
def test_hooks_of_copies_run(kind: type[HNE], grad: bool, rng: torch.Generator) -> None:
    model, x = network(kind, networks.TREES["odd"], rng), images(rng)
    before = model(x)
    layer = model.blocks[1][0]
    handles = [module.register_forward_hook(lambda module, args, y: 2 * y) for module in layer.copies]
    seen: list[nn.Module] = []
    handles.append(layer.copies[1][1].register_forward_hook(lambda module, args, y: seen.append(module)))
    changed = model(x)
    assert seen == [layer.copies[1][1]]
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(changed, model.to_naive()(x))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(x), before)
    layer.copies.register_forward_hook(lambda *arguments: None)
    with pytest.raises(SkippedModuleError, match=r"copies: a ModuleList is never called, .*on a copy"):
        model(x)


def test_hooks_of_layers_see_the_features(grad: bool, rng: torch.Generator) -> None:
    fused, x = network(FusedHNE, networks.TREES["odd"], rng), images(rng)
    naive = fused.to_naive()
    seen: dict[type, list[Tensor]] = {FusedHNE: [], NaiveHNE: []}
    for model in (fused, naive):
        outputs = seen[type(model)]
        for layer in module_layers(model):
            layer.register_forward_hook(lambda layer, args, y, outputs=outputs: outputs.append(y))
        model(x)
    assert len(seen[FusedHNE]) == len(module_layers(fused))
    for got, want in zip(seen[FusedHNE], seen[NaiveHNE], strict=True):
        torch.testing.assert_close(got.permute(1, 0, 4, 2, 3).flatten(1, 2), want)


def _step(model: HNE) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _train(model: HNE) -> None:
    model.train()
    model(images(torch.Generator().manual_seed(1), 4))
    model.eval()


CHANGES: dict[str, Any] = {
    "a weight": lambda m: m.blocks[1][0].copies[1][1].weight.mul_(2),
    "a weight's data": lambda m: m.blocks[1][0].copies[1][1].weight.data.mul_(2),
    "running statistics": lambda m: m.blocks[1][0].copies[0][2].running_mean.add_(1),
    "another copy": lambda m: m.blocks[1][0].copies.__setitem__(2, in_place_first().double().eval()),
    "an attribute": lambda m: setattr(m.blocks[1][0].copies[0][2], "eps", 1.0),
    "a kernel's weight": lambda m: m.blocks[0][0].unit.conv.weight.mul_(2),
    "another mode of one copy": lambda m: m.blocks[1][0].copies[0].train(),
    "an optimiser": _step,
    "training": _train,
    "load_state_dict": lambda m: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect(change: str, rng: torch.Generator) -> None:
    model, x = network(FusedHNE, networks.TREES["odd"], rng), images(rng)
    with torch.no_grad(), model.frozen_parameters():
        before = model(x)
        assert torch.equal(model(x), before)
        CHANGES[change](model)
        naive = model.to_naive()
        after = model(x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, naive(x))


@each_model
def test_a_pruned_copy(kind: type[HNE], rng: torch.Generator) -> None:
    model, x = network(kind, networks.TREES["odd"], rng), images(rng)
    before = model(x)
    nn.utils.prune.l1_unstructured(model.blocks[1][0].copies[0][1], "weight", 0.5)
    pruned = model(x)  # leaves a weight with a graph in the copy
    assert not torch.allclose(pruned, before)
    torch.testing.assert_close(copy.deepcopy(model)(x), pruned)


@each_model
def test_a_template_with_a_computed_weight(kind: type[HNE], rng: torch.Generator) -> None:
    """One that was called before, so that the weight has a graph. No reset reaches its originals."""
    template = nn.Sequential(
        nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    )
    template(images(rng, dtype=torch.float32))
    model = kind(Hierarchy((3,)), [[Module(template)]], num_classes=2).double().eval()
    first, *others = model.blocks[0][0].copies
    for (name, value), *rest in zip(first.named_parameters(), *(module.parameters() for module in others), strict=True):
        assert torch.equal(value, template.get_parameter(name).double())
        assert not any(torch.equal(value, other) for other in rest)
    x = images(rng)
    torch.testing.assert_close(model(x)[0], _head(model, template.double().eval()(x))[0])


def _head(model: HNE, x: Tensor) -> Tensor:
    """Logits of features ``[batch, channels, height, width]`` that all heads read."""
    weight, bias = (t.unflatten(0, (model.num_models, -1)) for t in model.head.conv.parameters())
    return torch.einsum("bc,nlc->nbl", x.mean((2, 3)), weight[..., 0, 0]) + bias[:, None]


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (5, 2)])
@each_model
def test_one_branch_and_odd_sizes(kind: type[HNE], size: tuple[int, int], grad: bool, rng: torch.Generator) -> None:
    """Without a copy, the output of a module is in another memory format than the kernels'."""
    template = nn.Sequential(nn.Conv2d(3, 5, 3, 2, padding=1), nn.BatchNorm2d(5))
    contiguous = nn.Flatten(2)  # drops the memory format
    block = [Module(nn.Sequential(template, contiguous, nn.Unflatten(2, (-1, 1)))), Conv(4), Conv(6, 1)]
    model = kind(Hierarchy((1,), num_models=3), [block], num_classes=2).double().eval()
    x = images(rng, 1, size)
    torch.testing.assert_close(model(x), model.to_naive()(x))
    torch.testing.assert_close(model.train()(images(rng, 4, size)).shape, torch.Size((3, 4, 2)))


def test_tokens_are_the_pixels_row_by_row(rng: torch.Generator) -> None:
    class Positions(nn.Module):
        """Depends on the order of tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(12, 4))

        def forward(self, x: Tensor) -> Tensor:
            assert x.dim() == 3
            return torch.relu(x.view(x.shape[0], -1, 4) + self.position)

    template = Positions()
    for kind in (FusedHNE, NaiveHNE):
        spec = Module(template, input_size=(3, 4), tokens=True)
        model = kind(Hierarchy((2,)), [[spec]], num_classes=2, in_channels=4).double()
        x = torch.randn(3, 4, 3, 4, generator=rng, dtype=torch.float64)
        tokens = template(x.flatten(2).transpose(1, 2).float()).double()
        for training in (True, False):
            got = model.train(training)(x)[0]
            torch.testing.assert_close(got, _head(model, tokens.transpose(1, 2)[..., None])[0], rtol=1e-5, atol=1e-5)
    assert model.blocks[0][0].output_size((3, 4)) == (12, 1)


def test_modules_without_parameters(rng: torch.Generator) -> None:
    block = [Module(nn.MaxPool2d(3, 2, padding=1)), Module(nn.Identity()), Conv(4)]
    model = FusedHNE(Hierarchy((1, 2)), [block, [Module(nn.GELU())]], num_classes=2).double().eval()
    x = images(rng)
    torch.testing.assert_close(model(x), model.to_naive()(x))
    assert model.macs(input_size=9) == 25 * 9 * 3 * 4 + 2 * 4 * 2


def test_template_stays_apart(rng: torch.Generator) -> None:
    template = Shuffle(6).eval()
    before = copy.deepcopy(template.state_dict())
    model = FusedHNE(Hierarchy((2,)), [[Conv(6), Module(template)]], num_classes=2)
    (layer,) = module_layers(model)
    assert isinstance(layer, ModuleLayer)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.double().eval()
    model.train()
    assert not template.training
    torch.testing.assert_close(dict(template.state_dict()), dict(before), rtol=0, atol=0)
    assert not any(name.startswith("blocks.0.1.spec") for name in model.state_dict())
