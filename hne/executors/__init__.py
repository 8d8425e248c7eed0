"""Executors compute the layers of a network: in plain PyTorch, by kernels with gradients, or with folded weights."""

from . import folded_transformer
from .anytime import Anytime
from .base import SubtreeExecutor, SubtreeRunner
from .copy_free import CopyFreeNetwork
from .folded import FoldedExecutor, is_capturing
from .folding import folded_forward, fused_conv, fused_pool_linear, kernel_path, to_fused_layers
from .hook_versions import HookVersions
from .kernels import KernelExecutor
from .naive import NaiveExecutor
from .parameter_versions import ParameterVersions, note_optimizer_step
from .quantized import QuantizedExecutor
from .quantizing import Quantizer, Range, observe
from .session import InferenceSession
from .weight_cache import FoldedWeightCache
