"""The layers of a network: specs (plain data), modules (parameters of all branches), and the executor's interface."""

from .activations import ACTIVATIONS
from .batch_norm import batch_normalization, count_batch, is_synchronised, running_normalization, uses_batch_statistics
from .bottleneck import Bottleneck, BottleneckLayer
from .conv import Conv, ConvLayer
from .executor import Executor, Features
from .layer import Layer, build_layer
from .parameters import BranchConv, BranchLinear, BranchModule, ConvNorm, Size, called_modules, convolved
from .pool_linear import PoolLinear, PoolLinearLayer
from .spec import LayerSpec, spec_from_config
from .submodules import (
    SkippedModuleError,
    check_kind,
    check_never_called,
    global_hook_dicts,
    has_hooks,
    hook_dicts,
    only_recomputes_parameters,
    warn_of_global_hooks,
)
