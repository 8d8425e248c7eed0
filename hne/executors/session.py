"""Inference with folded weights: a whole subtree in one call where the kernels support it, else a call per layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import hne_kernels as K

from ..layers import Layer, SkippedModuleError, global_hook_dicts, has_hooks
from .base import Member, Network, check_containers
from .folded_step import FoldedStep
from .folding import FoldedLayer, fused_pool_linear, to_fused_layers
from .hook_versions import HookVersions
from .kernels import KernelExecutor
from .parameter_versions import ParameterVersions


class InferenceSession:
    """The folded weights of a network, and a program (a list of steps) for each subtree that was computed.

    Args:
        network: A network in eval mode.
        versions: The versions of its parameters at the time of construction; None for a session that is used once.
    """

    def __init__(self, network: Network, versions: ParameterVersions | None = None) -> None:
        self._hierarchy = network.hierarchy
        self._versions = versions
        self._blocks: list[list[_SessionLayer]] = []
        try:
            check_containers(network)
            for block in network.layers_of_blocks():
                self._blocks.append([_SessionLayer(layer, to_fused_layers(layer)) for layer in block])
            self._head = fused_pool_linear(network.head)
        except SkippedModuleError as error:
            raise error.within(network) from None
        # Without the network itself, whose hooks run around each call: the network refers to its session.
        below = (module for top in (network.blocks, network.head) for module in top.modules())
        self._hooks = None if versions is None else HookVersions(below)
        called = [layer for block in self._blocks for layer, folded in block if folded is None]
        #: Whether the session holds copies of all weights; otherwise it calls layers of the network.
        self.holds_all_weights = not called
        self._streams: set[torch.cuda.Stream] = set()  # those that have read the weights
        if versions is not None:
            self._copy_views(versions)
            if called:  # they read their own parameters and attributes, which may change in every call
                below_called = {module for layer in called for module in layer.modules()}
                others = [layer for block in self._blocks for layer, folded in block if folded is not None]
                below_folded = {module for layer in (*others, network.head) for module in layer.modules()}
                versions.forget(below_called - below_folded)
        self._programs: dict[tuple[int, int, int, bool], list[_Step]] = {}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        weight = self._head.weights[0]
        assert weight is not None
        return weight.device

    def is_current(self) -> bool:
        """Whether the network is unchanged since construction, so that the folded weights are right.

        :meth:`hne.executors.ParameterVersions.is_current` lists the changes that are noticed. Those that are not take
        effect with the next ``train()`` or ``eval()``.
        """
        return self._versions is not None and self._versions.is_current()

    def has_current_hooks(self) -> bool:
        """Whether the hooks of the modules below the network are unchanged since construction."""
        return self._hooks is not None and self._hooks.is_current()

    def run(
        self, x: Tensor, leaves: slice, first: int = 0, *, keep: bool = False, sizes: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Compute a subtree; see :class:`~hne.executors.base.SubtreeRunner`."""
        program = self._prepared_program(x, leaves, first, keep)
        results: list[Tensor] = []
        for compute, keep_output in program:  # here and in run_member(): a function would be a frame of every call
            outputs = compute(x)
            x = outputs[-1]
            results += outputs if keep_output else outputs[:-1]
        if sizes is not None and results[-1].shape[0] > 1:  # the ensemble of one member is the member
            results[-1] = K.prefix_mean(results[-1], sizes)
        return results

    def run_member(self, x: Tensor, leaf: int, first: int, total: Tensor | None) -> Member:
        """Compute a leaf; see :class:`~hne.executors.base.MemberRunner`."""
        *earlier, (head, _) = self._prepared_program(x, slice(leaf, leaf + 1), first, True)
        results: list[Tensor] = []
        for compute, keep_output in earlier:
            outputs = compute(x)
            x = outputs[-1]
            results += outputs if keep_output else outputs[:-1]
        assert isinstance(head, K.FusedLayers)
        *features, logits, total, mean = head.next_member(x, total, leaf + 1)
        return Member(results + features, logits, total, mean)

    def _prepared_program(self, x: Tensor, leaves: slice, first: int, keep: bool) -> list[_Step]:
        """The program of a subtree, which is made in the first call."""
        if x.is_cuda and self._versions is not None:
            self._read_on_stream(torch.cuda.current_stream(x.device))
        key = leaves.start, leaves.stop, first, keep
        program = self._programs.get(key)
        if program is None:
            with torch.no_grad():
                program = self._programs[key] = self._program(leaves, first, keep)
        return program

    def _copy_views(self, versions: ParameterVersions) -> None:
        """Copy folded weights that are views of parameters: a change in place would reach these and no others."""

        storages = versions.storages()

        def copied(weight: Tensor) -> Tensor:
            return weight.clone() if weight.untyped_storage()._cdata in storages else weight

        def copied_layer(layer: K.FusedLayer) -> K.FusedLayer:
            weights = (None if weight is None else copied(weight) for weight in layer.weights)
            return layer._replace(weights=tuple(weights))

        def independent(folded: FoldedLayer | None) -> FoldedLayer | None:
            if isinstance(folded, FoldedStep):
                return folded.independent(copied)
            return None if folded is None else [*map(copied_layer, folded)]

        self._blocks = [
            [_SessionLayer(layer, independent(folded)) for layer, folded in block] for block in self._blocks
        ]
        self._head = copied_layer(self._head)

    def _read_on_stream(self, stream: torch.cuda.Stream) -> None:
        """Note that kernels on a stream read the weights: their memory is given to others only after these kernels."""
        # The owner of a graph keeps the weights that it reads alive.
        if stream in self._streams or torch.cuda.is_current_stream_capturing():
            return
        self._streams.add(stream)
        weights = [*self._head.weights]
        for _, folded in (layer for block in self._blocks for layer in block):
            for part in (folded,) if isinstance(folded, FoldedStep) else folded or ():
                weights += part.weights
        for weight in weights:
            if weight is not None:
                weight.record_stream(stream)

    def _program(self, leaves: slice, first: int, keep: bool) -> list[_Step]:
        """The steps of a subtree. Consecutive fused layers form one step; every other layer is a step."""
        steps: list[_Step] = []
        fused: list[K.FusedLayer] = []  # the layers of the next step
        ends: list[int] = []  # indices of those whose output the step returns

        def finish_step() -> None:
            if fused:
                last = len(fused) - 1
                images = first == 0 and not steps
                layers = K.FusedLayers(fused, ends, images=images, prepare=self._versions is not None)
                steps.append(_Step(layers, keep_output=last in ends))
                fused.clear()
                ends.clear()

        def add_step(compute: Callable[[bool, Tensor], list[Tensor]], keep_output: bool) -> None:
            finish_step()
            images = first == 0 and not steps
            steps.append(_Step(functools.partial(compute, images), keep_output))

        *nodes, (heads, replicate) = self._hierarchy.nodes(leaves, first)
        for block, (branches, children) in zip(self._blocks[first:], nodes, strict=True):
            for index, (layer, folded) in enumerate(block):
                kept = keep and index == len(block) - 1
                if isinstance(folded, FoldedStep):
                    add_step(functools.partial(_compute, folded.select_branches(branches, children)), kept)
                elif folded is None:
                    add_step(functools.partial(_forward, layer, branches, children), kept)
                else:
                    fused += K.select_branches(folded, branches, children)
                    if kept:
                        ends.append(len(fused) - 1)
                children = 1  # only the first layer of a block branches
        fused.append(self._head.select_branches(heads, replicate))
        ends.append(len(fused) - 1)
        finish_step()
        return steps


class _SessionLayer(NamedTuple):
    layer: Layer
    folded: FoldedLayer | None  # with all branches; None without a kernel path


class _Step(NamedTuple):
    compute: Callable[[Tensor], list[Tensor]]  # from the input to the features that are kept and, last, the output
    keep_output: bool  # whether the output is kept, too; the next step reads it


def _compute(step: FoldedStep, images: bool, x: Tensor) -> list[Tensor]:
    """Compute a layer that several kernels compute."""
    try:
        return [step(step.from_images(x) if images else x)]
    except SkippedModuleError as error:
        raise error.within(step.layer) from None


def _forward(layer: Layer, branches: slice, replicate: int, images: bool, x: Tensor) -> list[Tensor]:
    """Call a layer without folded weights."""
    executor = _KERNELS.of_tensors() if has_hooks(layer) or any(global_hook_dicts()) else _KERNELS
    x = executor.from_images(x) if images else x
    try:
        return [executor.materialize(layer(executor, x, branches, replicate))]
    except SkippedModuleError as error:
        raise error.within(layer) from None


_KERNELS = KernelExecutor()
