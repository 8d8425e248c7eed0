"""Fused CPU, Triton and CUDA kernels for Hierarchical Neural Ensembles.

Features are branch-major and channels-last, ``[branch, batch, height, width, channel]``: a smaller ensemble is a
leading slice of features and weights, and the replication of a branching layer is an index, never a copy.
"""

from . import extension as _extension  # noqa: F401  (loads the compiled ops; must come first)
from .branch_conv2d import branch_conv2d
from .branch_conv2d_moments import branch_conv2d_moments
from .branch_conv2d_stats import branch_conv2d_stats
from .branch_depthwise_conv2d import branch_depthwise_conv2d
from .branch_depthwise_conv2d_stats import branch_depthwise_conv2d_stats
from .branch_normalize import branch_normalize
from .branch_projection import branch_projection, projection_pays
from .branch_residual_conv2d_stats import branch_residual_conv2d_stats
from .checks import default_sizes
from .dispatch import add_module, available_backends, unavailable_backends, use_backend
from .extension import build_info
from .fused_bottleneck import fused_bottleneck
from .fused_conv2d import fused_conv2d
from .fused_layers import FusedLayer, FusedLayers
from .hierarchical_distillation_loss import hierarchical_distillation_loss
from .memory import release_memory
from .packing import pack_weight, unpack_weight
from .prefix_logits import prefix_logits
from .prefix_mean import prefix_mean

if "triton" in available_backends():
    from . import triton as _triton  # last: its ops take their shapes and autograd from the modules above

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
