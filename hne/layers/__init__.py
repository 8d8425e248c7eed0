"""The layers of a network: specs (plain data), modules (parameters of all branches), and the executor's interface."""

from .activations import ACTIVATIONS
from .basic_block import BasicBlock, BasicBlockLayer
from .batch_norm import batch_normalization, count_batch, is_synchronised, running_normalization, uses_batch_statistics
from .batch_norm_layer import Norm, NormLayer
from .bottleneck import Bottleneck, BottleneckLayer
from .branch_parameters import BranchParameters
from .conv import Conv, ConvLayer
from .dense_bottleneck import DenseBottleneck, DenseBottleneckLayer
from .executor import Executor, Features
from .layer import Layer, build_layer
from .layer_norm import BranchLayerNorm, LayerNorm, LayerNormLayer
from .module import Module, ModuleLayer
from .narrow import narrow, narrow_layer
from .parameters import (
    BatchNormModule,
    BranchConv,
    BranchLinear,
    BranchModule,
    BranchNorm,
    ConvNorm,
    Size,
    called_modules,
    convolved,
)
from .patch_embedding import BranchEmbedding, PatchEmbedding, PatchEmbeddingLayer
from .pool_linear import PoolLinear, PoolLinearLayer
from .pooling import AveragePool, AveragePoolLayer, MaxPool, MaxPoolLayer
from .preactivation import PreActivation, PreActivationLayer
from .select_token import SelectToken, SelectTokenLayer
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
from .transformer import BranchScale, TransformerBlock, TransformerBlockLayer
