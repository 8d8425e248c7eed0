"""Fused CPU, Triton and CUDA kernels for Hierarchical Neural Ensembles.

Features are branch-major and channels-last, ``[branch, batch, height, width, channel]``: a smaller ensemble is a
leading slice of features and weights, and the replication of a branching layer is an index, never a copy.
"""

from . import extension as _extension  # noqa: F401  (loads the compiled ops; must come first)
from .allocator import release_memory
from .checks import default_sizes
from .dispatch import add_module, available_backends, unavailable_backends, use_backend
from .extension import build_info
from .ops.branch_conv2d import branch_conv2d
from .ops.branch_conv2d_moments import branch_conv2d_moments
from .ops.branch_conv2d_stats import branch_conv2d_stats
from .ops.branch_depthwise_conv2d import branch_depthwise_conv2d
from .ops.branch_depthwise_conv2d_stats import branch_depthwise_conv2d_stats
from .ops.branch_normalize import branch_normalize
from .ops.branch_projection import branch_projection, projection_pays
from .ops.branch_residual_conv2d_stats import branch_residual_conv2d_stats
from .ops.fused_bottleneck import fused_bottleneck
from .ops.fused_conv2d import fused_conv2d
from .ops.fused_layers import FusedLayer, FusedLayers
from .ops.hierarchical_distillation_loss import hierarchical_distillation_loss
from .ops.prefix_logits import prefix_logits
from .ops.prefix_mean import prefix_mean
from .packing import pack_weight, unpack_weight

if "triton" in available_backends():
    from . import triton as _triton

    add_module("triton", _triton)

__all__ = [
    "FusedLayer",
    "FusedLayers",
    "available_backends",
    "branch_conv2d",
    "branch_conv2d_moments",
    "branch_conv2d_stats",
    "branch_depthwise_conv2d",
    "branch_depthwise_conv2d_stats",
    "branch_normalize",
    "branch_projection",
    "branch_residual_conv2d_stats",
    "build_info",
    "default_sizes",
    "fused_bottleneck",
    "fused_conv2d",
    "hierarchical_distillation_loss",
    "pack_weight",
    "prefix_logits",
    "prefix_mean",
    "projection_pays",
    "release_memory",
    "unavailable_backends",
    "unpack_weight",
    "use_backend",
]
