"""What only a GPU can show: streams, devices, CUDA graphs, no waiting, vast tensors, inputs that do not belong there.

(That the ops compute the right thing there is in the other files, where every backend is tested.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import networks
import pytest
import torch
from cases import Case, Inputs, cast, check, cotangents, evaluate, representative, tensors
from networks import build, images
from torch import Tensor

import hne_kernels as K
from hne import FusedHNE, GraphedHNE
from hne.losses import objective

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
needs_two = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, there are {torch.cuda.device_count()}"
)
each_op = pytest.mark.parametrize("case", representative(), ids=lambda case: case.label)
DELAY = 20_000_000  # cycles for which a stream does nothing: about ten milliseconds


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both GPU backends: where there is a GPU, one that cannot be used is an error."""
    with K.use_backend(request.param):
        yield request.param


def model_on_gpu(rng: torch.Generator, dtype: torch.dtype = torch.float32) -> FusedHNE:
    return build(FusedHNE, networks.TREES["odd"], rng, dtype).to("cuda")


def images_on_gpu(rng: torch.Generator, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return images(rng, batch, dtype=dtype).to("cuda")


def gradients(case: Case, inputs: Inputs, rng: torch.Generator) -> list[Tensor]:
    """Of the results, in the dtype and on the device of the inputs."""
    first = next(iter(tensors(inputs).values()))
    if not case.differentiable:
        return []
    return [g.to(first.device, first.dtype) for g in cotangents(case, cast(inputs, torch.float64), rng)]


# --- inputs that do not belong there -------------------------------------------------------------------------------


@needs_gpu
@each_op
def test_a_tensor_on_another_device(case: Case, backend: str, rng: torch.Generator) -> None:
    inputs = case.inputs(rng, torch.float32, "cuda")
    first, *others = tensors(inputs)
    for name in others:
        with pytest.raises(ValueError, match=rf"\b{name}: expected to be on the device of .*cuda:0, got cpu"):
            case({**inputs, name: inputs[name].cpu()})
    with pytest.raises((ValueError, RuntimeError), match=r"(on the device of|serves tensors on)"):
        case({**inputs, first: inputs[first].cpu()})
    check(case, backend, inputs, evaluate(case, inputs))  # nothing was harmed


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
    """Nobody waits for the GPU to tell: NaN, and no memory is touched that is not ours."""
    logits = torch.randn(5, 3, 4, device="cuda", requires_grad=True)
    loss = K.hierarchical_distillation_loss(logits, torch.tensor([0, wrong, 3], device="cuda"))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert grad[:, [0, 2]].isfinite().all()
    torch.cuda.synchronize()


# --- vast tensors --------------------------------------------------------------------------------------------------

_ONE = torch.bfloat16
_IMAGES = 2**15 + 2**11  # of 32 x 32 x 64 values: 2.28e9 of them, more than 32 bits can number


def _vast(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=_ONE, device="cuda").normal_()


def _weights(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").to(_ONE) / 8


def _bottleneck(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    channels, middle = x.shape[-1], 16
    return K.fused_bottleneck(
        x,
        *(K.pack_weight(_weights(1, middle, channels, 1, 1)), _weights(1, middle)),
        *(_weights(1, 3, 3, middle), _weights(1, middle)),
        *(K.pack_weight(_weights(1, channels, middle, 1, 1)), _weights(1, channels)),
        identity=True,
    )


def _convolution(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return K.branch_conv2d(x, _weights(1, 16, x.shape[-1], 3, 3), padding=1)


def _wide_convolution(x: Tensor) -> Tensor:
    """The result is vast, not the input."""
    torch.manual_seed(0)
    return K.branch_conv2d(x[..., :8], _weights(1, 64, 8, 1, 1))


def _depthwise(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return K.branch_depthwise_conv2d(x, _weights(1, x.shape[-1], 3, 3), padding=1)


def _fused(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return K.fused_conv2d(x, K.pack_weight(_weights(1, 32, x.shape[-1], 1, 1)), _weights(1, 32))


VAST = [_convolution, _wide_convolution, _depthwise, _fused, _bottleneck]


@contextlib.contextmanager
def _right_or_clear() -> Iterator[None]:
    """What an op may say to more elements than it can number."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not any(text in str(error) for text in ("2^31", "too many elements")):
            raise
        torch.cuda.synchronize()


@needs_gpu
@pytest.mark.parametrize("op", VAST, ids=lambda op: op.__name__.strip("_"))
def test_more_elements_than_32_bits_can_number(op: Callable[[Tensor], Tensor], backend: str) -> None:
    """The first and the last images have the results that they have alone."""
    _skip_unless_free(40)
    x = _vast(1, _IMAGES, 32, 32, 64)
    assert x.numel() > 2**31
    with _right_or_clear():
        y = op(x)
        for part in (slice(0, 2), slice(-2, None)):
            torch.testing.assert_close(y[:, part], op(x[:, part].contiguous()), rtol=2e-2, atol=2e-2)


@needs_gpu
def test_statistics_of_vast_tensors(backend: str) -> None:
    _skip_unless_free(50)
    x = _vast(1, _IMAGES, 32, 32, 64)
    x[:, _IMAGES // 2 :] += 2  # the second half would be missed
    with _right_or_clear():
        y, mean, var = K.branch_norm_conv2d(x, torch.ones(1, 64, 1, 1, dtype=_ONE, device="cuda"))
        torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-2)
        torch.testing.assert_close(var, torch.full_like(var, 2.0), rtol=1e-2, atol=0)
        z = K.branch_normalize(y, torch.stack([mean, var.rsqrt(), -mean]))
        for part in (slice(0, 1), slice(-1, None)):
            assert torch.equal(y[:, part], x[:, part])
            want = (x[:, part].float() - mean) * var.rsqrt() - mean
            torch.testing.assert_close(z[:, part].float(), want, rtol=2e-2, atol=2e-2)


@needs_gpu
def test_vast_ensembles(backend: str) -> None:
    _skip_unless_free(40)
    logits = _vast(2, 2**21, 513)
    assert logits.numel() > 2**31
    with _right_or_clear():
        prefix = K.prefix_mean(logits)
        want = torch.stack([logits[0, -2:], logits[:, -2:].float().mean(0).to(_ONE)])
        torch.testing.assert_close(prefix[:, -2:], want)
    del prefix
    target = torch.zeros(logits.shape[1], dtype=torch.int64, device="cuda")
    with _right_or_clear(), torch.no_grad():
        assert K.hierarchical_distillation_loss(logits, target).isfinite()


def _skip_unless_free(gigabytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, there are {free >> 30}")


@pytest.mark.parametrize("op", [*VAST, K.prefix_mean], ids=lambda op: op.__name__.strip("_"))
def test_shapes_of_vast_tensors(op: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing overflows on the way to a kernel; no memory is needed to see that."""
    monkeypatch.setattr(f"{__name__}._weights", lambda *shape: torch.empty(shape, dtype=_ONE, device="meta"))
    shape = (2, 2**22, 513) if op is K.prefix_mean else (1, 2**23, 32, 32, 64)
    y = op(torch.empty(shape, dtype=_ONE, device="meta"))
    assert y.shape[:2] == shape[:2]
    assert y.numel() == y.shape.numel() > 2**31


# --- streams and devices -------------------------------------------------------------------------------------------


@needs_gpu
@each_op
def test_the_current_stream(case: Case, backend: str, rng: torch.Generator) -> None:
    """The inputs become what they are on a side stream, late: a launch elsewhere would read NaN."""
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
    """Its folded weights, made on one stream, are read on all."""
    model, work = model_on_gpu(rng), [images_on_gpu(rng) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in work]
        model.eval()  # drops what is folded
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
        model.to("cuda:0")  # moved: captured anew
        torch.testing.assert_close(graphed(x.to("cuda:0")), model(x.to("cuda:0")))
        with pytest.raises(ValueError, match="x must be on the device of the model, cuda:0, got cuda:1"):
            graphed(x)


# --- nobody waits --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """A call that waits for the GPU raises."""
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
    """Forward and backward, captured once and replayed on other values."""
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
                model.eval()  # drops what is folded, not what was tuned
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
        except BaseException as error:  # would be lost with the thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


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
    """Left free to choose, Triton times its configurations: any may serve, and each is right."""
    inputs = case.inputs(rng, torch.float32, "cuda")
    grads = gradients(case, inputs, rng)
    torch.use_deterministic_algorithms(False)  # restored by the fixture that turned them on
    with K.use_backend("triton"):
        check(case, "triton", inputs, evaluate(case, inputs, grads), grads)
