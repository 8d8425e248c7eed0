"""Wrong arguments of every op, each with the error that it must raise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONVOLUTIONS = ("branch_conv2d", "branch_depthwise_conv2d", "fused_conv2d")
LOSS = "hierarchical_distillation_loss"


def _wider(tensor: Tensor, dim: int) -> Tensor:
    """The tensor with one more entry along ``dim``."""
    return torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)


# Label of the op, argument, its wrong value (or a function of the right one), error, pattern of the message.
WRONG: list[tuple[str, str, Any, type[Exception], str]] = []


def _wrong(ops: str | tuple[str, ...], error: type[Exception], *rows: tuple[str, Any, str]) -> None:
    for op in (ops,) if isinstance(ops, str) else ops:
        WRONG.extend((op, argument, value, error, text) for argument, value, text in rows)


DENSE, DEPTHWISE = "branch_norm_conv2d-dense", "branch_norm_conv2d-depthwise"
MATERIALIZE = "branch_norm_conv2d-materialize"
NORM_CONVS = (DENSE, DEPTHWISE)
RESIDUAL = (MATERIALIZE, "branch_normalize")
NORMALIZED_RESIDUAL = (*RESIDUAL, "branch_pointwise_norm_conv2d")
POINTWISE = ("branch_pointwise_stats", "branch_pointwise_norm_conv2d")
NORMALIZING = (*NORM_CONVS, *RESIDUAL, *POINTWISE)
MAPS = (*CONVOLUTIONS, *NORM_CONVS, "fused_bottleneck", *RESIDUAL, *POINTWISE)
_wrong(
    MAPS,
    ValueError,
    ("x", lambda x: x[0], r"x: expected 5 dimensions .*got 4"),
    ("x", lambda x: x[None], r"x: expected 5 dimensions .*got 6"),
)
_wrong(
    MAPS,
    TypeError,
    ("x", lambda x: None, r"x: expected a tensor.*got NoneType"),
    ("x", lambda x: x.tolist(), r"x: expected a tensor.*got list"),
    ("x", lambda x: x.long(), r"x: expected a floating-point tensor, got torch.int64"),
    ("x", lambda x: x.to(torch.complex64), r"x: expected a floating-point tensor, got torch.complex64"),
)

# Parameters: shape, dtype and device.
for _op, _weight, _bias in (
    ("branch_conv2d", "weight", "bias"),
    ("branch_depthwise_conv2d", "weight", "bias"),
    ("fused_conv2d", "weight", "bias"),
    ("fused_bottleneck", "expand", "expand_bias"),
    ("fused_bottleneck", "project", "project_bias"),
    ("fused_bottleneck", "shortcut", "shortcut_bias"),
    ("fused_bottleneck", "depthwise", "depthwise_bias"),
    ("prefix_logits", "weight", "bias"),
):
    for _name in (_weight, _bias):
        _wrong(
            _op,
            ValueError,
            (_name, lambda t: t[0], rf"\b{_name}: expected .*got"),
            (_name, lambda t: t.to("meta"), rf"\b{_name}: expected to be on the device .*got meta"),
        )
        _wrong(
            _op,
            TypeError,
            (_name, lambda t: t.double(), rf"\b{_name}: expected .*torch.float32.* got torch.float64"),
        )
    _wrong(
        _op,
        ValueError,
        (_weight, lambda w: _wider(w, 0), rf"\b({_weight}|{_bias}): expected .*got"),
        (_weight, lambda w: _wider(w, -1), rf"\b{_weight}: expected .*got"),
        (_bias, lambda b: _wider(b, 0), rf"\b{_bias}: expected .*got"),
    )

# Channels.
for _op in ("branch_conv2d", "branch_depthwise_conv2d", "prefix_logits"):
    _wrong(_op, ValueError, ("bias", lambda b: _wider(b, -1), r"\bbias: expected shape .*got"))
_wrong(
    ("branch_conv2d", DENSE),
    ValueError,
    ("weight", lambda w: _wider(w, 2), r"weight: expected 3 input channels as x has, got 4"),
)
_wrong(
    ("branch_depthwise_conv2d", DEPTHWISE),
    ValueError,
    ("weight", lambda w: _wider(w, 1), r"weight: expected 3 input channels as x has, got 4"),
)
# A packed weight may have up to 15 padded channels; the length of the bias is the number of channels.
_wrong("fused_conv2d", ValueError, ("bias", lambda b: b.repeat(1, 2), r"weight: expected shape .*got"))

# Windows.
_wrong(
    ("branch_conv2d", "branch_depthwise_conv2d", *NORM_CONVS),
    ValueError,
    ("weight", lambda w: w[..., :0, :0], r"weight: expected a square kernel of at least 1x1"),
)
_wrong(
    (*CONVOLUTIONS, *NORM_CONVS),
    ValueError,
    ("x", lambda x: x[:, :, :0], r"x: expected at least 1 rows and columns for a 3x3 kernel with padding 1, got 0x4"),
)

# Numbers and names.
for _op in (*CONVOLUTIONS, *NORM_CONVS, "fused_bottleneck"):
    for _name, _least in (("stride", 1), ("padding", 0), ("replicate", 1)):
        if (_op, _name) == ("fused_bottleneck", "padding"):
            continue
        _wrong(_op, ValueError, (_name, _least - 1, rf"{_name}: expected at least {_least}, got {_least - 1}"))
        _wrong(
            _op,
            TypeError,
            (_name, 1.0, rf"{_name}: expected an int, got float"),
            (_name, True, rf"{_name}: expected an int, got bool"),
            (_name, (1, 1), rf"{_name}: expected an int, got tuple"),
        )
    _wrong(
        _op,
        ValueError,
        # Two branches with r children each are fewer than four, or the second one has no children.
        ("replicate", 1, r"(weight|expand): expected .*2.* got 4"),
        ("replicate", 5, r"(weight|expand): expected .*10.* got 4"),
        ("x", lambda x: _wider(x, 0), r"(weight|expand): expected .*6.* got 4"),
    )
_wrong(
    ("fused_conv2d", "fused_bottleneck", *NORMALIZING),
    ValueError,
    ("activation", "gelu", r"activation: expected one of none, relu, relu6, got 'gelu'"),
)

SUM = "fused_conv2d-residual"
_wrong(
    SUM,
    ValueError,
    ("residual", lambda r: r[0], r"residual: expected 5 dimensions .*got 4"),
    ("residual", lambda r: r[:1], r"residual: expected shape \(2, 2, 5, 4, 18\) .*got \(1, 2, 5, 4, 18\)"),
    ("residual", lambda r: _wider(r, 0), r"residual: expected shape .*got \(3,"),
    ("residual", lambda r: _wider(r, 1), r"residual: expected shape .*got \(2, 3,"),
    ("residual", lambda r: _wider(r, 2), r"residual: expected shape .*got"),
    ("residual", lambda r: _wider(r, 3), r"residual: expected shape .*got"),
    ("residual", lambda r: r[..., :1], r"residual: expected shape .*got .*, 1\)"),
    ("residual", lambda r: r.to("meta"), r"residual: expected to be on the device of x, .*got meta"),
    ("residual_replicate", 0, r"residual_replicate: expected at least 1, got 0"),
    ("residual_replicate", -1, r"residual_replicate: expected at least 1, got -1"),
    ("residual_replicate", 1, r"residual: expected shape \(4, 2, 5, 4, 18\) .*got \(2, 2, 5, 4, 18\)"),
    ("residual_replicate", 4, r"residual: expected shape \(1, 2, 5, 4, 18\) .*got \(2, 2, 5, 4, 18\)"),
)
_wrong(
    SUM,
    TypeError,
    ("residual", lambda r: r.double(), r"residual: expected the dtype of x, torch.float32, got torch.float64"),
    ("residual", lambda r: r.tolist(), r"residual: expected a tensor.*got list"),
    ("residual_replicate", 2.0, r"residual_replicate: expected an int, got float"),
    ("residual_replicate", True, r"residual_replicate: expected an int, got bool"),
)
_wrong("fused_conv2d", ValueError, ("residual_replicate", 0, r"residual_replicate: expected at least 1, got 0"))

# The tensors of a bottleneck.
_wrong(
    "fused_bottleneck",
    ValueError,
    ("final_activation", "ReLU", r"final_activation: expected one of none, relu, relu6, got 'ReLU'"),
    ("x", lambda x: _wider(x, 4), r"expand: expected shape"),
    ("expand", lambda w: w.expand(-1, -1, 3, 3, -1, -1), r"expand: expected .*1x1 kernel, got .*3, 3"),
    ("expand_bias", lambda b: _wider(b, -1), r"(project|depthwise): expected shape .*got"),
    ("depthwise", lambda w: w[:, :2, :2], r"depthwise: expected an odd kernel size, got 2"),
    ("depthwise", lambda w: w[:, :, :1], r"depthwise: expected shape"),
    ("depthwise_bias", lambda b: _wider(b, -1), r"depthwise_bias: expected shape .*got"),
    ("project_bias", lambda b: _wider(b, -1), r"shortcut: expected 19 output channels as project has, got 18"),
    ("shortcut_bias", lambda b: _wider(b, -1), r"shortcut: expected 18 output channels as project has, got 19"),
    ("shortcut_bias", None, r"shortcut: expected both shortcut and shortcut_bias, or neither"),
    ("shortcut", None, r"shortcut: expected both shortcut and shortcut_bias, or neither"),
    ("identity", True, r"identity: expected False where a shortcut convolution is given"),
)

# Normalisation.
for _ops, _name in (
    (NORMALIZING, "norm"),
    (("branch_pointwise_norm_conv2d",), "out_norm"),
    (NORMALIZED_RESIDUAL, "residual_norm"),
):
    for _argument in _name.split():
        _wrong(
            _ops,
            ValueError,
            (_argument, lambda v: v[0], rf"\b{_argument}: expected 3 dimensions .*got 2"),
            (_argument, lambda v: v[:2], rf"\b{_argument}: expected shape .*got \(2,"),
            (_argument, lambda v: _wider(v, 0), rf"\b{_argument}: expected shape .*got \(4,"),
            (_argument, lambda v: _wider(v, 1), rf"\b{_argument}: expected shape .*got"),
            (_argument, lambda v: _wider(v, 2), rf"\b{_argument}: expected shape .*got"),
            (_argument, lambda v: v.to("meta"), rf"\b{_argument}: expected to be on the device of x"),
        )
        _wrong(
            _ops,
            TypeError,
            (_argument, lambda v: v.double(), rf"\b{_argument}: expected torch.float32 \(the statistics"),
            (_argument, lambda v: v.tolist(), rf"\b{_argument}: expected a tensor .*got list"),
        )
for _op in (*NORM_CONVS, MATERIALIZE, *POINTWISE):
    _wrong(
        _op,
        ValueError,
        ("weight", lambda w: w[0], r"weight: expected .*got"),
        ("weight", lambda w: w.to("meta"), r"weight: expected to be on the device .*got meta"),
        ("weight", lambda w: _wider(w, 0), r"weight: expected .*got"),
        ("weight", lambda w: _wider(w, -1), r"weight: expected .*got"),
    )
    _wrong(_op, TypeError, ("weight", lambda w: w.double(), r"weight: expected .*torch.float32.* got torch.float64"))
_wrong(
    POINTWISE,
    ValueError,
    ("weight", lambda w: w.expand(-1, -1, -1, 3, 3), r"weight: expected a 1x1 kernel, got shape"),
)
_wrong(
    MATERIALIZE,
    ValueError,
    ("stride", 0, r"stride: expected at least 1, got 0"),
    ("padding", -1, r"padding: expected at least 0, got -1"),
    ("replicate", 0, r"replicate: expected at least 1, got 0"),
    ("replicate", 3, r"weight: expected 6 branches .*got 2"),
    ("materialize", False, r"residual: expected None without materialize, got a tensor"),
    ("weight", lambda w: w[:, :3, 0], r"weight: expected 5 dimensions .*got 4"),
    ("weight", lambda w: w.expand(-1, -1, -1, 2, 3), r"weight: expected a square kernel"),
)
_wrong(
    NORM_CONVS,
    ValueError,
    ("residual", lambda r: torch.ones(1), r"residual: expected None without materialize"),
    ("residual_norm", lambda r: torch.ones(1), r"residual_norm: expected None without materialize"),
)
_wrong(POINTWISE, TypeError, ("norm", None, r"norm: expected a tensor .*got NoneType"))
_wrong("branch_normalize", TypeError, ("norm", None, r"norm: expected a tensor .*got NoneType"))
_wrong(
    NORMALIZED_RESIDUAL,
    ValueError,
    ("residual", None, r"residual: expected a tensor where residual_norm is given, got None"),
)
_wrong(
    "branch_pointwise_norm_conv2d",
    ValueError,
    ("out_activation", "gelu", r"out_activation: expected one of none, relu, relu6, got 'gelu'"),
    ("next_weight", lambda w: w[0], r"next_weight: expected 5 dimensions"),
    ("next_weight", lambda w: _wider(w, 0), r"next_weight: expected shape"),
    ("next_weight", lambda w: _wider(w, 2), r"next_weight: expected shape"),
    ("next_weight", lambda w: w.expand(-1, -1, -1, 3, 3), r"next_weight: expected a 1x1 kernel"),
)
_wrong(
    "branch_pointwise_norm_conv2d",
    TypeError,
    ("out_norm", None, r"out_norm: expected a tensor .*got NoneType"),
    ("next_weight", lambda w: w.double(), r"next_weight: expected the dtype of x"),
)
_wrong(
    NORMALIZED_RESIDUAL,
    ValueError,
    ("residual", lambda r: r[:, :1], r"residual: expected shape"),
    ("residual", lambda r: r.to("meta"), r"residual: expected to be on the device"),
)
_wrong(
    NORMALIZED_RESIDUAL,
    TypeError,
    ("residual", lambda r: r.double(), r"residual: expected the dtype of x"),
)

_BATCH_NORM = "batch_norm_scale_shift"
_wrong(
    _BATCH_NORM,
    ValueError,
    ("mean", lambda t: t[0], r"mean: expected 2 dimensions .*got 1"),
    ("mean", lambda t: _wider(t, 0), r"var: expected shape \(3, 3\).*got \(2, 3\)"),
    ("var", lambda t: t[:1], r"var: expected shape \(2, 3\).*got \(1, 3\)"),
    ("var", lambda t: t.to("meta"), r"var: expected to be on the device of mean"),
    ("running_mean", None, r"running_mean: expected both running_mean and running_var, or neither"),
    ("running_var", None, r"running_mean: expected both running_mean and running_var, or neither"),
    ("bias", lambda t: t.flatten(), r"bias: expected shape and dtype of weight, \(2, 3\).*got \(6,\)"),
    ("bias", lambda t: t.half(), r"bias: expected shape and dtype of weight, .*got .*torch.float16"),
    ("num_batches_tracked", lambda t: t.repeat(2), r"num_batches_tracked: expected one number, got shape \(2,\)"),
    ("num_batches_tracked", lambda t: t.to("meta"), r"num_batches_tracked: expected to be on the device of mean"),
    ("total", lambda t: t[:0], r"total: expected one number, got shape \(0,\)"),
    ("total", lambda t: t.to("meta"), r"total: expected to be on the device of mean"),
    ("count", -1, r"count: expected at least 0, got -1"),
    ("eps", -1e-5, r"eps: expected a number that is not negative, got -1e-05"),
    ("eps", float("nan"), r"eps: expected a number that is not negative, got nan"),
    ("momentum", float("nan"), r"momentum: expected a number, got nan"),
)
_wrong(
    _BATCH_NORM,
    TypeError,
    ("mean", None, r"mean: expected a tensor.*got NoneType"),
    ("mean", lambda t: t.long(), r"mean: expected torch.float32 or torch.float64, got torch.int64"),
    ("mean", lambda t: t.bfloat16(), r"mean: expected torch.float32 or torch.float64, got torch.bfloat16"),
    ("var", lambda t: t.double(), r"var: expected torch.float32, got torch.float64"),
    ("var", None, r"var: expected a tensor.*got NoneType"),
    ("num_batches_tracked", lambda t: t.int(), r"num_batches_tracked: expected torch.int64, got torch.int32"),
    ("total", lambda t: t.double(), r"total: expected torch.float32, got torch.float64"),
    ("count", 2.0, r"count: expected an int, got float"),
    ("count", True, r"count: expected an int, got bool"),
)
for _name in ("weight", "bias", "running_mean", "running_var"):
    _wrong(
        _BATCH_NORM,
        ValueError,
        (_name, lambda t: t[0], rf"\b{_name}: expected shape \(2, 3\) .* or \(6,\), got \(3,\)"),
        (_name, lambda t: t[:, :2], rf"\b{_name}: expected shape .*got \(2, 2\)"),
        (_name, lambda t: t.t(), rf"\b{_name}: expected shape .*got \(3, 2\)"),
        (_name, lambda t: t.to("meta"), rf"\b{_name}: expected to be on the device of mean"),
    )
    _wrong(
        _BATCH_NORM,
        TypeError,
        (_name, lambda t: t.double(), rf"\b{_name}: expected torch.float32 or a narrower .*got torch.float64"),
        (_name, lambda t: t.short(), rf"\b{_name}: expected torch.float32 or a narrower .*got torch.int16"),
        (_name, lambda t: t.tolist(), rf"\b{_name}: expected a tensor .*got list"),
    )

# Ensembles.
for _op, _first in (("prefix_mean", "logits"), ("prefix_logits", "features")):
    _wrong(
        _op,
        ValueError,
        (_first, lambda t: t[0], rf"{_first}: expected 3 dimensions .*got 2"),
        ("sizes", (), r"sizes: expected at least one ensemble size, got none"),
        ("sizes", (0, 1), r"sizes: expected at least 1, got 0"),
        ("sizes", (-1,), r"sizes: expected at least 1, got -1"),
        ("sizes", (2, 1), r"sizes: expected strictly rising ensemble sizes, got \[2, 1\]"),
        ("sizes", (1, 1), r"sizes: expected strictly rising ensemble sizes, got \[1, 1\]"),
        ("sizes", (1, 6), r"sizes: expected at most 5, the number of models, got 6"),
    )
    _wrong(
        _op,
        TypeError,
        (_first, lambda t: t.int(), rf"{_first}: expected a floating-point tensor, got torch.int32"),
        ("sizes", (1.0, 2.0), r"sizes: expected an int, got float"),
    )
_wrong(
    "prefix_logits",
    ValueError,
    ("weight", lambda w: w[:4], r"weight: expected shape \(5, 4, 3\).*got \(4, 4, 3\)"),
)

# The loss.
_wrong(
    LOSS,
    ValueError,
    ("logits", lambda t: t[0], r"logits: expected 3 dimensions .*got 2"),
    ("logits", lambda t: t[:0], r"logits: expected at least one model and one class"),
    ("logits", lambda t: t[..., :0], r"logits: expected at least one model and one class"),
    ("target", lambda t: t[:2], r"target: expected shape \(3,\).*got \(2,\)"),
    ("target", lambda t: t[:, None], r"target: expected 1 dimensions"),
    ("target", lambda t: t * 0 + 4, r"target: expected class indices from 0 to 3, got 4"),
    ("target", lambda t: t * 0 - 1, r"target: expected class indices from 0 to 3, got -1"),
    ("target", lambda t: t * 0 - 100, r"target: expected class indices from 0 to 3, got -100"),
    ("target", lambda t: t.to("meta"), r"target: expected to be on the device of logits"),
    ("alpha", -0.1, r"alpha: expected a number from 0 to 1, got -0.1"),
    ("alpha", 1.5, r"alpha: expected a number from 0 to 1, got 1.5"),
    ("alpha", float("nan"), r"alpha: expected a number from 0 to 1, got nan"),
    ("temperature", 0.0, r"temperature: expected a positive number, got 0.0"),
    ("temperature", -2.0, r"temperature: expected a positive number, got -2.0"),
    ("temperature", float("inf"), r"temperature: expected a positive number, got inf"),
    ("temperature", float("nan"), r"temperature: expected a positive number, got nan"),
)
_wrong(
    LOSS,
    TypeError,
    ("logits", lambda t: t.long(), r"logits: expected a floating-point tensor, got torch.int64"),
    ("target", lambda t: t * float("nan"), r"target: expected class indices of dtype torch.int64, got torch.float32"),
    ("target", lambda t: t.int(), r"target: expected class indices of dtype torch.int64, got torch.int32"),
)


# Exported programs and compiled backward passes call the registered ops directly. With any arguments, the ops must not
# access memory outside the tensors.
UNCHECKED = [
    ("branch_conv2d", "weight", lambda w: w[:, :, :2]),
    ("branch_conv2d", "weight", lambda w: w[:2]),
    ("branch_conv2d", "weight", lambda w: w[0]),
    ("branch_conv2d", "weight", lambda w: w.double()),
    ("branch_conv2d", "bias", lambda b: b[:, :1]),
    ("branch_conv2d", "bias", lambda b: b[:1]),
    ("branch_conv2d", "stride", 0),
    ("branch_conv2d", "padding", -1),
    ("branch_conv2d", "replicate", 0),
    ("branch_depthwise_conv2d", "weight", lambda w: w[:, :2]),
    ("branch_depthwise_conv2d", "weight", lambda w: w[:2]),
    ("branch_depthwise_conv2d", "bias", lambda b: b[:, :1]),
    ("branch_depthwise_conv2d", "stride", 0),
    ("fused_conv2d", "weight", lambda w: w[:, :1]),
    ("fused_conv2d", "weight", lambda w: w[:2]),
    ("fused_conv2d", "weight", lambda w: w[..., :8]),
    ("fused_conv2d", "bias", lambda b: b[:2]),
    ("fused_conv2d", "activation", "gelu"),
    (SUM, "residual", lambda r: r[:1]),
    (SUM, "residual", lambda r: r[:, :, :2]),
    (SUM, "residual", lambda r: r[..., :17]),
    (SUM, "residual", lambda r: r[0]),
    (SUM, "residual", lambda r: r.double()),
    (SUM, "residual_replicate", 0),
    (SUM, "residual_replicate", 1),
    ("fused_bottleneck", "expand", lambda w: w[:2]),
    ("fused_bottleneck", "depthwise", lambda w: w[..., :2]),
    ("fused_bottleneck", "project_bias", lambda b: b[:1]),
    ("fused_bottleneck", "shortcut", lambda w: w[:, :1]),
    *((op, "norm", lambda v: v[:, :, :1]) for op in NORMALIZING),
    *((op, "norm", lambda v: v[:, :1]) for op in NORMALIZING),
    *((op, "norm", lambda v: v[:2]) for op in NORMALIZING),
    *((op, "norm", lambda v: v[0]) for op in NORMALIZING),
    *((op, "norm", lambda v: v.double()) for op in NORMALIZING),
    *((op, "norm", None) for op in NORMALIZING),
    *((op, "weight", lambda w: w[:2]) for op in NORM_CONVS),
    *((op, "weight", lambda w: w[0, 0, 0]) for op in NORM_CONVS),
    *((op, "weight", lambda w: w.double()) for op in NORM_CONVS),
    *((op, "stride", 0) for op in NORM_CONVS),
    (DEPTHWISE, "materialize", True),
    *((op, "residual", lambda r: torch.ones(2, 2, 5, 4, 3)) for op in NORM_CONVS),
    *((op, "residual_norm", lambda r: torch.ones(3, 2, 3)) for op in NORM_CONVS),
    *((op, "activation", "gelu") for op in NORMALIZING),
    (DENSE, "weight", lambda w: w[:, :, :2]),
    (DEPTHWISE, "weight", lambda w: w[:, :2]),
    (MATERIALIZE, "weight", lambda w: w[:1]),
    (MATERIALIZE, "weight", lambda w: w[:, :, :2]),
    (MATERIALIZE, "weight", lambda w: w.double()),
    (MATERIALIZE, "weight", lambda w: w[..., 0]),
    (MATERIALIZE, "stride", 0),
    (MATERIALIZE, "padding", -1),
    (MATERIALIZE, "replicate", 0),
    (MATERIALIZE, "replicate", 3),
    *((op, "residual", lambda r: r[:, :1]) for op in NORMALIZED_RESIDUAL),
    *((op, "residual", None) for op in NORMALIZED_RESIDUAL),
    *((op, "residual_norm", lambda v: v[:, :, :1]) for op in NORMALIZED_RESIDUAL),
    *((op, "residual_norm", lambda v: v[:2]) for op in NORMALIZED_RESIDUAL),
    *((op, "residual_norm", lambda v: v.double()) for op in NORMALIZED_RESIDUAL),
    *((op, "weight", lambda w: w[:1]) for op in POINTWISE),
    *((op, "weight", lambda w: w[:, :, :2]) for op in POINTWISE),
    *((op, "weight", lambda w: w.double()) for op in POINTWISE),
    ("branch_pointwise_norm_conv2d", "out_norm", lambda v: v[:, :, :1]),
    ("branch_pointwise_norm_conv2d", "out_norm", lambda v: v[:2]),
    ("branch_pointwise_norm_conv2d", "out_norm", lambda v: v.double()),
    ("branch_pointwise_norm_conv2d", "out_norm", None),
    ("branch_pointwise_norm_conv2d", "out_activation", "gelu"),
    ("branch_pointwise_norm_conv2d", "next_weight", lambda w: w[:1]),
    ("branch_pointwise_norm_conv2d", "next_weight", lambda w: w[:, :, :2]),
    ("branch_pointwise_norm_conv2d", "next_weight", lambda w: w.double()),
    *((_BATCH_NORM, name, lambda t: t[:, :2]) for name in ("var", "weight", "bias", "running_mean", "running_var")),
    *((_BATCH_NORM, name, lambda t: t[0]) for name in ("mean", "var", "weight", "bias", "running_mean")),
    *((_BATCH_NORM, name, lambda t: t.double()) for name in ("var", "total", "weight", "running_mean", "running_var")),
    *((_BATCH_NORM, name, lambda t: t[:1].expand_as(t)) for name in ("running_mean", "running_var")),
    *((_BATCH_NORM, name, None) for name in ("running_mean", "running_var")),
    (_BATCH_NORM, "num_batches_tracked", lambda t: t.int()),
    (_BATCH_NORM, "num_batches_tracked", lambda t: t[:0]),
    (_BATCH_NORM, "total", lambda t: t[:0]),
    ("prefix_mean", "sizes", [1, 6]),
    ("prefix_mean", "sizes", [0]),
    ("prefix_logits", "sizes", [6]),
    ("prefix_logits", "weight", lambda w: w[:2]),
    ("prefix_logits", "weight", lambda w: w[..., :2]),
    ("prefix_logits", "bias", lambda b: b[:, :2]),
    (LOSS, "target", lambda t: t[:1]),
    (LOSS, "target", lambda t: t + 100),
]  # fmt: skip
