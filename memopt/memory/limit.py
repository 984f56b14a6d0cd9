"""A small device, simulated: out-of-memory errors on demand.

``limit("8GiB")`` counts live tensors as the profile does and raises where a device of that size would run out. The
operation itself has run by then (only its result shows how much it wants), but the result is dropped before the error
is raised, so that nothing of it stays in memory or in the traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memopt.errors import InputError
from memopt.memory.ledger import Ledger, Record
from memopt.units import format_bytes, parse_bytes


class limit(Ledger):
    """A context in which tensors must fit into a budget, as on a GPU of that size.

    Storages on other tiers (see ``memopt.memory.moved``) do not count. Allocations inside an operation (workspaces) are
    not seen.

    Args:
        budget: bytes, or a text such as ``"8GiB"``.
        holding: what is on the device already: modules (with their gradients), optimizers, tensors, or containers of
            them. Anything else counts from the moment an operation first uses it.
        rounding: count each storage as a multiple of so many bytes.
        device: the type of the device whose tensors count.

    Raises:
        InputError: the budget is no size, or ``holding`` holds something else.
        torch.OutOfMemoryError: inside the context, with the text that CUDA's has; on entry, if what is held is larger
            than the budget.

    Inside, ``total`` is what is in use, ``peak`` the most there was, in bytes.
    """

    def __init__(self, budget: int | float | str, *holding: Any, rounding: int = 1, device: str = "cpu") -> None:
        super().__init__(rounding=rounding, device=device)
        self.capacity = parse_bytes(budget, "budget")
        self._wanted = 0
        self._most = 0  # that fitted
        self._held = list(_tensors(holding))

    def changed(self, record: Record, change: int) -> None:
        if self.total <= self.capacity:
            self._most = max(self._most, self.total)
        elif change > 0 and record.tier == "device":
            self._wanted += change

    def check(self) -> None:
        if self._wanted:
            wanted, self._wanted = self._wanted, 0
            self.peak = self._most
            used = self.total - wanted
            free = max(0, self.capacity - used)
            show = format_bytes
            if show(wanted) == show(free):  # would look as if it fitted
                show = "{} B".format
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {show(wanted)}. The GPU that memopt.memory.limit simulates has "
                f"a total capacity of {format_bytes(self.capacity)} of which {show(free)} is free. "
                f"{format_bytes(used)} is in use by tensors. "
                + (f"At {self.func}." if self.func else "Before any operation.")
            )

    def __enter__(self) -> Any:
        for tensor in self._held:
            self.see(tensor)
        self._held.clear()
        self.check()
        return super().__enter__()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, nn.Module):
        yield from _tensors([*value.parameters(), *value.buffers()])
    elif isinstance(value, torch.optim.Optimizer):
        yield from _tensors([group["params"] for group in value.param_groups])
        yield from _tensors([list(state.values()) for state in value.state.values()])
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        for item in value:
            yield from _tensors(item)
    elif not isinstance(value, (bool, int, float, str, type(None))):
        raise InputError(
            f"limit can count modules, optimizers, tensors and containers of them, not a {type(value).__name__}"
        )
