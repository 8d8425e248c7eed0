"""Programs that PyTorch records of a model hold its weights, wherever they run."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import build, images
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import hne_kernels as K
from hne import FusedHNE, NaiveHNE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


@pytest.fixture
def model(rng: torch.Generator) -> FusedHNE:
    return build(FusedHNE, networks.TREES["odd"], rng)


class _Prefix(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.prefix_logits(x, (1, 3))  # type: ignore[operator]


class _First(_Prefix):
    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, 2)


def _trace(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    program: Callable[[Tensor], Tensor] = torch.jit.trace(module, x)
    return program


def _save_and_load(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, x), file)
    file.seek(0)
    program: Callable[[Tensor], Tensor] = torch.jit.load(file)
    return program


def _functional(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    program: Callable[[Tensor], Tensor] = make_fx(lambda x: module(x))(x)
    return program


def _exported(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    program: Callable[[Tensor], Tensor] = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("b")},)
    ).module()
    return program


CAPTURES = [_trace, _save_and_load, _functional, _exported]


@pytest.mark.parametrize("wrap", [lambda m: m, _Prefix, _First], ids=["forward", "prefix_logits", "first-two"])
@pytest.mark.parametrize("capture", CAPTURES, ids=lambda f: f.__name__.strip("_"))
def test_a_program_holds_the_weights(
    capture: Any, wrap: Callable[[nn.Module], nn.Module], model: FusedHNE, grad: bool, rng: torch.Generator
) -> None:
    twin = wrap(model.to_naive())
    other = build(FusedHNE, networks.TREES["odd"], rng)
    x = images(rng)
    model(x)  # weights are folded and cached
    program = capture(wrap(model), x)
    other(x), model(x, 1)  # more prepared layers
    for x in (images(rng), images(rng, 40)) if capture is not _functional else (images(rng),):
        torch.testing.assert_close(program(x), twin(x))
    del model.folded, other.folded
    torch.testing.assert_close(program(x), twin(x))


def test_strict_export(model: FusedHNE, rng: torch.Generator) -> None:
    torch._dynamo.reset()
    x = images(rng)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,), strict=True)
    del model.folded
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("capture", [_trace, _functional], ids=["trace", "make_fx"])
def test_a_program_follows_the_parameters(capture: Any, model: FusedHNE, grad: bool, rng: torch.Generator) -> None:
    x = images(rng)
    program = capture(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    torch.testing.assert_close(program(x), model.to_naive()(x))
    torch.testing.assert_close(model(x), model.to_naive()(x))


def test_traces_take_images_of_any_size(model: FusedHNE, grad: bool, rng: torch.Generator) -> None:
    program = torch.jit.trace(model, images(rng))
    x = images(rng, 2, (16, 11))
    torch.testing.assert_close(program(x), model(x))


def test_a_traced_program_in_another_process(model: FusedHNE, tmp_path: Path, rng: torch.Generator) -> None:
    """There, layers of another model have been prepared; the program is pickled, too."""
    x = images(rng)
    with torch.no_grad():
        expected = model(x)
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "program.pt")
    (tmp_path / "images.pickle").write_bytes(pickle.dumps(x))
    (tmp_path / "logits.pickle").write_bytes(pickle.dumps(expected))
    code = """
import pickle, sys, torch
from pathlib import Path
from hne import FusedHNE
folder = Path(sys.argv[1])
x = pickle.loads((folder / "images.pickle").read_bytes())
with torch.no_grad():
    for _ in range(3):
        FusedHNE.from_preset("hne_tiny", num_classes=5).double().eval()(x)
    got = torch.jit.load(folder / "program.pt")(x)
torch.testing.assert_close(got, pickle.loads((folder / "logits.pickle").read_bytes()))
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_a_traced_training_step(model: FusedHNE, rng: torch.Generator) -> None:
    """Also with another batch size, on which the unbiased variance depends."""
    model.train()
    program = torch.jit.trace(model, images(rng), check_trace=False)
    twin = copy.deepcopy(model)
    x = images(rng, 5)
    got, expected = program(x), twin(x)
    torch.testing.assert_close(got, expected)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    got.square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


class _Logger(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_logger_sees_ops_with_weights(model: FusedHNE, rng: torch.Generator) -> None:
    x = images(rng)
    with torch.no_grad():
        expected = model(x)
        session = model.folded
        with _Logger() as logger:
            torch.testing.assert_close(model(x), expected)
        assert "hne.fused_bottleneck.default" in logger.called
        assert "hne.fused_layers.default" not in logger.called
        assert model.folded is session


def test_fake_tensors_leave_no_trace(model: FusedHNE, rng: torch.Generator) -> None:
    """The cached weights are those of before."""
    x = images(rng)
    with torch.no_grad():
        expected = model(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = model(mode.from_tensor(x))
        assert (fake.shape, fake.stride(), type(fake).__name__) == (expected.shape, expected.stride(), "FakeTensor")
        torch.testing.assert_close(model(x), expected)
        with FakeTensorMode():
            empty = FusedHNE.from_preset("hne_tiny", num_classes=5).eval()
            assert empty(torch.empty(2, 3, 9, 12)).shape == (empty.num_models, 2, 5)


def test_steps_of_anytime_inside_and_outside_of_a_mode(model: FusedHNE, rng: torch.Generator) -> None:
    x = images(rng)
    with torch.no_grad():
        steps = model.anytime(x)
        for n in range(1, model.num_models + 1):
            with _Logger() if n % 2 else warnings.catch_warnings():
                count, mean = next(steps)
            torch.testing.assert_close(mean, model(x, n).mean(0))
            assert count == n


@pytest.mark.parametrize("batched", [False, True], ids=["one", "vmap"])
def test_functional_call_uses_the_given_weights(
    batched: bool, model: FusedHNE, grad: bool, rng: torch.Generator
) -> None:
    x = images(rng)
    before = model(x)
    tensors = dict(model.state_dict())
    given = {
        name: torch.stack([tensor * factor for factor in (1.0, 1.25)]) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    where = {name: 0 if tensor.is_floating_point() else None for name, tensor in tensors.items()}

    def answer(model: nn.Module) -> Tensor:
        if batched:
            return torch.func.vmap(lambda t: torch.func.functional_call(model, t, (x,)), in_dims=(where,))(given)
        one = {name: tensor[1] if tensor.is_floating_point() else tensor for name, tensor in given.items()}
        return torch.func.functional_call(model, one, (x,))

    torch.testing.assert_close(answer(model), answer(model.to_naive()))
    torch.testing.assert_close(model(x), before)


def test_a_handle_of_another_process_is_refused(rng: torch.Generator) -> None:
    """Numbers are not counted up, so that none is that of other layers."""
    weight, bias = K.pack_weight(torch.randn(1, 4, 3, 1, 1, generator=rng)), torch.zeros(1, 4)
    x = torch.randn(1, 2, 3, 3, 3, generator=rng)
    layers = [K.FusedLayers([K.FusedLayer((weight, bias))]) for _ in range(3)]
    handles = [one._prepared for one in layers]
    assert min(abs(a - b) for a in handles for b in handles if a != b) > 1 << 20  # type: ignore[operator]
    del layers
    for handle in (1, 2, 7, handles[0]):
        with pytest.raises(RuntimeError, match=r"layers: expected a number of prepare_layers, got .* another process"):
            torch.ops.hne.fused_layers(x, handle)


def test_naive_and_fused_traces_agree(model: FusedHNE, grad: bool, rng: torch.Generator) -> None:
    naive: NaiveHNE = model.to_naive()
    x = images(rng)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), torch.jit.trace(naive, x)(x))
