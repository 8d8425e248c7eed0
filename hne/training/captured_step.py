"""A training step in one CUDA graph: one launch runs all kernels of forward, loss, backward and optimiser.

PyTorch's rules for a capture (its notes on CUDA graphs, "whole network capture"): nothing in it waits for the GPU, it
reads and writes memory that stays where it is, and numbers become constants. Hence

- the learning rate is a tensor, and the optimiser one that reads it on the GPU (``capturable`` or ``fused``);
- inputs are copied into buffers of the graph;
- gradients are made and dropped within the graph, in its own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from hne_kernels import StateRecord

from ..distributed import World
from ..errors import TrainingError
from ..executors import FoldedWeightCache, HookVersions, note_optimizer_step
from ..inference import kernel_settings
from ..layers import only_recomputes_parameters

Loss = Callable[..., Tensor]
"""Maps the tensors of a batch to its loss, a scalar."""

_ORDINARY_STEPS = 3  # before a capture, to load libraries, tune kernels and make the state of the optimiser
_NAMES_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}  # attributes that PyTorch needs itself
_NAMES_OF_CACHES = FoldedWeightCache.uncounted_attributes | {"attribute_changes"}


def training_step(
    compute_loss: Loss, optimizer: torch.optim.Optimizer, *batch: Tensor, clip_grad_norm: float | None = None
) -> Tensor:
    """An ordinary training step: loss, backward, gradient clipping and optimiser.

    Args:
        compute_loss: The loss of a batch.
        optimizer: The optimiser. Gradients from before are dropped.
        batch: The arguments of ``compute_loss``.
        clip_grad_norm: Scale the gradients down to this norm; None for no clipping.

    Returns:
        The loss, a scalar without gradient.
    """
    optimizer.zero_grad()
    loss = compute_loss(*batch)
    loss.backward()
    if clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(_parameters(optimizer), clip_grad_norm)
    optimizer.step()
    return loss.detach()


class CapturedStep:
    """A training step on a GPU by CUDA graphs, with the result of :func:`training_step`.

    There is one graph for each shape, stride and dtype of the batch's tensors, and setting that decides which kernels
    run (backend, TF32, deterministic algorithms). The first three calls of a kind are ordinary steps, the fourth
    captures its graph. Every call is one step of the training, so nothing has to be restored after a capture. A rare
    kind, such as the incomplete last batch of an epoch, therefore begins with ordinary steps, too. The graphs share
    memory.

    The graphs are dropped, and ordinary steps follow, after a change of: a module, parameter, buffer or attribute of
    the model, replaced by another (values may change); a state or number of the optimiser. The learning rate is a
    tensor, and changes in place: ``group["lr"].fill_(0.01)``, as the schedules of ``torch.optim.lr_scheduler`` do.

    Random numbers on the GPU (dropout) come from PyTorch's generator of the device, which ``torch.cuda.graph``
    registers: each replay draws new ones. Augment batches before the call. Other Python code in ``compute_loss`` runs
    only in ordinary steps and captures; its numbers are constants of the graph, and tensors that it reads besides the
    batch and the model must stay in their memory.

    Args:
        model: The model, on a GPU. Where its parameters are recorded (:class:`hne.executors.ParameterVersions`), each
            call counts as a change of them.
        compute_loss: The loss of a batch. It calls the model, under ``torch.autocast`` if wanted, and does not wait for
            the GPU.
        optimizer: An optimiser of ``torch.optim`` with ``capturable=True`` or, where it has no such option,
            ``fused=True``, and with a tensor on the GPU as ``lr`` (float32 for fused ones).
        clip_grad_norm: Scale the gradients down to this norm; None for no clipping.

    Raises:
        TypeError: ``model`` or ``optimizer`` is of another class.
        ValueError: The parameters are not on one GPU, the optimiser's step cannot be captured, or, in a call, a tensor
            is on another device or requires a gradient.
        RuntimeError: The model is trained by several processes or on several devices; there are hooks, which a graph
            would not run; or, in a call, there are gradients already (accumulation is not supported), autocast is on,
            or ``compute_loss`` cannot be captured.
    """

    _device: torch.device
    _parameters: list[Tensor]
    _hooks: HookVersions
    _state: _State | None  # what the graphs were captured with; None without a graph
    _pool: Any  # memory that the graphs share, since only one is replayed at a time
    _stream: torch.cuda.Stream

    def __init__(
        self,
        model: nn.Module,
        compute_loss: Loss,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad_norm: float | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._model, self._compute_loss, self._optimizer = model, compute_loss, optimizer
        self._clip_grad_norm = clip_grad_norm
        self._graphs: dict[Hashable, _Graph] = {}
        self._ordinary_steps: dict[Hashable, int] = {}
        self._start_over()

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a training step.

        Args:
            batch: The arguments of ``compute_loss``, on the GPU of the model.

        Returns:
            The loss before the step, a scalar in new memory, without gradient. The call does not wait for it.
        """
        device = self._device
        if torch.is_autocast_enabled(device.type):
            raise RuntimeError("CapturedStep under autocast: enter torch.autocast in compute_loss, not around the call")
        for x in batch:
            if x.device != device or x.requires_grad:
                raise ValueError(f"expected tensors on {device} that require no gradient, got {x.device}")
        if self._state is not None and not (self._state.is_current() and self._hooks.is_current()):
            self._check_no_gradients()
            self._start_over()
        key = kernel_settings(self._parameters[0]), *((x.shape, x.stride(), x.dtype) for x in batch)
        graph = self._graphs.get(key)
        if graph is None:
            self._check_no_gradients()
            steps = self._ordinary_steps.get(key, 0)
            if steps < _ORDINARY_STEPS:
                self._ordinary_steps[key] = steps + 1
                return self._take_ordinary_step(batch)
            graph = self._graphs[key] = _Graph(self._take_step, batch, self._pool, self._stream)
            if self._state is None:
                self._state = _State(self._model, self._optimizer, self._parameters)
        loss = graph(batch)
        note_optimizer_step(self._optimizer)
        return loss

    def _start_over(self) -> None:
        """Check what can be captured, and drop all graphs."""
        self._device = _check_optimizer(self._optimizer)
        self._parameters = [*dict.fromkeys([*self._model.parameters(), *_parameters(self._optimizer)])]
        _check_one_process(self._model)
        self._hooks = _check_hooks(self._model, self._optimizer, self._parameters)
        torch.cuda.synchronize(self._device)  # graphs that are being replayed still use their memory
        self._graphs.clear()
        self._ordinary_steps.clear()
        self._state = None
        self._pool = torch.cuda.graph_pool_handle()
        # A backward pass runs on the stream of its forward pass, so one stream does everything, capture included.
        self._stream = torch.cuda.Stream(self._device)

    def _take_ordinary_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                loss = self._take_step(*batch)
            current.wait_stream(self._stream)
        return loss

    def _take_step(self, *batch: Tensor) -> Tensor:
        try:
            return training_step(self._compute_loss, self._optimizer, *batch, clip_grad_norm=self._clip_grad_norm)
        finally:
            for parameter in self._parameters:
                parameter.grad = None

    def _check_no_gradients(self) -> None:
        if any(parameter.grad is not None for parameter in self._parameters):
            raise RuntimeError("CapturedStep does not accumulate gradients, but some are there: call zero_grad() first")


class _Graph:
    """A CUDA graph of a step, for the shapes, strides and dtypes of a batch."""

    def __init__(self, step: Loss, batch: tuple[Tensor, ...], pool: Any, stream: torch.cuda.Stream) -> None:
        with torch.cuda.device(batch[0].device):
            self._batch = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in batch]
            self._copy(batch)
            self._graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may allocate memory during the capture.
                with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                    self._loss = step(*self._batch)
            except RuntimeError as error:
                raise RuntimeError(
                    "the training step cannot be captured in a CUDA graph; nothing in it may wait for the GPU, as "
                    f".item() does: {error}"
                ) from error

    def __call__(self, batch: tuple[Tensor, ...]) -> Tensor:
        self._copy(batch)
        self._graph.replay()
        return self._loss.clone()

    def _copy(self, batch: tuple[Tensor, ...]) -> None:
        for static, x in zip(self._batch, batch, strict=True):
            static.copy_(x)


class _State:
    """What graphs hold on to: memory of parameters, buffers and optimiser, and numbers that became constants."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        containers: list[Any] = [optimizer.param_groups, optimizer.state, *optimizer.state.values()]
        for group in optimizer.param_groups:
            containers += group, group["params"]
        for module in model.modules():
            containers += module._parameters, module._buffers, module._modules
        ignored = [frozenset[str]()] * len(containers)
        for module in model.modules():
            attributes = vars(module)
            # Pruning and weight norm compute attributes anew in each step, from parameters.
            computed = {name for name, value in attributes.items() if isinstance(value, Tensor)}
            containers.append(attributes)
            ignored.append(_NAMES_OF_MODULES | _NAMES_OF_CACHES | computed)
        self._unchanged = StateRecord(containers, ignored, [], []).unchanged
        self._optimizer, self._parameters = optimizer, parameters
        self._state, self._groups = optimizer.state, optimizer.param_groups  # load_state_dict() replaces them
        self._memory = self._read()

    def is_current(self) -> bool:
        """Whether the graphs are still right, and no parameter has a gradient."""
        optimizer = self._optimizer
        same_containers = optimizer.state is self._state and optimizer.param_groups is self._groups
        return same_containers and self._unchanged() and self._memory == self._read()

    def _read(self) -> list[tuple[int, bool, bool]]:
        return [(p.data_ptr(), p.requires_grad, p.grad is None) for p in self._parameters]


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_optimizer(optimizer: torch.optim.Optimizer) -> torch.device:
    """Check that the step of an optimiser can be captured; return the device of its parameters."""
    devices = {parameter.device for parameter in _parameters(optimizer)}
    device = next(iter(devices))
    if len(devices) > 1 or not _is_gpu(device):
        got = " and ".join(sorted(map(str, devices)))
        raise ValueError(f"all parameters must be on one GPU for a captured step, got {got}")
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not group.get("capturable", group.get("fused")):
            option = "capturable" if "capturable" in group else "fused"
            raise ValueError(f"the step of optimizer cannot be captured: make it by {name}(..., {option}=True)")
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != device:
            got = f"one on {lr.device}" if isinstance(lr, Tensor) else repr(lr)
            raise ValueError(f"the lr of optimizer must be a tensor on {device}, which a graph reads anew, got {got}")
    return device


def check_can_capture(world: World) -> None:
    """Check that a run in ``world`` can take captured steps.

    Raises:
        TrainingError: It has no GPU, or several processes.
    """
    if not _is_gpu(world.device):
        raise TrainingError(f"cuda_graph: needs a GPU, got {world.device}")
    if world.size > 1:
        raise TrainingError(f"cuda_graph: captures the step of a single process, got {world.size} processes")


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _check_one_process(model: nn.Module) -> None:
    """Check that the step exchanges nothing with other processes or devices."""
    if distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise RuntimeError("a captured step is one of a single process: give the model without its wrapper")
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            raise RuntimeError("a captured step is one of a single process: fully_shard is not supported")
        if distributed.is_initialized() and (processes := distributed.get_world_size()) > 1:
            raise RuntimeError(f"a captured step is one of a single process, got {processes} processes")
    if isinstance(model, nn.DataParallel):
        raise RuntimeError("a captured step is one of a single GPU: give the model without nn.DataParallel")


def _check_hooks(model: nn.Module, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> HookVersions:
    """Check that there are no hooks; return the versions of those on the modules."""
    hooks = HookVersions(module for module in model.modules() if not only_recomputes_parameters(module))
    on_optimizer = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    on_parameters = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    if hooks.has_hooks or on_optimizer or on_parameters:
        raise RuntimeError(
            "CapturedStep replays kernels and would not run hooks: remove those of the model, its layers, its "
            "parameters, the optimiser and of all modules, or take ordinary steps"
        )
    return hooks
