"""The passes: one technique per file."""

from memopt.passes.amp import AMP as AMP
from memopt.passes.cache_cleanup import CacheCleanup as CacheCleanup
from memopt.passes.checkpoint import Checkpoint as Checkpoint
from memopt.passes.set_to_none import SetToNone as SetToNone

__all__ = ["AMP", "CacheCleanup", "Checkpoint", "SetToNone"]
