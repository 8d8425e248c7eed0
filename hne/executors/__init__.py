"""How the layers of a network are computed: plain PyTorch, kernels with gradients, folded weights for inference."""

from .anytime import Anytime
from .base import SubtreeExecutor, SubtreeRunner
from .folded import FoldedExecutor, is_capturing
from .folding import fused_conv, fused_pool_linear, kernel_path, to_fused_layers
from .kernels import KernelExecutor
from .naive import NaiveExecutor
from .parameter_versions import ParameterVersions
from .session import InferenceSession
from .weight_cache import FoldedWeightCache
