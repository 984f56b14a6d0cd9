"""The passes: one technique per file."""

from memopt.passes.amp import AMP as AMP
from memopt.passes.block_swap import BlockSwap as BlockSwap
from memopt.passes.cache_cleanup import CacheCleanup as CacheCleanup
from memopt.passes.channels_last import ChannelsLast as ChannelsLast
from memopt.passes.checkpoint import Checkpoint as Checkpoint
from memopt.passes.fused_attention import FusedAttention as FusedAttention
from memopt.passes.fused_optimizer import FusedOptimizer as FusedOptimizer
from memopt.passes.grad_accumulation import GradAccumulation as GradAccumulation
from memopt.passes.inference_mode import InferenceMode as InferenceMode
from memopt.passes.lean_ops import LeanOps as LeanOps
from memopt.passes.offload_activations import OffloadActivations as OffloadActivations
from memopt.passes.offload_optimizer import OffloadOptimizer as OffloadOptimizer
from memopt.passes.offload_skips import OffloadSkips as OffloadSkips
from memopt.passes.optimizer_8bit import Optimizer8bit as Optimizer8bit
from memopt.passes.optimizer_in_backward import OptimizerInBackward as OptimizerInBackward
from memopt.passes.outer_product import OuterProduct as OuterProduct
from memopt.passes.release import Release as Release
from memopt.passes.set_to_none import SetToNone as SetToNone

__all__ = [
    "AMP",
    "BlockSwap",
    "CacheCleanup",
    "ChannelsLast",
    "Checkpoint",
    "FusedAttention",
    "FusedOptimizer",
    "GradAccumulation",
    "InferenceMode",
    "LeanOps",
    "OffloadActivations",
    "OffloadOptimizer",
    "OffloadSkips",
    "Optimizer8bit",
    "OptimizerInBackward",
    "OuterProduct",
    "Release",
    "SetToNone",
]
