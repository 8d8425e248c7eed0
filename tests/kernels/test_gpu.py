"""Tests that need a GPU: streams, devices, CUDA graphs, no synchronisation, inputs of a wrong device or dtype.

The other files test the results of the ops on every backend.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import threading
from collections.abc import Iterator

import networks
import pytest
import torch
from cases import Case, Inputs, cast, check, cotangents, evaluate, representative, tensors
from networks import build, images
from torch import Tensor

import hne_kernels as K
from hne import FusedHNE, GraphedHNE
from hne.losses import objective
from hne.training import CapturedStep, training_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, there are {torch.cuda.device_count()}"
)
each_op = pytest.mark.parametrize("case", representative(), ids=lambda case: case.label)
DELAY = 20_000_000  # cycles that a stream sleeps, about ten milliseconds


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both GPU backends. On a machine with a GPU, both must be usable."""
    with K.use_backend(request.param):
        yield request.param


def model_on_gpu(rng: torch.Generator, dtype: torch.dtype = torch.float32) -> FusedHNE:
    return build(FusedHNE, networks.TREES["odd"], rng, dtype).to("cuda")


def images_on_gpu(rng: torch.Generator, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return images(rng, batch, dtype=dtype).to("cuda")


def gradients(case: Case, inputs: Inputs, rng: torch.Generator) -> list[Tensor]:
    """Gradients of the results, in the dtype and on the device of the inputs."""
    first = next(iter(tensors(inputs).values()))
    if not case.differentiable:
        return []
    return [g.to(first.device, first.dtype) for g in cotangents(case, cast(inputs, torch.float64), rng)]


# --- wrong inputs --------------------------------------------------------------------------------------------------


@needs_gpu
@each_op
def test_a_tensor_on_another_device(case: Case, backend: str, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float32, "cuda")
    first, *others = tensors(inputs)
    for name in others:
        shown = re.sub(r"^(\w+)_(\d+)$", r"layer \2: \1", name)  # of a chain
        with pytest.raises(ValueError, match=rf"\b{shown}: expected to be on the device of .*cuda:0, got cpu"):
            case({**inputs, name: inputs[name].cpu()})
    with pytest.raises((ValueError, RuntimeError), match=r"(on the device of|serves tensors on)"):
        case({**inputs, first: inputs[first].cpu()})
    check(case, backend, inputs, evaluate(case, inputs))  # still right


@needs_gpu
@each_op
def test_a_dtype_that_no_kernel_knows(case: Case, backend: str, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float64, "cuda")
    with pytest.raises(RuntimeError, match=rf"backend '{backend}' cannot serve this call: .*got torch.float64"):
        case(inputs)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_op
def test_addresses_that_vectors_cannot_be_read_from(
    case: Case, dtype: torch.dtype, backend: str, rng: torch.Generator
) -> None:
    inputs = case.inputs(rng, dtype, "cuda")
    grads = gradients(case, inputs, rng)

    def behind(tensor: Tensor, values: int) -> Tensor:
        longer = tensor.new_empty(tensor.numel() + values)
        longer[values:] = tensor.flatten()
        return longer[values:].view(tensor.shape)

    for values in (1, 3):
        moved = {n: behind(t, values) if isinstance(t, Tensor) and t.dim() else t for n, t in inputs.items()}
        outcome = evaluate(case, moved, [behind(g, values) if g.dim() else g for g in grads])
        check(case, backend, moved, outcome, grads)


@needs_gpu
@pytest.mark.parametrize("wrong", [-1, 4, -100, 2**40])
def test_a_class_that_there_is_not(wrong: int, backend: str) -> None:
    """The loss is NaN, as an error would have to wait for the GPU, and no other memory is accessed."""
    logits = torch.randn(5, 3, 4, device="cuda", requires_grad=True)
    loss = K.hierarchical_distillation_loss(logits, torch.tensor([0, wrong, 3], device="cuda"))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert grad[:, [0, 2]].isfinite().all()
    torch.cuda.synchronize()


# --- streams and devices -------------------------------------------------------------------------------------------


@needs_gpu
@each_op
def test_the_current_stream(case: Case, backend: str, rng: torch.Generator) -> None:
    """A side stream writes the inputs late, so that a launch on another stream would read NaN."""
    inputs = case.inputs(rng, torch.float32, "cuda")
    grads = gradients(case, inputs, rng)
    want = evaluate(case, inputs, grads)
    late = {n: torch.full_like(t, float("nan")) for n, t in tensors(inputs).items() if t.is_floating_point()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
        for name, tensor in late.items():
            tensor.copy_(inputs[name], non_blocking=True)
        outcome = evaluate(case, {**inputs, **late}, grads)
    stream.synchronize()
    for (name, got), (_, right) in zip(outcome.items(), want.items(), strict=True):
        torch.testing.assert_close(got, right, msg=lambda m, n=name: f"{n}: {m}")


@needs_gpu
def test_a_model_on_several_streams(backend: str, rng: torch.Generator) -> None:
    """Weights that were folded on one stream are read on others."""
    model, work = model_on_gpu(rng), [images_on_gpu(rng) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in work]
        model.eval()  # drops the folded weights
        streams = [torch.cuda.Stream() for _ in work]
        torch.cuda.synchronize()
        torch.cuda._sleep(DELAY)
        answers = []
        for stream, x in zip(streams, work, strict=True):
            with torch.cuda.stream(stream):
                answers.append(model(x))
        torch.cuda.synchronize()
    for answer, right in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer, right)


@needs_two
@each_op
def test_a_device_that_is_not_the_current_one(case: Case, backend: str, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float32, "cuda:1")
    grads = gradients(case, inputs, rng)
    with torch.cuda.device(0):
        outcome = evaluate(case, inputs, grads)
        assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda:1") for _, tensor in outcome.items())
    check(case, backend, inputs, outcome, grads)
    for name in list(tensors(inputs))[1:]:
        with pytest.raises(ValueError, match=rf"\b{name}: expected to be on the device of .*cuda:1, got cuda:0"):
            case({**inputs, name: inputs[name].to("cuda:0")})


@needs_two
def test_graphs_on_a_device_that_is_not_the_current_one(rng: torch.Generator) -> None:
    model, x = model_on_gpu(rng).to("cuda:1"), images_on_gpu(rng).to("cuda:1")
    graphed = GraphedHNE(model)
    with torch.cuda.device(0), torch.no_grad():
        torch.testing.assert_close(graphed(x), model(x))
        model.to("cuda:0")  # so that it must be captured again
        torch.testing.assert_close(graphed(x.to("cuda:0")), model(x.to("cuda:0")))
        with pytest.raises(ValueError, match="x must be on the device of the model, cuda:0, got cuda:1"):
            graphed(x)


# --- no synchronisation --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Calls that wait for the GPU raise an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_neither_inference_nor_training_waits_for_the_gpu(backend: str, rng: torch.Generator) -> None:
    model, x = model_on_gpu(rng), images_on_gpu(rng)
    target, loss = torch.zeros(len(x), dtype=torch.int64, device="cuda"), objective("I+HD")

    def step() -> None:
        loss(model(x), target).backward()

    with torch.no_grad():
        model(x)
        with no_waiting():
            for n in range(1, model.num_models + 1):
                model(x, n)
    model.train()
    step()
    with no_waiting():
        step()


# --- CUDA graphs ---------------------------------------------------------------------------------------------------


@needs_gpu
@each_op
def test_ops_in_a_graph(case: Case, backend: str, rng: torch.Generator) -> None:
    """Forward and backward, captured once and replayed with other values."""
    inputs = case.inputs(rng, torch.float32, "cuda")
    grads = gradients(case, inputs, rng)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        evaluate(case, inputs, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outcome = evaluate(case, inputs, grads)
    for name, tensor in tensors(case.inputs(rng, torch.float32, "cuda")).items():
        inputs[name].copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    check(case, backend, inputs, outcome, grads)


@needs_gpu
@pytest.mark.parametrize("called_before", [True, False], ids=["warm", "cold"])
def test_a_model_in_a_graph(called_before: bool, backend: str, rng: torch.Generator) -> None:
    model, static, x = model_on_gpu(rng), images_on_gpu(rng), images_on_gpu(rng)
    with torch.no_grad():
        expected = [model(x, n) for n in range(1, model.num_models + 1)]
        for n, right in enumerate(expected, 1):
            if not called_before:
                model.eval()  # drops the folded weights, but no tuning
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(static, n)
            model.eval()
            model(x, n)
            static.copy_(x)
            graph.replay()
            torch.testing.assert_close(y, right)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphed_model(dtype: torch.dtype, backend: str, rng: torch.Generator) -> None:
    model = model_on_gpu(rng, dtype)
    graphed = GraphedHNE(model)
    with torch.no_grad():
        for factor in (1.0, 1.1):
            model.blocks[0][0].unit.conv.weight.mul_(factor)
            model.head.conv.bias.add_(factor - 1)
            for batch in (3, 1):
                x = images_on_gpu(rng, batch, dtype)
                for n in range(1, model.num_models + 1):
                    torch.testing.assert_close(graphed(x, n), model(x, n))
                torch.testing.assert_close(graphed.prefix_logits(x), model.prefix_logits(x))


@needs_gpu
def test_a_replay_allocates_its_result_and_nothing_else(backend: str, rng: torch.Generator) -> None:
    graphed, x = GraphedHNE(model_on_gpu(rng)), images_on_gpu(rng)
    graphed(x)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        graphed(x)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 10


@needs_gpu
def test_a_graphed_model_in_threads_on_streams(backend: str, rng: torch.Generator) -> None:
    model, work = model_on_gpu(rng), [images_on_gpu(rng) for _ in range(6)]
    graphed = GraphedHNE(model)
    sizes = [1 + index % model.num_models for index in range(len(work))]
    with torch.no_grad():
        expected = [model(x, n) for x, n in zip(work, sizes, strict=True)]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                answers = [graphed(work[index], sizes[index]) for _ in range(20)]
                torch.cuda.current_stream().synchronize()
            for answer in answers:
                torch.testing.assert_close(answer, expected[index])
        except BaseException as error:  # a thread would swallow it
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@needs_gpu
@pytest.mark.parametrize("amp", [False, True])
def test_captured_training_steps(amp: bool, backend: str, rng: torch.Generator) -> None:
    """Graphs of two shapes give the losses and networks of ordinary steps, and their replay waits for nothing."""
    losses, states = [], []
    work = [
        (images_on_gpu(rng, size), torch.randint(networks.NUM_CLASSES, (size,), generator=rng).cuda())
        for _ in range(6)
        for size in (4, 3)
    ]
    network = model_on_gpu(rng).train()
    for captured in (False, True):
        model = copy.deepcopy(network)
        optimizer = torch.optim.SGD(
            model.parameters(), torch.tensor(0.05, device="cuda"), momentum=0.9, weight_decay=1e-3, fused=True
        )
        compute_loss = functools.partial(_loss, model, amp)
        step = functools.partial(training_step, compute_loss, optimizer, clip_grad_norm=5.0)
        if captured:
            step = CapturedStep(model, compute_loss, optimizer, clip_grad_norm=5.0)  # type: ignore[assignment]
        found = []
        for index, (x, target) in enumerate(work):
            optimizer.param_groups[0]["lr"].fill_(0.05 / (1 + index))
            waiting = no_waiting() if captured and index >= 8 else contextlib.nullcontext()
            with waiting:
                found.append(step(x, target))
        losses.append(torch.stack(found))
        states.append(model.state_dict())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(states[1], states[0], rtol=1e-2, atol=1e-3)


def _loss(model: FusedHNE, amp: bool, x: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        logits = model(x)
    return objective("I+HD")(logits, target)


@needs_gpu
def test_compiled_with_graphs(backend: str, rng: torch.Generator) -> None:
    model, x = model_on_gpu(rng), images_on_gpu(rng)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        for n in (1, 4, model.num_models):
            for _ in range(3):
                torch.testing.assert_close(compiled(x, num_models=n), model(x, n), rtol=1e-3, atol=1e-4)


@needs_gpu
@each_op
def test_tuned_kernels(case: Case, rng: torch.Generator) -> None:
    """Results are right with the configuration that Triton's tuning chooses."""
    inputs = case.inputs(rng, torch.float32, "cuda")
    grads = gradients(case, inputs, rng)
    torch.use_deterministic_algorithms(False)  # the fixture that switched them on restores them
    with K.use_backend("triton"):
        check(case, "triton", inputs, evaluate(case, inputs, grads), grads)
