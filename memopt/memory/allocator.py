"""The allocator's own account of a step: an independent witness for what the tracker counts.

torch's profiler writes down every block that the allocator gives out and takes back, those that C++ asks for inside an
operator included, and no dispatch mode is active that could change what runs. The tracker sees the tensors that
operators take and return. Between the two lies *scratch*: what an operator allocates and frees inside itself, such as
the reordered weights of oneDNN's convolutions or the workspaces of cuDNN's. It is told apart here: a block is scratch
if it is freed before the operator ends that it was allocated in. An operator in this sense is what a dispatch mode sees
as one; those that torch takes apart before that (``linear``, ``conv2d``) are not.

So ``start + tensors`` is what the tracker should find, and ``peak - (start + tensors)`` is what it cannot see.

On CUDA the same events come from the caching allocator, whose blocks count as large as they are. What was allocated
before the step and belongs to none of the given tensors is counted apart: cuBLAS keeps its workspaces there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler


@dataclass(frozen=True)
class AllocatorPeak:
    """What the allocator gave out during a step. All figures are bytes."""

    start: int
    """Of the storages of the tensors that were there before."""
    library: int
    """Allocated before the step and in none of these tensors; known on CUDA only, else 0."""
    growth: int
    """The most at once during the step, over what was there before."""
    tensors: int
    """The same without scratch."""
    peak_op: str
    """The operator that ran when the most was allocated; empty if none did."""
    scratch_at_peak: int
    """Of the growth, the scratch of that operator."""
    scratch: Mapping[str, int]
    """For each operator that has scratch, the most that one call of it had at once, largest first."""

    @property
    def peak(self) -> int:
        """The most at once, with what was there before and without ``library``."""
        return self.start + self.growth


def allocator_peak(step: Callable[[], object], held: Iterable[Tensor], *, device: str = "cpu") -> AllocatorPeak:
    """Run a step under torch's profiler and read the allocator's events.

    Run it once before: what a first step leaves behind (optimizer states, workspaces) is no growth of the second.

    Args:
        step: what to run. It must not free what was there before: such blocks are not among the events.
        held: the tensors that are there before (parameters, buffers, optimizer states, inputs), in any order.
        device: the type of the device to account for.
    """
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held if t.device.type == device}
    if device == "cuda":
        torch.cuda.synchronize()
        start = sum(-(-size // 512) * 512 for size in storages.values())
        library = torch.cuda.memory_allocated() - start
    else:
        start, library = sum(storages.values()), 0
    with profiler(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    results = watched.profiler.kineto_results
    blocks = sorted(_blocks(results.experimental_event_tree(), device, None), key=lambda block: block.time)
    return _account(blocks, start, library)


@dataclass
class _Call:
    """One call of an operator."""

    name: str
    end: int


@dataclass
class _Block:
    """A block is given out (bytes > 0) or taken back (< 0)."""

    time: int
    address: int
    bytes: int
    call: _Call | None


def _blocks(events: Any, device: str, call: _Call | None) -> Iterator[_Block]:
    """The allocator's events in a forest of profiler events, each with the operator that it belongs to."""
    stack = [(event, call) for event in events]
    while stack:
        event, call = stack.pop()
        fields = event.extra_fields
        if hasattr(fields, "alloc_size"):
            if fields.device.type == device:
                yield _Block(event.start_time_ns, fields.ptr, fields.alloc_size, call)
            continue
        if call is None and _is_one(event.name):
            call = _Call(event.name.replace("::", "."), event.end_time_ns)
        stack.extend((child, call) for child in event.children)


@functools.cache
def _is_one(name: str) -> bool:
    """Whether a dispatch mode sees an operator of this name as one: torch does not take all its overloads apart."""
    if "::" not in name or name.startswith(("autograd::", "torch::autograd::")):
        return False
    composite = [
        torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd")
        for schema in torch._C._jit_get_schemas_for_operator(name)
        if torch._C._dispatch_has_kernel(full := f"{name}.{schema.overload_name}".rstrip("."))
        and "out" not in schema.overload_name
    ]
    return bool(composite) and not all(composite)


def _account(blocks: list[_Block], start: int, library: int) -> AllocatorPeak:
    given: dict[int, int] = {}
    scratch: set[int] = set()
    known: list[tuple[int, _Block]] = []  # each event with the index of the one that gave the block out
    for i, block in enumerate(blocks):
        if block.bytes > 0:
            given[block.address] = i
            known.append((i, block))
        elif (origin := given.pop(block.address, None)) is not None:
            known.append((origin, block))
            call = blocks[origin].call
            if call is not None and block.time <= call.end:
                scratch.add(origin)
    total = inside = growth = tensors = 0
    peak_op, scratch_at_peak = "", 0
    running: _Call | None = None
    most: dict[str, int] = {}
    for origin, block in known:
        size = blocks[origin].bytes
        change = size if block.bytes > 0 else -size
        total += change
        if origin in scratch:
            inside += change
            running = blocks[origin].call
            if running is not None:
                most[running.name] = max(most.get(running.name, 0), inside)
        tensors = max(tensors, total - inside)
        if total > growth:
            growth, scratch_at_peak = total, inside
            peak_op = block.call.name if block.call is not None else ""
    return AllocatorPeak(
        start=start,
        library=library,
        growth=growth,
        tensors=tensors,
        peak_op=peak_op,
        scratch_at_peak=scratch_at_peak,
        scratch=dict(sorted(most.items(), key=lambda item: -item[1])),
    )
