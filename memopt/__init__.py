"""memopt makes models fit: composable memory passes for any PyTorch model, applied in place and reversible."""

from memopt import passes as passes
from memopt.core import Claim, Context, Edit, Handle, Pass, Report, apply, available_passes
from memopt.errors import AlreadyApplied, InputError, MemoptError, NothingToDo, PassConflict, UnknownPass

__version__ = "0.1.0"

__all__ = [
    "AlreadyApplied",
    "Claim",
    "Context",
    "Edit",
    "Handle",
    "InputError",
    "MemoptError",
    "NothingToDo",
    "Pass",
    "PassConflict",
    "Report",
    "UnknownPass",
    "__version__",
    "apply",
    "available_passes",
    "passes",
]
