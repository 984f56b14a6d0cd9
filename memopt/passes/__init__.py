"""The passes: one technique per file."""

from memopt.passes.amp import AMP as AMP
from memopt.passes.block_swap import BlockSwap as BlockSwap
from memopt.passes.cache_cleanup import CacheCleanup as CacheCleanup
from memopt.passes.checkpoint import Checkpoint as Checkpoint
from memopt.passes.fused_attention import FusedAttention as FusedAttention
from memopt.passes.offload_activations import OffloadActivations as OffloadActivations
from memopt.passes.offload_skips import OffloadSkips as OffloadSkips
from memopt.passes.outer_product import OuterProduct as OuterProduct
from memopt.passes.release import Release as Release
from memopt.passes.set_to_none import SetToNone as SetToNone

__all__ = [
    "AMP",
    "BlockSwap",
    "CacheCleanup",
    "Checkpoint",
    "FusedAttention",
    "OffloadActivations",
    "OffloadSkips",
    "OuterProduct",
    "Release",
    "SetToNone",
]
