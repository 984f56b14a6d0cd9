"""What autograd keeps for backward waits in host memory or in files, and comes back just before it is used.

Saved-tensor hooks around forward hand every tensor that autograd saves to a mover (memopt.transfer). A storage that
several operations save, as several views, moves once. Parameters, buffers and what the caller gave the model stay: they
are on the device anyhow. Backward uses what was saved last first, so with each tensor that it asks for the next ones
before it set out, too.

What a checkpoint keeps is its blocks' inputs, and these are saved where the hooks see them; what a checkpoint computes
again is not kept at all.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from memopt.core import Edit
from memopt.errors import InputError
from memopt.registry import Claim, Context, Pass, matching_modules
from memopt.tensors import PLAIN, storage_of, version_of
from memopt.transfer import Mover, Parked
from memopt.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class OffloadActivations(Pass):
    """Tensors that autograd keeps for backward wait off the device: in host memory or on disk."""

    name = "offload_activations"
    stage = "wrap"
    exact = True
    modes = frozenset({"train"})
    needs = "a model that is trained; with blocks=PATTERN, modules of such names"

    to: Literal["cpu", "disk"] = "cpu"
    """Where they wait."""
    blocks: str = ""
    """Only what the outermost modules whose names match this pattern keep; empty: the whole model."""
    min_bytes: int | str = "1MiB"
    """Smaller storages stay: moving them costs more than it gains."""
    prefetch: int = 1
    """How many storages set out before they are asked for."""
    folder: str | None = None
    """Where files are kept (disk); by default the system's folder for temporary files."""
    compress: Literal["bf16", "fp8"] | None = None
    """Round floating-point values on the way; not exact."""

    def __post_init__(self) -> None:
        parse_bytes(self.min_bytes)
        if isinstance(self.prefetch, bool) or self.prefetch < 0:
            raise InputError(f"offload_activations: prefetch must be at least 0, not {self.prefetch!r}")
        try:
            self._mover()
        except InputError as error:
            raise InputError(f"offload_activations: {error}") from None
        object.__setattr__(self, "exact", self.compress is None)

    def _mover(self) -> Mover:
        return Mover(self.to, folder=self.folder, compress=self.compress)

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        if not self.blocks:
            return [Claim("", "activations", "saved tensors")] if any(True for _ in model.parameters()) else []
        # Hooks inside a checkpoint's would keep what it means to compute again.
        return [Claim(path, "activations", "activations") for path in matching_modules(model, self.blocks)]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        mover, counts, least, blocks = self._mover(), edit.counts, parse_bytes(self.min_bytes), self.blocks

        def around(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _has_no_use():
                return inner(*args, **kwargs)
            # What the caller gave the model is on the device anyhow; what a block is given is an activation.
            held = [*module.parameters(), *module.buffers(), *(() if blocks else tree_leaves((args, kwargs)))]
            tape = _Tape(mover, {storage_of(x) for x in held if isinstance(x, Tensor)}, least, self.prefetch, counts)
            with saved_tensors_hooks(tape.pack, _unpack):
                return inner(*args, **kwargs)

        for claim in claims:
            edit.wrap(edit.module(claim.path), "forward", around)


class _Tape:
    """What one forward saved, in order."""

    def __init__(self, mover: Mover, held: set[int], least: int, prefetch: int, counts: Any) -> None:
        self.mover, self.held, self.least, self.prefetch, self.counts = mover, held, least, prefetch, counts
        self.order: list[weakref.ref[_Away]] = []
        self.lock = threading.RLock()
        """Autograd has a thread for each device, and users may have more."""
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[_Away]]] = {}

    def pack(self, tensor: Tensor) -> Any:
        """What stands for a tensor until backward: a view of what is away, or itself."""
        if type(tensor) not in PLAIN or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            return _Stays(tensor)
        if tensor.device.type == "meta" or tensor.is_conj() or tensor.is_neg() or tensor.numel() == 0:
            return _Stays(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata in self.held or storage.nbytes() < self.least:
            return _Stays(tensor)
        size, start = tensor.dtype.itemsize, int(tensor.storage_offset())
        stop = start + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        if storage.nbytes() % size or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
            return _Stays(tensor)
        if 2 * (stop - start) * size >= storage.nbytes() and self.mover.compress != "fp8":  # one scale for all of it
            start, stop = 0, storage.nbytes() // size
        elif (stop - start) * size < self.least:
            return _Stays(tensor)
        key = (storage._cdata, tensor.dtype, start, stop, version_of(tensor))
        known = None if tensor.is_inference() else self._known.get(key)
        away = known[1]() if known is not None and not known[0].expired() else None
        if away is None:
            flat = tensor.detach().as_strided((stop - start,), (1,), start)
            away = _Away(self, flat)
            self._known[key] = StorageWeakRef(storage), weakref.ref(away)
        return _Saved(away, tensor, start)


def _has_no_use() -> bool:
    """In a checkpoint around the model, which will compute all again, and in transforms, which take no hooks."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _unpack(saved: Any) -> Tensor:
    tensor: Tensor = saved.tensor()
    return tensor


class _Stays:
    """A tensor that is not moved. As autograd does where there are no hooks, it minds changes in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.kept = tensor.detach()  # a result itself would keep the graph that keeps it
        self.version = version_of(tensor)

    def tensor(self) -> Tensor:
        """The tensor, unchanged."""
        if version_of(self.kept) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.kept.type()} {list(self.kept.shape)}] is at version {self.kept._version}; expected version "
                f"{self.version} instead"
            )
        return self.kept


class _Away:
    """A storage, or a part of one, that is away."""

    def __init__(self, tape: _Tape, flat: Tensor) -> None:
        with torch.no_grad():
            self.parked: Parked = tape.mover.out(flat)
        tape.counts["storages moved out"] += 1
        tape.counts["bytes moved out"] += flat.nbytes
        self.tape, self.index = tape, len(tape.order)
        tape.order.append(weakref.ref(self))
        self.near: Tensor | None = None
        self.waiting: weakref.WeakSet[_Saved] = weakref.WeakSet()
        """The views of it that backward has yet to ask for."""
        self.asked: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def get(self, view: _Saved) -> Tensor:
        """The storage's content on the device. It stays for as long as another view of it will be asked for."""
        if self.near is None:
            self.near = self.parked.get()
        flat = self.near
        self.parked.share(flat)
        ahead, index = 0, self.index
        while index and ahead < self.tape.prefetch:
            index -= 1
            other = self.tape.order[index]()
            if other is not None:
                ahead += 1
                if other.near is None:
                    other.parked.fetch()
        self.waiting.discard(view)
        self.asked.add(view)
        if not self.waiting:  # the next backward through a retained graph begins anew
            self.near = None
            self.waiting, self.asked = self.asked, self.waiting
        return flat


class _Saved:
    """What autograd keeps in place of a tensor."""

    def __init__(self, away: _Away, tensor: Tensor, start: int) -> None:
        self.away = away
        self.size, self.stride, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset() - start
        away.waiting.add(self)

    def tensor(self) -> Tensor:
        """The tensor that autograd saved."""
        with torch.no_grad(), self.away.tape.lock:
            return self.away.get(self).as_strided(self.size, self.stride, self.offset)
