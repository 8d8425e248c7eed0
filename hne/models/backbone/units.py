"""The units of a backbone: modules that are computed one after the other, with their paths."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import BackboneError
from ...layers import has_hooks


@dataclass(frozen=True)
class Unit:
    """A module of the backbone, or a function of its ``forward`` as a module.

    Args:
        path: The attributes that lead to the module, such as ``layer1.0``.
        module: The module itself, not a copy.
    """

    path: str
    module: nn.Module

    def __str__(self) -> str:
        return self.path if self.path.startswith("(") else f"{self.path} ({type(self.module).__name__})"


def find(net: nn.Module, path: str) -> nn.Module:
    """The submodule at a path.

    Raises:
        BackboneError: There is none; the message has the nearest path.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    if path in modules and path:
        return modules[path]
    nearest = difflib.get_close_matches(str(path), modules, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]!r}?" if nearest and nearest[0] else ""
    raise BackboneError(f"stages: {type(net).__name__} has no module {path!r}{hint}")


def units_at(net: nn.Module, path: str) -> list[Unit]:
    """The module at a path; the modules of an ``nn.Sequential`` or ``nn.ModuleList`` one by one."""
    return expand(Unit(path, find(net, path)))


def expand(unit: Unit) -> list[Unit]:
    """The modules of an ``nn.Sequential`` or ``nn.ModuleList`` one by one, at any depth; another unit as it is.

    The first block of MobileNetV2 is such a sequence, too.
    """
    module = unit.module
    sequential = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    opened = sequential or type(module) is nn.ModuleList or _has_no_expansion(module)
    if not opened or has_hooks(module) or "forward" in module.__dict__:
        return [unit]
    prefix = f"{unit.path}." if unit.path else ""
    return [part for name, child in module.named_children() for part in expand(Unit(prefix + name, child))]


def _has_no_expansion(module: nn.Module) -> bool:
    """Whether this is the first block of MobileNetV2: a depthwise and a 1x1 convolution, without shortcut."""
    kind = type(module).__name__
    if kind == "InvertedResidual":  # torchvision
        convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
        return list(module._modules) == ["conv"] and len(convs) == 2 and not getattr(module, "use_res_connect", True)
    if kind == "DepthwiseSeparableConv":  # timm
        children = {name for name, child in module.named_children() if type(child) is not nn.Identity}
        known = {"conv_dw", "bn1", "act1", "se", "conv_pw", "bn2", "act2"}
        return not getattr(module, "has_skip", True) and children <= known
    return False


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no effect on the random generator until the end of the ``with`` block."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            module.eval()
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_convertible(net: nn.Module) -> None:
    """Raise unless the parameters of a network can be copied.

    Raises:
        TypeError: ``net`` is not a module.
        BackboneError: It has no parameters, parameters that are not initialised yet (lazy modules), are shared by two
            modules (tied weights), are quantised, or are not all float32 or all float64 on one device.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"backbone must be an nn.Module, got {type(net).__name__}")
    for path, module in net.named_modules():
        if ".quantized" in type(module).__module__:
            name = f"{path} ({type(module).__name__})"
            raise BackboneError(f"backbone: {name} is quantised: convert the network before quantisation")
    names: dict[int, str] = {}
    kinds = set()
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise BackboneError(f"backbone: {name} of a lazy module has no shape yet: give the network one batch first")
        if type(parameter.data) is not Tensor or parameter.dtype not in (torch.float32, torch.float64):
            kind = parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
            raise BackboneError(
                f"backbone: expected parameters in float32 or float64, got {kind} for {name}: "
                "convert the network before quantisation and in full precision"
            )
        if (other := names.setdefault(id(parameter), name)) != name:
            raise BackboneError(
                f"backbone: {other} and {name} are one tensor (tied weights), which branches cannot copy: "
                "give each module its own parameter"
            )
        kinds.add((parameter.dtype, parameter.device))
    if len(kinds) != 1:
        text = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
        raise BackboneError(f"backbone: expected parameters of one dtype on one device, got {text}")


def check_once(paths: Iterable[str]) -> None:
    """Raise if a module is named twice, by itself or as a part of another.

    Raises:
        BackboneError: It is.
    """
    seen: list[str] = []
    for path in paths:
        for other in seen:
            if path == other:
                raise BackboneError(f"stages: {path!r} is used twice")
            if path.startswith(f"{other}.") or other.startswith(f"{path}."):
                inner, outer = sorted((path, other), key=len, reverse=True)
                raise BackboneError(f"stages: {inner!r} is used twice, by itself and as a part of {outer!r}")
        seen.append(path)


def check_complete(net: nn.Module, units: Sequence[Unit], head: str) -> None:
    """Raise if parameters of the network belong to no unit and not to the head.

    Raises:
        BackboneError: They do; the message names the module.
    """
    used = {id(tensor) for unit in units for tensor in _tensors(unit.module)}
    used |= {id(tensor) for tensor in _tensors(find(net, head))}
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in used:
                owner = f"{path} ({type(module).__name__})" if path else f"{type(net).__name__} itself"
                raise BackboneError(f"stages: the parameter {name} of {owner} is left out: name it in a stage")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
