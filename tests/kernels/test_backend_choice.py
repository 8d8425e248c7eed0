"""The choice of a backend holds for a thread or task, in blocks that may overlap and end in any order."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import pytest
import torch

import hne_kernels as K

X = torch.ones(1, 1, 1)


@pytest.fixture(autouse=True)
def before() -> str:
    """The choice before the test, which holds again after it."""
    return K.backend_for(X)


def _in_thread(*functions: object) -> None:
    threads = [threading.Thread(target=function) for function in functions]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_overlapping_threads(before: str) -> None:
    """The first block is entered first and left first."""
    seen: dict[str, list[str]] = {"first": [], "second": []}
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with K.use_backend("reference"):
            entered.wait(10)
            seen["first"].append(K.backend_for(X))
        seen["first"].append(K.backend_for(X))
        left.set()

    def second() -> None:
        with K.use_backend("cpp"):
            entered.set()
            left.wait(10)
            seen["second"].append(K.backend_for(X))
        seen["second"].append(K.backend_for(X))

    _in_thread(first, second)
    assert seen == {"first": ["reference", before], "second": ["cpp", before]}
    assert K.backend_for(X) == before


def test_a_thread_starts_with_the_default(before: str) -> None:
    seen = []
    with K.use_backend("reference"):
        _in_thread(lambda: seen.append(K.backend_for(X)))
    assert seen == [before]


def test_tasks(before: str) -> None:
    async def task(name: str) -> list[str]:
        with K.use_backend(name):
            await asyncio.sleep(0.01)
            inner = await asyncio.create_task(child())
            seen = [K.backend_for(X), inner]
        await asyncio.sleep(0)
        return [*seen, K.backend_for(X)]

    async def child() -> str:
        return K.backend_for(X)

    async def main() -> list[list[str]]:
        return await asyncio.gather(task("reference"), task("cpp"), task("reference"))

    assert asyncio.run(main()) == [[name, name, before] for name in ("reference", "cpp", "reference")]
    assert K.backend_for(X) == before


def test_blocks_that_end_in_the_order_of_their_beginning(before: str) -> None:
    first, second = K.use_backend("reference"), K.use_backend("cpp")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert K.backend_for(X) == "cpp"
    second.__exit__(None, None, None)
    assert K.backend_for(X) == before


def test_a_block_that_ends_in_another_context(before: str) -> None:
    """As that of a generator that another task closes."""
    block = K.use_backend("reference")
    block.__enter__()
    contextvars.Context().run(block.__exit__, None, None, None)
    assert K.backend_for(X) == before
    block = K.use_backend("reference")
    contextvars.Context().run(block.__enter__)
    assert K.backend_for(X) == before
    block.__exit__(None, None, None)
    assert K.backend_for(X) == before


def test_a_gradient_runs_on_the_backend_of_its_op(rng: torch.Generator) -> None:
    """Wherever backward() is called."""
    x = torch.randn(1, 2, 3, 3, 2, generator=rng, requires_grad=True)
    weight = torch.randn(1, 4, 2, 1, 1, generator=rng)
    with K.use_backend("cpp"):
        ours = K.branch_conv2d(x, weight)
    with K.use_backend("reference"):
        plain = K.branch_conv2d(x, weight)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            ours.sum().backward()
    assert any(event.key == "hne::branch_conv2d_backward_input" for event in profile.key_averages())
    with K.use_backend("cpp"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain.sum().backward()
    assert not any(event.key.startswith("hne::") for event in profile.key_averages())


def test_compiled_programs_follow_the_choice(rng: torch.Generator) -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(1, 2, 3, 3, 2, generator=rng), torch.randn(1, 4, 2, 1, 1, generator=rng)
    targets: list[set[str]] = []

    def note(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.append({str(node.target) for node in graph.graph.nodes})
        return graph

    compiled = torch.compile(lambda x: K.branch_conv2d(x, weight), fullgraph=True, backend=note)
    for name in ("cpp", "reference", "cpp"):
        with K.use_backend(name):
            compiled(x)
    assert ["hne.branch_conv2d" in names for names in targets] == [True, False]

    def inside(x: torch.Tensor) -> torch.Tensor:
        with K.use_backend("reference"):
            return K.branch_conv2d(x, weight)

    torch.compile(inside, fullgraph=True, backend=note)(x)
    assert "hne.branch_conv2d" not in targets[-1]
    assert len(targets) == 3
