"""The layers of a network: specs (plain data), modules (parameters of all branches), and the executor's interface."""

from .activations import ACTIVATIONS
from .batch_norm import batch_normalization, count_batch, is_synchronised, running_normalization, uses_batch_statistics
from .executor import Executor, Features
from .modules import BottleneckLayer, ConvLayer, Layer, PoolLinearLayer, build_layer
from .parameters import BranchLinear, BranchModule, ConvNorm, Size, called_modules
from .specs import Bottleneck, Conv, LayerSpec, PoolLinear, spec_from_config
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
