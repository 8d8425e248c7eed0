"""Detection of changed parameters, buffers, submodules and attributes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import hne_kernels as K

_MISSING = object()
_NOTHING: frozenset[str] = frozenset()
# Attributes that PyTorch needs itself. Hooks change within these dictionaries, which stay the same objects.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_READABLE = (Tensor, nn.Parameter, nn.Buffer)  # subclasses, such as fake tensors, may have no memory


class CountsAttributeChanges(nn.Module):
    """A module that counts the changes of its own attributes.

    :class:`ParameterVersions` compares the count. It cannot refer to the attributes of a network, because one of them
    is the session that refers to the record.

    Attributes:
        attribute_changes: Attributes that were set to another object, or deleted.
        uncounted_attributes: Names of attributes whose changes do not count.
    """

    attribute_changes: int = 0
    uncounted_attributes: ClassVar[frozenset[str]] = _NOTHING

    def __setattr__(self, name: str, value: Any) -> None:
        changed = self.__dict__.get(name, _MISSING) is not value
        super().__setattr__(name, value)
        if changed and name not in self.uncounted_attributes:
            self.__dict__["attribute_changes"] = self.attribute_changes + 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__["attribute_changes"] = self.attribute_changes + 1


class ParameterVersions:
    """Records the state of modules, to notice changes later.

    Args:
        modules: The modules whose own tensors, submodules and attributes are recorded; their children are not searched.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        recorded = list(modules)
        # Networks are referred to weakly, because they refer to the record.
        self._networks: list[tuple[weakref.ref[CountsAttributeChanges], int]] = [
            (weakref.ref(module), module.attribute_changes)
            for module in recorded
            if isinstance(module, CountsAttributeChanges)
        ]
        self._network_tables = [
            tables for module in recorded if isinstance(module, CountsAttributeChanges) for tables in _tables(module)
        ]
        self._modules = [module for module in recorded if not isinstance(module, CountsAttributeChanges)]
        self._changed = False  # whether a change is known already
        self._record()
        _RECORDS[id(self)] = self
        _watch_optimizers()

    def is_current(self) -> bool:
        """Whether the modules are unchanged; False if that is unknown.

        ================================================  ==============================================================
        change                                            noticed
        ================================================  ==============================================================
        in place, by PyTorch's ops                        always, by the tensor's version counter
        another parameter, buffer, submodule, attribute   always
        a list or dictionary in an attribute              always, one within another as well
        ``parameter.data = other``                        if ``other`` has memory of its own
        a step of an optimiser of ``torch.optim``         always, fused or not, unless the step was compiled
        memory written past PyTorch (``parameter.data``,  on a CPU, if one of the five sampled places of a tensor has
        collectives, other processes, NumPy)              other bytes: the first and last 64, and three between them
        the same on a GPU                                 never
        an object in an attribute, changed in place       never, unless it is a tensor, list or dictionary
        ================================================  ==============================================================

        Call ``train()`` or ``eval()`` of the model after a change that is not noticed. Tensors made under
        ``torch.inference_mode()`` have no version counter, and count as changed.
        """
        if self._changed:
            return False
        for reference, count in self._networks:
            network = reference()
            if network is None or network.attribute_changes != count:
                return False
        return self._same_tensors() and self._same_attributes()

    def forget(self, modules: set[nn.Module]) -> None:
        """Ignore changes of some of the modules from now on."""
        same_tensors, same_attributes = self._same_tensors, self._same_attributes
        self._modules = [module for module in self._modules if module not in modules]
        self._record()
        self._changed |= not (same_tensors() and same_attributes())

    def accept_attributes(self) -> None:
        """Accept the present attributes: a call of the modules may have set some."""
        self._record_attributes()

    def storages(self) -> set[int]:
        """The identities (``_cdata``) of the storages of all recorded tensors."""
        return {memory.untyped_storage()._cdata for memory in (*self._memory, *self._attribute_memory)}

    def mark_step(self, parameters: set[int]) -> None:
        """Note that an optimiser has changed the parameters with these ids."""
        if not self._ids.isdisjoint(parameters):
            self._changed = True

    def _record(self) -> None:
        tables = [*self._network_tables, *(table for module in self._modules for table in _tables(module))]
        # Batch counters have no influence on predictions.
        tensors = [
            tensor
            for table in tables
            for name, tensor in table.items()
            if isinstance(tensor, Tensor) and name != "num_batches_tracked"
        ]
        self._ids = set(map(id, tensors))
        self._same_tensors, self._memory = _unchanged(tables, [_NOTHING] * len(tables), tensors)
        self._record_attributes()

    def _record_attributes(self) -> None:
        containers: list[dict[Any, Any] | list[Any]] = []
        ignored: list[frozenset[str]] = []
        tensors: list[Tensor] = []
        seen: set[int] = set()

        def add(value: Any) -> None:
            """Record the content of an attribute."""
            if isinstance(value, Tensor):
                tensors.append(value)
            elif isinstance(value, dict | list) and id(value) not in seen:
                seen.add(id(value))
                containers.append(value)
                ignored.append(_NOTHING)
                for entry in list(value.values()) if isinstance(value, dict) else value:
                    add(entry)
            elif isinstance(value, tuple):
                for entry in value:
                    add(entry)

        for module in self._modules:
            skipped = _INTERNAL
            attributes = vars(module)
            if module._forward_pre_hooks:  # pruning and weight norm compute attributes anew, from parameters
                skipped |= {name for name, value in attributes.items() if isinstance(value, Tensor)}
            containers.append(attributes)
            ignored.append(skipped)
            for name, value in list(attributes.items()):
                if name not in skipped:
                    add(value)
        self._ids.update(map(id, tensors))
        self._same_attributes, self._attribute_memory = _unchanged(containers, ignored, tensors)


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The dictionaries in which a module holds its parameters, buffers and submodules."""
    return module._parameters, module._buffers, module._modules


def _unchanged(
    containers: list[Any], ignored: list[frozenset[str]], tensors: list[Tensor]
) -> tuple[Callable[[], bool], list[Tensor]]:
    """A function that tells whether containers and tensors are unchanged. The second result has to be kept as long: it
    refers to the memory of the tensors, which therefore cannot be given to others."""
    memory = [tensor.detach() for tensor in tensors]
    sizes = [_readable_bytes(tensor) for tensor in tensors]
    return K.StateRecord(containers, ignored, tensors, sizes).unchanged, memory


def _readable_bytes(tensor: Tensor) -> int:
    """The bytes from the first to the last element of a tensor, if a CPU can read them; else 0."""
    if type(tensor) not in _READABLE or not tensor.is_cpu or tensor.layout != torch.strided or tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


# Records by their ids, in which optimisers note their steps.
_RECORDS: weakref.WeakValueDictionary[int, ParameterVersions] = weakref.WeakValueDictionary()


@functools.cache
def _watch_optimizers() -> None:
    """Let all optimisers note their steps in the records. Fused ones write without a new version of the tensors."""
    register_optimizer_step_post_hook(note_optimizer_step)


def note_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Note in all records that an optimiser has changed its parameters. Its own step does so by itself; the replay of a
    CUDA graph that contains the step does not."""
    if torch.compiler.is_compiling():
        return
    if records := _RECORDS.valuerefs():
        parameters = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for reference in records:
            if (record := reference()) is not None:
                record.mark_step(parameters)
