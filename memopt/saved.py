"""What stands in place of the tensors that autograd saves, for passes that hook into that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from memopt.tensors import version_of

Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]
Hook = TypeVar("Hook", bound=Callable[..., Any])
Owner = TypeVar("Owner")


_FOR_NOW = WeakIdKeyDictionary()


def hold_for_now(tensor: Tensor) -> None:
    """Tell that a pass holds a tensor in this call until backward, and will not in later ones."""
    _FOR_NOW[tensor] = True


def is_held_for_now(tensor: Tensor) -> bool:
    """Whether a pass does."""
    return tensor in _FOR_NOW


_STEPPED = WeakIdKeyDictionary()


def note_step(parameter: Tensor) -> None:
    """Tell that a parameter was stepped in the backward that runs: whatever depends on it has been asked for before."""
    _STEPPED[parameter] = torch._C._current_graph_task_id()


def check_weight(parameter: Tensor, version: int) -> None:
    """Raise autograd's own error if a parameter was written to, other than by a step in this very backward."""
    if version_of(parameter) != version and _STEPPED.get(parameter) != torch._C._current_graph_task_id():
        check_version(parameter, version)


class Stays:
    """A tensor that is kept. As autograd does where there are no hooks, it minds changes in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.kept = tensor.detach()  # a result itself would keep the graph that keeps it
        self.version = version_of(tensor)

    def tensor(self) -> Tensor:
        """The tensor, unchanged."""
        check_version(self.kept, self.version)
        return self.kept


class Passed:
    """What hooks further out have made of a tensor."""

    def __init__(self, hooks: tuple[Pack, Unpack], tensor: Tensor) -> None:
        pack, self._unpack = hooks
        self._packed = pack(tensor)

    def tensor(self) -> Tensor:
        """The tensor, from these hooks."""
        return self._unpack(self._packed)


def kept_by(tensor: Tensor, outer: tuple[Pack, Unpack] | None) -> Stays | Passed:
    """A tensor as hooks further out want it; where there are none, as it is."""
    return Stays(tensor) if outer is None else Passed(outer, tensor)


def unpack(saved: Any) -> Tensor:
    """The hook that goes with those that pack into objects with a ``tensor()``."""
    tensor: Tensor = saved.tensor()
    return tensor


def check_version(tensor: Tensor, version: int) -> None:
    """Raise autograd's own error if a tensor has been written to since it was saved."""
    if version_of(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} "
            "instead"
        )


def observes(pack: Hook) -> Hook:
    """Mark a hook that only looks, as a profile's does: it needs nothing that others keep themselves."""
    pack.observes = True  # type: ignore[attr-defined]
    return pack


def recomputes(pack: Hook) -> Hook:
    """Mark a hook that stands inside a checkpoint's: what it is given is computed again."""
    pack.recomputes = True  # type: ignore[attr-defined]
    return pack


def hooks_in_force() -> tuple[Pack, Unpack] | None:
    """The innermost hooks on saved tensors that want what they are given."""
    hooks: tuple[Pack, Unpack] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None or getattr(hooks[0], "observes", False) else hooks


def packers() -> Iterator[Any]:
    """The functions that pack what autograd saves here, from the innermost outwards, as far as they pass it on."""
    hooks = hooks_in_force()
    while hooks is not None:
        pack: Any = hooks[0]
        while isinstance(pack, functools.partial):  # a profile looks at what hooks keep
            pack = pack.args[0]
        yield pack
        hooks = getattr(getattr(pack, "__self__", None), "outer", None)


def owners() -> Iterator[Any]:
    """The objects that these functions are methods of; None for one of its own."""
    return (getattr(pack, "__self__", None) for pack in packers())


def owner_in_force(kind: type[Owner]) -> Owner | None:
    """The innermost object of a class that gets what autograd saves here, through others' hooks that pass it on."""
    return next((owner for owner in owners() if isinstance(owner, kind)), None)


def in_checkpoint() -> bool:
    """Whether what autograd saves here is not kept, because a checkpoint will compute it again."""
    home = "torch.utils.checkpoint"
    return any(getattr(pack, "recomputes", False) or getattr(pack, "__module__", "") == home for pack in packers())


def in_selective_checkpoint() -> bool:
    """Whether the checkpoint here has a policy of what it keeps, and makes the rest again once."""
    return any(getattr(owner, "selective", False) for owner in owners())


def hooks_allowed() -> bool:
    """Whether hooks can be put on here: not in transforms of torch.func, nor where somebody has forbidden them."""
    allowed: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return allowed and torch._C._functorch.peek_interpreter_stack() is None
