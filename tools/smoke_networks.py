"""Rows of the smoke table for whole networks: inference and a training step, of this package and of plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import channels_last
import torch
from rows import Cells, Row
from smoke_ops import Bench, judged, relative_error
from torch import Tensor

import hne_kernels as K
from hne import HNE, FusedHNE, GraphedHNE, objective
from hne.training import CapturedStep

# Largest relative error of logits and loss, and of the gradients in float32.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
GRADIENT_LIMIT = 5e-2  # rounding turns some ReLUs on or off
ROW_SECONDS, COMPILED_SECONDS = 90.0, 150.0
_COMPARED = 16  # images; batch norm over fewer would amplify rounding


class Network:
    """The network of the smoke table; in a rehearsal a tiny one."""

    def __init__(self, bench: Bench) -> None:
        tiny = {"name": "hne_tiny", "num_classes": 10, "width": 0.25, "num_models": 2}
        preset: dict[str, Any] = {"name": "hne_resnet50_cifar", "num_classes": 100}
        self.size = 8 if bench.is_rehearsal else 32
        torch.manual_seed(0)
        self.model = FusedHNE.from_preset(**(tiny if bench.is_rehearsal else preset))
        with torch.no_grad():
            for _ in range(3):  # running statistics, without which an untrained network overflows
                self.model.train()(torch.randn(_COMPARED, 3, self.size, self.size))
        self.model.eval()

    def images(self, batch: int) -> Tensor:
        return torch.randn(batch, 3, self.size, self.size)

    def on(self, device: str, dtype: torch.dtype = torch.float32) -> FusedHNE:
        """A copy of the network."""
        copy = FusedHNE.from_config(self.model.config())
        copy.load_state_dict(self.model.state_dict())
        return copy.to(device, dtype).eval()


@functools.cache
def network(bench: Bench) -> Network:
    """The network, made once in a process."""
    return Network(bench)


def network_rows(bench: Bench, backend: str) -> Iterator[Row]:
    """Rows of this package on a backend."""

    def row(name: str, compute: Callable[[], Cells]) -> Row:
        return Row(f"{backend} {name}", f"{backend} {name.partition(',')[0]}", compute, ROW_SECONDS)

    for dtype in (torch.bfloat16, torch.float32):
        yield row(f"network, {_short(dtype)}", partial(_inference_error, bench, backend, dtype))
    for batch in _batches(bench):
        if bench.device == "cuda":
            yield row(f"graphed inference, bfloat16, batch {batch}", partial(_inference, bench, backend, batch, True))
        yield row(f"inference, bfloat16, batch {batch}", partial(_inference, bench, backend, batch, False))
    for dtype in (torch.float32, torch.bfloat16):
        yield row(f"gradients, {_short(dtype)}", partial(_training_error, bench, backend, dtype))
    yield row(f"training step, autocast bfloat16, batch {bench.batch}", partial(_training, bench, backend))
    if bench.device == "cuda":
        name = f"captured training step, autocast bfloat16, batch {bench.batch}"
        yield row(name, partial(_captured_training, bench, backend))


def plain_rows(bench: Bench, *, compiled: bool) -> Iterator[Row]:
    """Rows of the same network in plain PyTorch and channels-last memory."""
    side = f"channels-last{', compiled' if compiled else ''}"
    seconds = COMPILED_SECONDS if compiled else ROW_SECONDS
    for batch in _batches(bench):
        name = f"{side} inference, bfloat16, batch {batch}"
        yield Row(name, name, partial(_plain_inference, bench, batch, compiled), seconds)
    name = f"{side} training step, autocast bfloat16, batch {bench.batch}"
    yield Row(name, name, partial(_plain_training, bench, compiled), seconds)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _batches(bench: Bench) -> tuple[int, ...]:
    return tuple(dict.fromkeys((bench.batch, 1)))


# --- inference -------------------------------------------------------------------------------------------------------


def _inference_error(bench: Bench, backend: str, dtype: torch.dtype) -> Cells:
    net = network(bench)
    x = net.images(_COMPARED).to(dtype)
    model = net.on(bench.device, dtype)
    with torch.no_grad(), K.use_backend("reference"):
        exact = net.on("cpu").to_naive().double()(x.double())
    with torch.no_grad(), K.use_backend(backend):
        actual = model(x.to(bench.device))
    return judged({"logits": relative_error(actual, exact)}, LIMITS[dtype])


def _inference(bench: Bench, backend: str, batch: int, graphed: bool) -> Cells:
    net = network(bench)
    model = net.on(bench.device, torch.bfloat16)
    x = net.images(batch).to(bench.device, torch.bfloat16)
    call = GraphedHNE(model) if graphed else model
    with torch.no_grad(), K.use_backend(backend):
        return {"ms": f"{_warm_ms(bench, lambda: call(x)):.3f}"}


def _plain_inference(bench: Bench, batch: int, compiled: bool) -> Cells:
    net = network(bench)
    model = channels_last.convert(net.on(bench.device, torch.bfloat16))
    x = net.images(batch).to(bench.device, torch.bfloat16, memory_format=torch.channels_last)
    call = _compile(bench, model, "reduce-overhead") if compiled else model
    with torch.no_grad(), K.use_backend("reference"):
        return {"ms": f"{_warm_ms(bench, lambda: call(x)):.3f}"}


# --- training --------------------------------------------------------------------------------------------------------


def _loss(call: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    lowered = dtype == torch.bfloat16
    with torch.autocast(x.device.type, dtype) if lowered else contextlib.nullcontext():
        logits = call(x)
    return objective("I+HD", alpha=0.5, temperature=2.0)(logits, target)


def _training_error(bench: Bench, backend: str, dtype: torch.dtype) -> Cells:
    """Loss and gradients against the naive network in float64."""
    net = network(bench)
    x, target = net.images(_COMPARED), torch.randint(net.model.num_classes, (_COMPARED,))
    model, exact = net.on(bench.device).train(), net.on("cpu").to_naive().double().train()
    with K.use_backend("reference"):
        want = _loss(exact, x.double(), target, torch.float64)
        want.backward()
    x, target, limit = x.to(bench.device), target.to(bench.device), GRADIENT_LIMIT
    if dtype != torch.float32:  # rounding moves gradients so far that only plain PyTorch tells how much is right
        plain = net.on(bench.device).to_naive().train()
        with K.use_backend("reference"):
            _loss(plain, x, target, dtype).backward()
        limit = 2 * relative_error(_flat(plain), _flat(exact))
    with K.use_backend(backend):
        got = _loss(model, x, target, dtype)
        got.backward()
    gradients = judged({"gradient of all parameters": relative_error(_flat(model), _flat(exact))}, limit)
    return gradients | judged({"loss": relative_error(got, want)}, LIMITS[dtype])


def _flat(model: HNE) -> Tensor:
    return torch.cat([p.grad.double().cpu().flatten() for p in model.parameters() if p.grad is not None])


def _training(bench: Bench, backend: str) -> Cells:
    with K.use_backend(backend):
        return _step_ms(bench, network(bench).on(bench.device).train())


def _captured_training(bench: Bench, backend: str) -> Cells:
    """As :func:`_training`, in one CUDA graph."""
    net = network(bench)
    model = net.on(bench.device).train()
    x, target = _training_batch(bench)
    rate = torch.tensor(1e-3, device=bench.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, fused=True)
    step = CapturedStep(model, lambda images, labels: _loss(model, images, labels, torch.bfloat16), optimizer)
    with K.use_backend(backend):
        step(x, target)  # with the three of _warm_ms, the last of which captures the graph
        return {"ms": f"{_warm_ms(bench, lambda: step(x, target)):.2f}"}


def _plain_training(bench: Bench, compiled: bool) -> Cells:
    model = channels_last.convert(network(bench).on(bench.device)).train()
    with K.use_backend("reference"):
        return _step_ms(bench, model, _compile(bench, model, "default") if compiled else None)


def _training_batch(bench: Bench) -> tuple[Tensor, Tensor]:
    net = network(bench)
    x = net.images(bench.batch).to(bench.device).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(net.model.num_classes, (bench.batch,)).to(bench.device)


def _step_ms(bench: Bench, model: HNE, call: Any = None) -> Cells:
    """Time of forward, backward and SGD, launched from Python."""
    x, target = _training_batch(bench)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        _loss(model if call is None else call, x, target, torch.bfloat16).backward()
        optimizer.step()

    return {"ms": f"{_warm_ms(bench, step):.2f}"}


def _compile(bench: Bench, model: HNE, mode: str) -> Any:
    if bench.is_rehearsal:
        return torch.compile(model, dynamic=False, backend="eager")
    return torch.compile(model, dynamic=False, mode=mode)


def _warm_ms(bench: Bench, side: Callable[[], Any]) -> float:
    with bench.meter.running():
        for _ in range(3):  # kernels are tuned, compiled and captured
            side()
    return bench.milliseconds(side, graphed=False)
