"""Where the bytes go: profiles on fake or true tensors, simulated limits, leaks.

The layers, each built on the one before: ``ledger`` counts live storages, ``tracker`` knows what they are for,
``timeline`` replays what happened, ``profiler`` runs a step under the tracker, ``report`` holds the result, ``show``
and ``html`` present it.
"""

from memopt.memory.fit import BatchFit, max_batch
from memopt.memory.ledger import moved
from memopt.memory.limit import limit
from memopt.memory.profiler import Work, profile, profile_work
from memopt.memory.report import CATEGORIES, MemoryReport, ModuleNode, Skip, TensorInfo, Timeline
from memopt.units import format_bytes, parse_bytes

__all__ = [
    "CATEGORIES",
    "BatchFit",
    "MemoryReport",
    "ModuleNode",
    "Skip",
    "TensorInfo",
    "Timeline",
    "Work",
    "format_bytes",
    "limit",
    "max_batch",
    "moved",
    "parse_bytes",
    "profile",
    "profile_work",
]
