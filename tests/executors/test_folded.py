"""Folded weights are cached while the parameters are unchanged, and never used after a change."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from collections.abc import Callable

import networks
import pytest
import torch
from changes import CHANGES, step
from networks import build, images
from registries import restored_registries
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import hne.executors.session
from hne import Conv, FusedHNE, Hierarchy
from hne.executors import ParameterVersions
from hne.layers import ConvNorm, Executor, Features, Layer, LayerSpec
from hne_kernels.ops import fused_layers


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that have been folded, in order."""
    seen: list[nn.Module] = []
    for name in ("to_fused_layers", "fused_pool_linear"):
        function = getattr(hne.executors.session, name)

        def spy(layer: nn.Module, function: Callable[[nn.Module], object] = function) -> object:
            seen.append(layer)
            return function(layer)

        monkeypatch.setattr(hne.executors.session, name, spy)
    return seen


def count_folds(model: FusedHNE) -> int:
    """The number of modules that are folded once: the layers and the head."""
    return sum(len(block) for block in model.blocks) + 1


def with_gradients(model: FusedHNE, x: Tensor) -> Tensor:
    """The same logits, computed with gradients and therefore without folded weights."""
    with torch.enable_grad():
        return model(x).detach()


@torch.no_grad()
def test_images_on_another_device_fold_nothing(folds: list[nn.Module], rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng).to("meta")
    with pytest.raises(ValueError, match="x must be on the device of the model, meta, got cpu"):
        model(images(rng))
    assert not folds
    assert model.folded is None


@torch.no_grad()
@pytest.mark.parametrize("called_before", [False, True])
def test_bad_images_are_explained(called_before: bool, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    if called_before:
        model(x)
    wrong = {
        r"x must have 4 dimensions": x[0],
        r"x must have 3 channels \(dimension 1\), got shape": x[:, :2],
        r"x must be images of at least 1x1 pixels": x[..., :0],
        r"x must have the dtype of the model": x.double() if x.dtype == torch.float32 else x.float(),
    }
    for text, given in wrong.items():
        with pytest.raises((ValueError, TypeError), match=text) as error:
            model(given)
        assert error.value.__context__ is None or error.value.__suppress_context__  # only the explanation is shown


@torch.no_grad()
def test_weights_are_folded_once(folds: list[nn.Module], rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    first = model(x)
    assert len(folds) == count_folds(model)
    for _ in range(3):
        assert torch.equal(model(x), first)
        model(x, 4)
        list(model.anytime(x))
    with torch.inference_mode():
        assert torch.equal(model(x), first)
    assert len(folds) == count_folds(model)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changes_are_noticed(change: Callable[[FusedHNE], object], rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    before = model(x)
    change(model)
    after = model(x)
    assert after.shape != before.shape or not torch.equal(after, before)
    torch.testing.assert_close(after, with_gradients(model, x))


@torch.no_grad()
def test_frozen_parameters_are_checked_once(
    folds: list[nn.Module], monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    before = model(x)
    model.head.conv.weight.mul_(2)
    with model.frozen_parameters() as same:
        assert same is model
        frozen = model(x)
        assert not torch.equal(frozen, before), "a change before the block takes effect in it"
        with model.frozen_parameters():
            assert torch.equal(model(x), frozen)
        with monkeypatch.context() as patched:
            patched.setattr(ParameterVersions, "is_current", lambda _: pytest.fail("parameters were checked"))
            assert torch.equal(model(x), frozen)
            list(model.anytime(x))
        seen = len(folds)
        model(x)
        assert len(folds) == seen
        model.train().eval()(x)
        assert len(folds) == seen + count_folds(model), "a change of mode is always noticed"
        assert not copy.deepcopy(model).freeze_depth
        latest = model(x)
        model.head.conv.weight.mul_(2)
        assert torch.equal(model(x), latest)
    after = model(x)
    assert not torch.equal(after, latest), "a change within the block takes effect after it"
    torch.testing.assert_close(after, with_gradients(model, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_folded_in_the_block_are_dropped_after_a_change(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    model(x)
    model.head.conv.weight.mul_(2)  # folded again within the block
    with model.frozen_parameters():
        next(model.blocks[0].parameters()).mul_(2)
        model(x)
    torch.testing.assert_close(model(x), with_gradients(model, x), rtol=1e-4, atol=1e-4)


def test_frozen_parameters_may_overlap(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    one, other = model.frozen_parameters(), model.frozen_parameters()
    for block in (one, other):
        block.__enter__()
    for block in (one, other):
        assert model.freeze_depth
        block.__exit__(None, None, None)
    assert not model.freeze_depth


@torch.no_grad()
def test_nothing_of_a_change_takes_effect_in_frozen_parameters(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    before = model(x)
    with model.frozen_parameters():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.mul_(2)
        assert torch.equal(model(x), before)
    torch.testing.assert_close(model(x), with_gradients(model, x))


@torch.no_grad()
def test_layers_without_a_kernel_path(rng: torch.Generator) -> None:
    """They read their own parameters in each call, so that all changes take effect even in ``frozen_parameters()``."""
    with restored_registries():

        class Counting(LayerSpec):
            """A layer without a kernel path, which sets an attribute in each call."""

        class CountingLayer(Layer, spec=Counting):
            def __init__(self, spec: Counting, in_channels: int, branches: int, replicate: int) -> None:
                super().__init__(spec, in_channels, branches, replicate)
                self.unit = ConvNorm(branches, in_channels, spec.channels)
                self.calls = 0

            def forward(self, executor: Executor, x: Features, branches: slice, replicate: int) -> Features:
                self.calls += 1
                return executor.conv_norm(self.unit, x, branches, replicate, "relu")

            def macs(self, size: tuple[int, int]) -> int:
                return self.unit.macs(size)

            def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
                return size

        model = FusedHNE(Hierarchy((1, 2)), [[Conv(4)], [Counting(8)]], num_classes=3).double().eval()
    x = images(rng)
    before = model(x)
    session = model.folded
    model(x)
    assert model.folded is session, "an attribute that the layer sets does not count"
    with model.frozen_parameters():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = model(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, with_gradients(model, x))


def test_threads_freeze_and_release(rng: torch.Generator) -> None:
    """``+=`` of a module's attribute takes many steps: without a lock, some of the counts would be lost."""
    model = build(FusedHNE, networks.TREES["odd"], rng)

    def work() -> None:
        for _ in range(2000):
            with model.frozen_parameters():
                pass

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert model.freeze_depth == 0


@torch.no_grad()
def test_entering_frozen_parameters_costs_one_check(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    model(x)
    checks, check = [], ParameterVersions.is_current
    monkeypatch.setattr(ParameterVersions, "is_current", lambda self: checks.append(self) or check(self))
    monkeypatch.setattr(ParameterVersions, "__init__", lambda *_: pytest.fail("the modules were listed again"))
    with model.frozen_parameters():
        model(x)
    assert len(checks) == 1


@torch.no_grad()
def test_memory_of_weights_waits_for_other_streams(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    """Weights may be dropped while kernels on any stream still read them."""
    model = build(FusedHNE, networks.TREES["odd"], rng)
    model(images(rng))
    session = model.folded
    recorded: list[object] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: recorded.append(stream))
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    for stream in ("first", "second", "first"):
        session._read_on_stream(stream)
    weights = len(recorded) // 2
    assert recorded == ["first"] * weights + ["second"] * weights
    assert weights >= 2 * count_folds(model)
    capturing[0] = True
    session._read_on_stream("third")
    assert "third" not in recorded


def test_a_dropped_model_is_freed_at_once(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    with torch.no_grad():
        model(images(rng))
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_model_that_its_layer_refers_to_is_collected(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    model.blocks[0][0].__dict__["network"] = [model]
    model(images(rng))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_frozen_parameters_end_with_an_error(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    with pytest.raises(KeyError), model.frozen_parameters():
        raise KeyError
    assert not model.freeze_depth


@torch.no_grad()
def test_replaced_memory_stays_until_weights_are_folded_again(rng: torch.Generator) -> None:
    """If it were freed, new values at the same address would look like unchanged ones."""
    model = build(FusedHNE, networks.TREES["odd"], rng)
    model(images(rng))
    weight = model.blocks[1][0].expand.conv.weight
    memory = StorageWeakRef(weight.untyped_storage())
    weight.data = weight.data * 2
    assert not memory.expired()
    model(images(rng))
    assert memory.expired()


@torch.no_grad()
def test_another_dtype_folds_again(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    expected = model(x)
    y = model.float()(x.float())
    assert y.dtype == torch.float32
    assert (y - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_functional_call_uses_its_own_parameters(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    twin = copy.deepcopy(model)
    step(twin)
    x = images(rng)
    expected = model(x)
    y = torch.func.functional_call(model, dict(twin.state_dict()), (x,))
    torch.testing.assert_close(y, twin(x))
    assert torch.equal(model(x), expected)


def test_parameters_without_a_version_are_folded_in_every_call(folds: list[nn.Module], rng: torch.Generator) -> None:
    with torch.inference_mode():
        model = build(FusedHNE, networks.TREES["odd"], rng)
        x = images(rng)
        before = model(x)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        after = model(x)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, model.to_naive()(x))
    assert len(folds) == 2 * count_folds(model)


@torch.no_grad()
def test_training_moving_and_copying_drop_folded_weights(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    model(images(rng))
    assert model.folded is not None
    assert copy.deepcopy(model).folded is None
    assert model._replicate_for_data_parallel().folded is None
    model.to(torch.float64)
    assert model.folded is None
    model(images(rng))
    model.train()
    assert model.folded is None


def test_training_works_after_inference_mode(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    with torch.inference_mode():
        expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x).clone(), expected.clone())
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_micro_batches_give_the_same_results(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng, 5)
    whole, nested = model(x), model.prefix_logits(x)
    monkeypatch.setattr(fused_layers, "IMAGES", 1)
    monkeypatch.setattr(fused_layers, "PIXELS", 2 * x.shape[2] * x.shape[3])
    assert [len(batch) for batch in fused_layers.micro_batches(x, 0)] == [2, 2, 1]
    assert torch.equal(model(x), whole)
    assert torch.equal(model.prefix_logits(x), nested)
    monkeypatch.setattr(fused_layers, "PIXELS", 1)  # an image above the limit is a micro-batch,
    assert torch.equal(model(x), whole)
    monkeypatch.setattr(fused_layers, "IMAGES", 3)  # unless the least number of images is larger
    assert [len(batch) for batch in fused_layers.micro_batches(x, 0)] == [3, 2]
    assert torch.equal(model(x), whole)


@torch.no_grad()
def test_parametrized_weights_are_folded(rng: torch.Generator) -> None:
    model = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    torch.nn.utils.parametrizations.weight_norm(model.head.conv)
    before = model(x)
    model.head.conv.parametrizations.weight.original0.mul_(2)
    after = model(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, with_gradients(model, x))
