"""The ops in plain PyTorch, the baseline of the parity tests and of the benchmarks.

Differentiable by autograd, for any device and dtype that PyTorch's own operators serve.
"""

from .batch_norm_scale_shift import batch_norm_scale_shift
from .branch_conv2d import branch_conv2d
from .branch_depthwise_conv2d import branch_depthwise_conv2d
from .branch_norm_conv2d import branch_norm_conv2d
from .branch_normalize import branch_normalize
from .fused_bottleneck import fused_bottleneck
from .fused_bottleneck_chain import fused_bottleneck_chain
from .fused_conv2d import fused_conv2d
from .hierarchical_distillation_loss import hierarchical_distillation_loss
from .prefix_logits import prefix_logits
from .prefix_mean import prefix_mean

__all__ = [
    "batch_norm_scale_shift",
    "branch_conv2d",
    "branch_depthwise_conv2d",
    "branch_norm_conv2d",
    "branch_normalize",
    "fused_bottleneck",
    "fused_bottleneck_chain",
    "fused_conv2d",
    "hierarchical_distillation_loss",
    "prefix_logits",
    "prefix_mean",
]
