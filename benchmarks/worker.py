"""Sides in processes of their own, which make calls on request: each is measured without the threads of the others.

A side is this package, or an engine, with one network, ensemble size and batch size::

    files = write_files(folder, model, num_models, size)     # once: the weights and graphs that the sides load
    with Worker("fused", files, batch=1) as ours, Worker("openvino", files, batch=1) as theirs:
        check_agreement(ours.result(), theirs.result())
        for worker in (ours, theirs):
            seconds = worker.calls(2.0)                       # of each call, back to back for two seconds

A worker that is not asked to call sleeps.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from meters import Side
from torch import Tensor
from typing_extensions import Self

from hne import HNE, FusedHNE
from hne.inference import ENGINES, EnsembleMean, load_engine, missing, write_onnx

FUSED = "fused"  # the name of this package's side; the others are names of hne.inference.ENGINES
_WARM_UP = 0.1  # seconds of calls before those that count


@dataclass(frozen=True)
class Files:
    """What the sides of one network and ensemble size load."""

    folder: Path
    num_models: int
    size: int  # height and width of the images

    @property
    def weights(self) -> Path:
        return self.folder / "weights.pt"

    @property
    def graphs(self) -> list[Path]:
        """The graphs that ``hne export`` writes: with grouped, and with separate convolutions of the branches."""
        return [self.folder / f"{name}-{self.num_models}.onnx" for name in ("grouped", "separate")]


def write_files(folder: Path, model: HNE, num_models: int, size: int) -> Files:
    """Write what the sides load, unless it is there; graphs only if an engine is installed."""
    files = Files(folder, num_models, size)
    folder.mkdir(parents=True, exist_ok=True)
    if not files.weights.exists():
        torch.save({"config": model.config(), "state": model.state_dict()}, files.weights)
    if all(missing(engine) for engine in ENGINES):
        return files
    ensemble = EnsembleMean(model.to_naive(), num_models).eval()
    for graph, separate in zip(files.graphs, (False, True), strict=True):
        if not graph.exists():
            with torch.no_grad():
                write_onnx(ensemble, torch.zeros(2, model.in_channels, size, size), graph, separate)
    return files


def make_side(name: str, files: Files, batch: int, *, spin: bool = True) -> Side:
    """A side by name: from images, which are the same for all sides, to mean logits."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.load(files.weights)
    images = torch.randn(batch, stored["config"]["in_channels"], files.size, files.size, generator=generator)
    if name != FUSED:
        return load_engine(name, files.graphs, images, spin=spin)
    model = FusedHNE.from_config(stored["config"]).eval()
    model.load_state_dict(stored["state"])
    ensemble, forever = EnsembleMean(model, files.num_models).eval(), contextlib.ExitStack()
    forever.enter_context(model.frozen_parameters())  # the weights in the graphs are constants, too

    @torch.inference_mode()
    def side() -> Tensor:
        return ensemble(images)

    return side


def seconds_of_calls(side: Side, seconds: float, neighbour: Side | None = None) -> list[float]:
    """The seconds of each call, back to back for ``seconds`` in all, after untimed calls. An untimed call of the
    neighbour, if there is one, precedes every call."""
    times: list[float] = []
    begin = time.perf_counter()
    start = now = begin
    while now < begin + _WARM_UP + seconds:
        if neighbour is not None:
            neighbour()
            start = time.perf_counter()
        side()
        now = time.perf_counter()
        if start >= begin + _WARM_UP:
            times.append(now - start)
        start = now
    return times


class Worker:
    """A process with one side.

    Args:
        name: ``fused``, or a name of :data:`hne.inference.ENGINES`.
        files: What it loads.
        batch: Number of images of a call.
        spin: As in :func:`hne.inference.load_engine`.
        environ: Environment variables of the process, beside those of this one.
        neighbour: An engine in the same process, which makes a call before each call; its threads go on spinning.

    Raises:
        RuntimeError: The process cannot make the side, or a call fails; the message is the reason.
    """

    def __init__(
        self,
        name: str,
        files: Files,
        batch: int,
        *,
        spin: bool = True,
        environ: Mapping[str, str] | None = None,
        neighbour: str | None = None,
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = name, files, batch, spin, neighbour, torch.get_num_threads()
        self._process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        with _environment(environ or {}):
            self._process.start()
        theirs.close()
        self._answer()  # it is ready

    @property
    def pid(self) -> int:
        """The number of the process."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def result(self) -> Tensor:
        """The logits of a call."""
        return torch.from_numpy(self._ask("result"))

    def calls(self, seconds: float) -> list[float]:
        """The seconds of each call, back to back for ``seconds`` in all, after untimed calls."""
        answer: list[float] = self._ask(seconds)
        return answer

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, request: Any) -> Any:
        self._pipe.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process has ended with code {self._process.exitcode}") from None
        if isinstance(answer, _Failure):
            raise RuntimeError(f"{self.name}: {answer.reason}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Failure:
    reason: str


def _serve(
    pipe: Connection, name: str, files: Files, batch: int, spin: bool, neighbour: str | None, threads: int
) -> None:
    """Answer requests: seconds to call for, ``result`` for logits, None to end."""
    torch.set_num_threads(threads)
    try:
        side = make_side(name, files, batch, spin=spin)
        other = None if neighbour is None else make_side(neighbour, files, batch)
        side()
        pipe.send(None)
        while (request := pipe.recv()) is not None:
            pipe.send(side().numpy().copy() if request == "result" else seconds_of_calls(side, request, other))
    except Exception as error:
        pipe.send(_Failure(f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Any:
    """Variables for a process that starts within the context."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
