"""memopt makes models fit: composable memory passes for any PyTorch model, applied in place and reversible."""

from memopt import memory as memory
from memopt import passes as passes
from memopt.core import Edit, Handle, apply
from memopt.errors import AlreadyApplied, InputError, MemoptError, NothingToDo, PassConflict, UnknownPass
from memopt.load import load_swapped
from memopt.memory import MemoryReport, profile
from memopt.planning import Plan, plan
from memopt.registry import Claim, Context, Pass, available_passes
from memopt.reports import Report
from memopt.stage import Stage, StageReport, stage
from memopt.tasks import Task, TaskConfig

__version__ = "0.1.0"

__all__ = [
    "AlreadyApplied",
    "Claim",
    "Context",
    "Edit",
    "Handle",
    "InputError",
    "MemoptError",
    "MemoryReport",
    "NothingToDo",
    "Pass",
    "PassConflict",
    "Plan",
    "Report",
    "Stage",
    "StageReport",
    "Task",
    "TaskConfig",
    "UnknownPass",
    "__version__",
    "apply",
    "available_passes",
    "load_swapped",
    "memory",
    "passes",
    "plan",
    "profile",
    "stage",
]
