"""Fused CPU, Triton and CUDA kernels for Hierarchical Neural Ensembles.

Features are branch-major and channels-last, ``[branch, batch, height, width, channel]``: a smaller ensemble is a
leading slice of features and weights, and the replication of a branching layer is an index, never a copy.
"""

from importlib import metadata as _metadata

from . import extension as _extension  # noqa: F401  (loads the compiled ops; must come first)
from . import flops as _flops
from .allocator import release_memory
from .checks import ACTIVATIONS, autocast_dtype, default_sizes
from .dispatch import BACKENDS, add_module, available_backends, backend_for, unavailable_backends, use_backend
from .dispatch import is_loaded as _is_loaded
from .environment import environment_report
from .extension import build_info
from .lazy import ConvStats, Features, LazyNorm, LazyPointwise, conv_stats, entry_conv_stats, materialize
from .ops.batch_norm_scale_shift import batch_norm_scale_shift
from .ops.branch_conv2d import branch_conv2d
from .ops.branch_depthwise_conv2d import branch_depthwise_conv2d
from .ops.branch_norm_conv2d import branch_norm_conv2d
from .ops.branch_normalize import branch_normalize
from .ops.branch_pointwise_norm_conv2d import branch_pointwise_norm_conv2d
from .ops.branch_pointwise_stats import branch_pointwise_stats
from .ops.fused_bottleneck import fused_bottleneck
from .ops.fused_bottleneck_chain import fused_bottleneck_chain
from .ops.fused_conv2d import fused_conv2d
from .ops.fused_layer import FusedLayer, select_branches
from .ops.fused_layers import FusedLayers, add_member
from .ops.hierarchical_distillation_loss import hierarchical_distillation_loss
from .ops.prefix_logits import prefix_logits
from .ops.prefix_mean import prefix_mean
from .ops.quantized_layers import QuantizedLayers
from .packing import pack_weight, unpack_weight
from .quantized_layer import QuantizedLayer, pack_quantized, pack_quantized_depthwise, pad_last, padded
from .state_record import StateRecord
from .tracing import is_traced

try:
    __version__ = _metadata.version("hne-kernels")
except _metadata.PackageNotFoundError:  # built in place, not installed
    __version__ = str(build_info()["version"])

if _is_loaded("triton"):
    from . import triton as _triton

    add_module("triton", _triton)

_flops.register_when_imported()

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "ConvStats",
    "Features",
    "FusedLayer",
    "FusedLayers",
    "LazyNorm",
    "LazyPointwise",
    "QuantizedLayer",
    "QuantizedLayers",
    "StateRecord",
    "__version__",
    "add_member",
    "autocast_dtype",
    "available_backends",
    "backend_for",
    "batch_norm_scale_shift",
    "branch_conv2d",
    "branch_depthwise_conv2d",
    "branch_norm_conv2d",
    "branch_normalize",
    "branch_pointwise_norm_conv2d",
    "branch_pointwise_stats",
    "build_info",
    "conv_stats",
    "default_sizes",
    "entry_conv_stats",
    "environment_report",
    "fused_bottleneck",
    "fused_bottleneck_chain",
    "fused_conv2d",
    "hierarchical_distillation_loss",
    "is_traced",
    "materialize",
    "pack_quantized",
    "pack_quantized_depthwise",
    "pack_weight",
    "pad_last",
    "padded",
    "prefix_logits",
    "prefix_mean",
    "release_memory",
    "select_branches",
    "unavailable_backends",
    "unpack_weight",
    "use_backend",
]
