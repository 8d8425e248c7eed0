"""The template of a :class:`Module`: checks, dry runs that find its output and cost, and new weights for its copies."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.lazy import LazyModuleMixin

from .parameters import Size
from .submodules import detach_recomputed

_BATCH = 2  # of dry runs; a template that mixes or merges images is noticed from two images on
_SIDES = (32, 64, 224)  # of feature maps in dry runs, if the size is not given
_NOISE = 0.1  # for parameters that no reset_parameters() reaches, relative to their root mean square


def check_template(template: Any) -> None:
    """Raise unless a template is a module whose parameters exist and can be copied, trained and saved."""
    if not isinstance(template, nn.Module):
        raise TypeError(f"Module.template must be an nn.Module, got {template!r}")
    for name, module in template.named_modules():
        kind = type(module)
        place = f"{kind.__name__} {name!r}" if name else kind.__name__
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(f"Module.template: {place} has no parameters yet: call the template once before")
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if "quantized" in kind.__module__.split(".") or any(tensor.is_quantized for tensor in tensors):
            raise ValueError(f"Module.template: {place} is quantised, and cannot be trained: give the module before it")
    for name, value in template.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"Module.template: its state_dict must have tensors only, for checkpoints; "
                f"got a {type(value).__name__} for {name!r}"
            )


def copied(template: nn.Module) -> nn.Module:
    """A copy of a module that shares nothing with it."""
    for module in template.modules():
        detach_recomputed(module)
    return copy.deepcopy(template)


# Dry runs -------------------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a template makes of features of some size."""

    size: Size
    macs: int  # for one image


class DryRuns:
    """Runs a template with zeros, to find what it reads and returns and what that costs.

    The template runs once as it is, for one size, and then on the meta device, without memory or arithmetic. If it does
    not run there, for instance because it depends on values, it runs as it is.

    Args:
        template: The module.
        in_channels: Channels of its input.
        tokens: Whether it reads tokens; None to try a feature map first, then tokens.
        input_size: Height and width of the first run, or number of tokens; None for some usual sizes.

    Attributes:
        tokens: Whether the template reads tokens ``[batch, tokens, channels]``.
        contiguous: Whether it fails with a channels-last feature map.
        writes: Whether it may write to its input.
        size: Height and width of the first run.
        channels: Channels of its output.

    Raises:
        TypeError, ValueError: The template cannot run, or does not return one feature map, tokens or a vector.
    """

    def __init__(
        self, template: nn.Module, in_channels: int, tokens: bool | None, input_size: int | Size | None
    ) -> None:
        self._template = template
        self._in_channels = in_channels
        self._results: dict[Size, Result] = {}
        self._on_meta: nn.Module | None = None
        self.tokens = self.contiguous = self.writes = False
        self.size, self.channels = self._first_run(tokens, input_size)
        self._find_writes_in_training()

    def __deepcopy__(self, memo: dict[int, Any]) -> DryRuns:
        return self  # copies of a layer have the same template

    def read(self, x: Tensor) -> Tensor:
        """The template's input for a feature map ``[batch, channels, height, width]``; a view where that is safe."""
        if self.tokens:
            x = x.permute(0, 2, 3, 1).flatten(1, 2)
        if self.tokens or self.contiguous:
            x = x.contiguous()
        return x.clone() if self.writes else x

    def as_map(self, y: Any, x: Tensor) -> Tensor:
        """The output of a copy as a feature map ``[batch, channels, height, width]``, checked.

        Args:
            y: The output: a feature map, tokens ``[batch, tokens, channels]`` or a vector ``[batch, channels]``.
            x: The feature map that was read.
        """
        name = f"Module.template {type(self._template).__name__}"
        if not isinstance(y, Tensor) or not y.is_floating_point():
            got = f"a tensor of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise TypeError(f"{name} must return one floating-point tensor, got {got}")
        if y.dim() not in (2, 3, 4) or y.shape[0] != x.shape[0]:
            raise ValueError(
                f"{name} must return a feature map [batch, channels, height, width], tokens [batch, tokens, channels] "
                f"or a vector [batch, channels] for a batch of {x.shape[0]}, got shape {tuple(y.shape)}"
            )
        if y.dim() == 3:
            y = y.transpose(1, 2)
        while y.dim() < 4:
            y = y.unsqueeze(-1)
        return y

    def check_channels(self, y: Tensor, x: Tensor) -> None:
        """Raise unless a feature map ``y``, made of ``x``, has the channels that the first run has found."""
        if y.shape[1] != self.channels:
            raise ValueError(
                f"Module.template {type(self._template).__name__} has {self.channels} output channels for an input of "
                f"{_text(self.size)}, but {y.shape[1]} for {_text(tuple(x.shape[2:]))}: give input_size"
            )

    def result(self, size: Size) -> Result:
        """What the template makes of an input of ``size``."""
        result = self._results.get(size)
        if result is None:
            try:
                result = self._count(self._meta(), size)
            except Exception:  # whatever the code of the template raises: it tells itself, below
                result = self._count(copied(self._template).eval(), size)
            self._results[size] = result
        return result

    def _first_run(self, tokens: bool | None, input_size: int | Size | None) -> tuple[Size, int]:
        """Find ``tokens``, ``contiguous`` and ``writes``; return the size of the run and the channels of the output."""
        module = copied(self._template).eval()
        failure: Exception | None = None
        for as_tokens in (False, True) if tokens is None else (tokens,):
            for size in self._sizes(as_tokens, input_size, ambiguous=tokens is None):
                for contiguous in (False,) if as_tokens else (False, True):
                    self.tokens, self.contiguous = as_tokens, contiguous
                    x = self._zeros(module, size)
                    try:
                        y, self.writes = self._run(module, x)
                    except Exception as error:  # whatever the code of the template raises
                        failure = failure or error
                        continue
                    return size, self.as_map(y, x).shape[1]
        forms = {None: "as a feature map or tokens", False: "as a feature map", True: "as tokens"}
        sizes = ", ".join(_text(size) for size in self._sizes(bool(tokens), input_size))
        raise ValueError(
            f"Module.template {type(self._template).__name__} must be callable with one tensor of {self._in_channels} "
            f"channels, {forms[tokens]} of size {sizes} (or give input_size and tokens); "
            f"it raised {type(failure).__name__}: {failure}"
        ) from failure

    def _sizes(self, tokens: bool, input_size: int | Size | None, ambiguous: bool = False) -> list[Size]:
        """The sizes of the first run. Where the width is that of the channels, a linear layer would read a feature
        map as well as tokens, so such sizes are left out."""
        if input_size is None:
            return [(side, 1 if tokens else side) for side in _SIDES if side != self._in_channels]
        size = input_size if isinstance(input_size, tuple) else (input_size, 1 if tokens else input_size)
        if ambiguous and size[1] == self._in_channels:
            raise ValueError(
                f"Module.tokens must be True or False, as an input of size {_text(size)} has as many "
                f"columns as channels; got None"
            )
        return [size]

    def _find_writes_in_training(self) -> None:
        """Find whether the template may write to its input in training, as a dropout in place does."""
        try:
            module = self._meta().train()
            _, writes = self._run(module, self._zeros(module, self.size))
            self.writes |= writes
        except Exception:  # unknown, so that its input is copied
            self.writes = True
        finally:
            if self._on_meta is not None:
                self._on_meta.eval()

    def _meta(self) -> nn.Module:
        if self._on_meta is None:
            self._on_meta = copied(self._template).to("meta").eval()
        return self._on_meta

    def _zeros(self, module: nn.Module, size: Size) -> Tensor:
        """A feature map of zeros in channels-last memory, as the kernels have it."""
        tensors = (tensor for tensor in module.parameters() if tensor.is_floating_point())
        like = next(tensors, torch.empty(0, device="meta" if module is self._on_meta else "cpu"))
        with torch.inference_mode(False):  # with a version counter
            x = torch.zeros(_BATCH, *size, self._in_channels, dtype=like.dtype, device=like.device)
            return x.permute(0, 3, 1, 2)

    def _run(self, module: nn.Module, x: Tensor) -> tuple[Any, bool]:
        """The output of a module, and whether it has written to its input."""
        with torch.inference_mode(False), torch.no_grad():
            x = self.read(x)
            version = x._version
            y = module(x)
            return y, x._version != version

    def _count(self, module: nn.Module, size: Size) -> Result:
        from torch.utils.flop_counter import FlopCounterMode  # takes long to import

        x = self._zeros(module, size)
        # The counter knows neither PyTorch's fused attention for CPUs nor its fast path of encoder layers.
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                y, _ = self._run(module, x)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
        y = self.as_map(y, x)
        self.check_channels(y, x)
        height, width = y.shape[2:]
        return Result((height, width), counter.get_total_flops() // (2 * _BATCH))


def _text(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


# New weights ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_anew(module: nn.Module) -> None:
    """Draw the parameters of a module anew, by the ``reset_parameters()`` of its submodules.

    Parameters that no such method reaches get noise. Parameters that require no gradient keep their values, and a
    submodule that has no others keeps its buffers, too.
    """
    before = {name: (p, _version(p), p.clone()) for name, p in module.named_parameters()}
    reset_here: set[int] = set()  # ids of the parameters of submodules that were reset
    for submodule in reversed(list(module.modules())):  # a module may improve on what its submodules have drawn
        own = list(submodule.parameters(recurse=False))
        reset = getattr(submodule, "reset_parameters", None) or getattr(submodule, "_reset_parameters", None)
        if callable(reset) and (not own or any(parameter.requires_grad for parameter in own)):
            reset()
            reset_here.update(map(id, own))
    for name, parameter in module.named_parameters():
        if name not in before:
            continue
        old, version, value = before[name]
        if version is None:  # under torch.inference_mode() writes are not counted
            reached = id(parameter) in reset_here
        else:
            reached = parameter is not old or _version(parameter) != version or not _equal(parameter, value)
        if not parameter.requires_grad:
            parameter.copy_(value)
        elif not reached:
            _add_noise(parameter, _NOISE)


@torch.no_grad()
def add_noise(module: nn.Module, relative: float) -> None:
    """Add normal noise to each parameter that requires a gradient, ``relative`` to its root mean square."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            _add_noise(parameter, relative)


def _add_noise(parameter: Tensor, relative: float) -> None:
    parameter.add_(torch.randn_like(parameter) * (relative * parameter.abs().square().mean().sqrt()))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() or torch.is_inference_mode_enabled() else tensor._version


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or torch.equal(a, b)
