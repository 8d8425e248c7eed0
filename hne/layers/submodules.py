"""Submodules whose parameters are read, while the submodules themselves are not called.

The kernels compute a convolution and its batch norm from the parameters of ``ConvNorm.conv`` and ``ConvNorm.bn``. They
do not call these modules, so the ``forward`` and the hooks of these modules do not run. Hooks that only recompute a
parameter (pruning, weight norm, spectral norm) are run before the parameter is read. Everything else that relies on the
call is an error.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_RECOMPUTING = (BasePruningMethod, SpectralNorm, WeightNorm)  # forward pre-hooks that set a parameter of the module
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)
# The methods that compute a Conv2d or BatchNorm2d.
_METHODS = ("__call__", "forward", "_conv_forward", "_check_input_dim")
CALLED_BY_NAIVE = "model.to_naive() calls each convolution and batch norm, if it computes all models"


class SkippedModuleError(RuntimeError):
    """A module relies on being called, but its parameters are read instead.

    Attributes:
        module: The module.
    """

    def __init__(self, module: nn.Module, reason: str, name: str | None = None) -> None:
        super().__init__(f"{name or type(module).__name__}: {reason}")
        self.module = module
        self._reason = reason

    def within(self, network: Any) -> SkippedModuleError:
        """The same error with the name of the module in ``network``."""
        modules = network.named_modules() if isinstance(network, nn.Module) else ()
        names = (name for name, module in modules if module is self.module)
        return SkippedModuleError(self.module, self._reason, next(names, None))


def hook_dicts(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The dictionaries in which PyTorch keeps the hooks on the calls of ``module``."""
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


def global_hook_dicts() -> tuple[dict[int, Any], ...]:
    """The dictionaries of the hooks on the calls of all modules (``register_module_forward_hook`` and the like)."""
    return _GLOBAL_HOOKS


def warn_of_global_hooks() -> None:
    """Warn that hooks on all modules do not run for convolutions and batch norms; PyTorch's own hooks do not mind."""
    for hooks in _GLOBAL_HOOKS:
        for hook in hooks.values():
            if not str(getattr(hook, "__module__", "")).startswith("torch."):
                warnings.warn(
                    f"the hook {_name(hook)} on all modules runs for the model and its layers, but not for the "
                    f"convolutions and batch norms, which the kernels compute. {CALLED_BY_NAIVE}",
                    stacklevel=2,
                )


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook on the calls of ``module`` is registered."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )


def check_kind(module: nn.Module, kind: type[nn.Module], name: str | None = None) -> None:
    """Raise unless a module is of the class whose parameters an executor reads.

    Raises:
        SkippedModuleError: It is of another class.
    """
    if not isinstance(module, kind):
        reason = f"expected a {kind.__name__}, whose parameters are read; got {type(module).__name__}"
        raise SkippedModuleError(module, reason, name)


def check_never_called(module: nn.Module, advice: str) -> None:
    """Raise if a module that is never called has hooks.

    Raises:
        SkippedModuleError: It has hooks, which would never run. The message ends with ``advice``.
    """
    if has_hooks(module):
        (hook, *_) = (hook for hooks in hook_dicts(module) for hook in hooks.values())
        reason = f"a {type(module).__name__} is never called, so its hook {_name(hook)} would not run: {advice}"
        raise SkippedModuleError(module, reason)


def prepare_to_read(module: nn.Module, *kinds: type[nn.Module]) -> None:
    """Bring the parameters of a convolution or batch norm up to date, so that they can be read without a call.

    Args:
        module: The module.
        kinds: Classes whose computation the reader implements.

    Raises:
        SkippedModuleError: The module computes something else, or has a hook that would not run.
    """
    cls = type(module)
    if "forward" in module.__dict__ or (cls not in kinds and not any(_computes_as(cls, kind) for kind in kinds)):
        expected = " or ".join(f"nn.{kind.__name__}" for kind in kinds)
        got = cls.__name__ + (" with a forward of its own" if isinstance(module, kinds) else "")
        reason = f"expected {expected}, because its parameters are read and it is not called; got {got}. "
        raise SkippedModuleError(module, reason + CALLED_BY_NAIVE)
    if has_hooks(module):
        _recompute_parameters(module)


def _recompute_parameters(module: nn.Module) -> None:
    """Run the hooks that recompute a parameter; raise if there is another hook."""
    for hooks in hook_dicts(module):
        for hook in hooks.values():
            if not isinstance(hook, _RECOMPUTING):
                reason = (
                    f"its parameters are read and it is not called, so its hook {_name(hook)} would not run: register "
                    f"the hook on the layer, or replace it by a parametrization (torch.nn.utils.parametrize) if it "
                    f"computes a parameter. {CALLED_BY_NAIVE}"
                )
                raise SkippedModuleError(module, reason)
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def only_recomputes_parameters(module: nn.Module) -> bool:
    """Whether a module has hooks, and all of them compute one of its parameters (pruning and the like)."""
    hooks = [hook for hooks in hook_dicts(module) for hook in hooks.values()]
    return bool(hooks) and all(isinstance(hook, _RECOMPUTING) for hook in hooks)


def detach_recomputed(module: nn.Module) -> None:
    """Detach parameters that a hook has computed. ``copy.deepcopy`` refuses tensors with a graph."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _RECOMPUTING):
            name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
            tensor = module.__dict__.get(name)
            if tensor is not None:
                setattr(module, name, tensor.detach())


def _computes_as(cls: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a class inherits the computation of ``kind``. Parametrized modules have such a class of their own."""
    return issubclass(cls, kind) and all(getattr(cls, m, None) is getattr(kind, m, None) for m in _METHODS)


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__
