"""One call of a block whose activations are recomputed: its forward, and a recomputation for each backward.

Around torch's non-reentrant checkpoint, which drops what autograd saves and runs the block again, this takes care of
what torch leaves to the caller; `passes/checkpoint.py` says what that is.

What is there anyway, the block's weights and inputs, is saved as if there were no checkpoint, by hooks inside of it.
So a recomputation ends with the last tensor that it has to make: a residual block whose last operation is a 1x1
convolution of its input is recomputed up to the input of the convolution before.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_unflatten
from torch.utils.checkpoint import checkpoint

from memopt.policies import Keeps
from memopt.replay import Replay
from memopt.saved import Pack, Passed, Unpack, hold_for_now, hooks_in_force, kept_by, recomputes, unpack
from memopt.selective import Record
from memopt.tensors import is_memory, storage_of, unseen, version_of


class Run:
    """One call of a block: its forward first, then a recomputation for each backward.

    The forward gets the very arguments of the call, so that lists and dicts it writes to are the caller's; a
    recomputation gets new containers with what was in them before the call.

    Args:
        module: the block.
        inner: its forward.
        arguments: what it is called with, positional and by keyword.
        leaves: the same, flattened.
        spec: how to put them together again.
        keeps: which results are kept; None: none.
    """

    def __init__(
        self,
        module: nn.Module,
        inner: Callable[..., Any],
        arguments: Any,
        leaves: Sequence[Any],
        spec: Any,
        keeps: Keeps | None = None,
    ) -> None:
        self.module, self.inner, self.spec = module, inner, spec
        self.arguments: Any = arguments  # until the forward is done
        self.leaves: Sequence[Any] = leaves  # until then, too
        self.began = False
        """Whether forward has: what is computed from then on, perhaps for gradients that it takes itself, is again."""
        self.mutated: frozenset[int] = frozenset()
        """Which of the leaves the block changes in place, so that copies of them are kept."""
        self.replay: Replay | None = None  # the module as it was when the forward began
        self.record = Record(keeps) if keeps is not None else None
        self.saves = _Saves(self.record, hooks_in_force())
        self.joined: dict[int, _Joined] = {}

    def __call__(self, *leaves: Any) -> Any:
        return self.recompute(leaves[len(self.joined) :]) if self.began else self.forward()

    def checkpointed(self, leaves: Sequence[Any]) -> Any:
        """A call of a block of which is known what it changes."""
        given = self.copied(leaves)
        devices = []
        for i, joined in self.joined.items():
            given[i] = None
            devices.append(torch.empty(0, device=joined.like[1]))  # whose random state torch shall restore
        return checkpoint(self, *devices, *given, use_reentrant=False)

    def keep_in_parts(self) -> None:
        """Keep those inputs in parts that share them with others' inputs."""
        outside = self.saves.outside
        for i, leaf in enumerate(self.leaves):
            if i in self.mutated or not isinstance(leaf, Tensor) or leaf.grad_fn is None:
                continue
            joined = _Joined.of(leaf, outside)
            if joined is not None and not any(other is leaf for other in self.leaves[:i]):
                self.joined[i] = self.saves.joined[storage_of(leaf)] = joined
            elif (id(leaf.grad_fn), leaf.output_nr) not in _INPUTS:
                self.saves.inputs.append(_Input(leaf, outside))
                _INPUTS[id(leaf.grad_fn), leaf.output_nr] = self.saves.inputs[-1]

    def copied(self, leaves: Sequence[Any]) -> list[Any]:
        """The flattened arguments, with copies of those that the block changes."""
        return [leaf.clone() if i in self.mutated else _copy_cache(leaf) for i, leaf in enumerate(leaves)]

    def forward(self) -> Any:
        self.began = True
        with unseen():
            self.replay = Replay(self.module, writes=True, given=self.leaves)
            self.saves.begin([p for _, held in self.replay.held for p in held.values() if p is not None], self.leaves)
        args, kwargs = self.arguments
        with self.record.keeping() if self.record is not None else contextlib.nullcontext(), self.saves.forward():
            output = self.inner(*args, **kwargs)
        with unseen():
            self.saves.end()
            self.replay.ran()
        self.arguments, self.leaves = None, ()
        return output

    def recompute(self, leaves: Sequence[Any]) -> Any:
        given = self.copied(leaves)
        for i, joined in self.joined.items():
            given[i] = joined.whole().detach().requires_grad_()
        args, kwargs = tree_unflatten(given, self.spec)
        assert self.replay is not None
        with (
            self.replay.again(),
            self.record.handing() if self.record is not None else contextlib.nullcontext(),
            self.saves.again(),
        ):
            return self.inner(*args, **kwargs)

    def tried(self, leaves: Sequence[Any]) -> Any:
        """The first call of a block inside another's checkpoint, which must save what later calls do: the block is run
        once for nothing before, to learn which inputs it changes."""
        copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else _copy_cache(leaf) for leaf in leaves]
        devices = {leaf.device for leaf in copies if isinstance(leaf, Tensor) and leaf.is_cuda}
        args, kwargs = tree_unflatten(copies, self.spec)
        quiet = self.record.unseen() if self.record is not None else contextlib.nullcontext()
        replay = Replay(self.module, writes=True, given=leaves)
        with torch.no_grad(), torch.random.fork_rng(devices), quiet, replay.again():
            self.inner(*args, **kwargs)
        changed = [isinstance(leaf, Tensor) and leaf._version > 0 for leaf in copies]
        self.mutated = frozenset(i for i, was in enumerate(changed) if was)
        return self.checkpointed(leaves)

    def watched(self, leaves: list[Any]) -> Any:
        """The first call of a block in one way: learn whether it changes its inputs in place."""
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not leaf.is_inference()}
        copies = {i: t.clone() for i, t in tensors.items()}
        before = {i: t._version for i, t in tensors.items()}
        kept = self.copied(leaves)
        for leaf in tensors.values():
            hold_for_now(leaf)
        after: dict[int, int] = {}

        def run(*_: Any) -> Any:
            if self.began:
                if any(kept[i]._version != version for i, version in after.items()):
                    raise RuntimeError(
                        f"checkpoint: an input of a {type(self.module).__name__} was changed in place after the block "
                        "had run, or before it took a gradient itself, so it cannot be recomputed. Leave this block "
                        "out with Checkpoint(blocks=...)."
                    )
                return self.recompute(kept)
            after.update(before)
            output = self.forward()
            self.mutated = frozenset(i for i, t in tensors.items() if t._version != before[i])
            places = [tensors[i].untyped_storage()._cdata for i in self.mutated]
            if len(set(places)) < len(places):  # separate copies would not change together
                raise RuntimeError(
                    f"checkpoint: a {type(self.module).__name__} changes an input in place that shares memory with "
                    "another of its inputs. Leave this block out with Checkpoint(blocks=...)."
                )
            for i in self.mutated:
                kept[i] = copies[i]
            after.update({i: kept[i]._version for i in tensors})
            copies.clear()  # the graph keeps this closure: let it hold `kept` alone
            tensors.clear()
            return output

        # The tensors stay hidden in `kept`: those handed to torch could not be exchanged for copies any more. Empty
        # ones tell torch which devices' random state to restore.
        devices = {t.device for t in tensors.values()}
        return checkpoint(run, *[torch.empty(0, device=device) for device in devices], use_reentrant=False)


class _Saves:
    """Hooks on what autograd saves in a block, inside those of torch's checkpoint.

    Weights and inputs are saved as without a checkpoint: by the hooks further out, or as they are. Which of the tensors
    that autograd saves these are, counted in order, holds for the recomputation, which drops them.
    """

    def __init__(self, record: Record | None, outer: tuple[Pack, Unpack] | None) -> None:
        self.record, self.outside, self.selective = record, outer, record is not None
        self.inputs: list[_Input] = []
        self.joined: dict[int, _Joined] = {}  # of these storages only parts are kept
        self.there: dict[int, int] = {}  # storages that are there anyway, with the versions of inputs
        self.anyway: list[bool] = []
        self.at = 0
        self.dropping: tuple[Pack, Unpack] | None = None  # torch's hooks

    def begin(self, weights: Sequence[Tensor], leaves: Sequence[Any]) -> None:
        """What is there anyway when forward begins."""
        self.there = {storage_of(weight): -1 for weight in weights}
        if self.record is not None:
            self.record.weights = frozenset(self.there)
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self.there[storage_of(leaf)] = version_of(leaf)
        self.there.pop(0, None)

    def end(self) -> None:
        """Forward is done."""
        self.there, self.joined, self.dropping = {}, {}, None
        if self.record is not None:
            self.record.close()

    def forward(self) -> saved_tensors_hooks:
        self.dropping = hooks_in_force()
        return saved_tensors_hooks(self.pack, unpack)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        before = self.at, self.dropping  # a forward that takes gradients itself goes on
        self.at, self.dropping = 0, hooks_in_force()
        try:
            with saved_tensors_hooks(self.pack_again, _same):
                yield
        finally:
            self.at, self.dropping = before

    @recomputes
    def pack(self, tensor: Tensor) -> Any:
        version = self.there.get(storage_of(tensor))
        there = version is not None and version in (-1, version_of(tensor))
        self.anyway.append(there)
        with self.record.unseen() if self.record is not None else contextlib.nullcontext():
            if there:
                joined = self.joined.get(storage_of(tensor))
                if joined is not None:
                    return _Seen(joined, tensor)
                saved = kept_by(tensor, self.outside)
                return _Held(saved, self.inputs) if version != -1 else saved
            if self.record is not None:
                self.record.ask()
            assert self.dropping is not None
            return Passed(self.dropping, tensor)

    @recomputes
    def pack_again(self, tensor: Tensor) -> Any:
        at = self.at
        self.at += 1
        if at < len(self.anyway) and self.anyway[at]:
            return tensor.detach()
        assert self.dropping is not None
        return self.dropping[0](tensor)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Input:
    """A tensor that a block was called with, kept for its recomputation; lives as long as that may come."""

    def __init__(self, tensor: Tensor, outside: tuple[Pack, Unpack] | None) -> None:
        self.node = tensor.grad_fn  # where it comes from; while it lives no other node has its id
        self.shape, self.like = tensor.shape, (tensor.dtype, tensor.device)
        self._saved = kept_by(tensor, outside)

    def tensor(self) -> Tensor:
        tensor: Tensor = self._saved.tensor()
        return tensor


_INPUTS: weakref.WeakValueDictionary[tuple[int, int], _Input] = weakref.WeakValueDictionary()
"""Inputs by where in autograd's graph they come from."""


class _Joined:
    """An input that a model made by concatenation with a skip connection, kept as its parts.

    The encoder's block keeps the skip connection, as its own input. So only what it was joined with is kept here, and
    the whole is made again in backward, with the layout that it had.
    """

    def __init__(self, tensor: Tensor, dim: int, parts: list[Any], sizes: list[int]) -> None:
        self.dim, self.parts, self.sizes = dim, parts, sizes
        self.size, self.stride, self.like = tensor.shape, tensor.stride(), (tensor.dtype, tensor.device)
        self.made: Tensor | None = None

    @staticmethod
    def of(tensor: Tensor, outside: tuple[Pack, Unpack] | None) -> _Joined | None:
        """The parts of a tensor; None if it is no concatenation with something that is kept."""
        node: Any = tensor.grad_fn
        if node is None or node.name() != "CatBackward0" or tensor._version or tensor._is_view():
            return None
        if not is_memory(tensor) or tensor.untyped_storage().nbytes() != tensor.nbytes:
            return None
        dim = node._saved_dim - (1 << 64 if node._saved_dim >= 1 << 63 else 0)
        dim %= tensor.dim()
        parts = [_INPUTS.get((id(origin), number)) for origin, number in node.next_functions]
        rest = tuple(tensor.shape[:dim]), tuple(tensor.shape[dim + 1 :])
        known = [part for part in parts if part is not None]
        if any((tuple(p.shape[:dim]), tuple(p.shape[dim + 1 :])) != rest or p.like[0] != tensor.dtype for p in known):
            return None
        left = tensor.shape[dim] - sum(part.shape[dim] for part in known)
        if not known or len(parts) - len(known) > 1 or left < 0 or (left > 0) != (len(parts) > len(known)):
            return None
        sizes = [left if part is None else int(part.shape[dim]) for part in parts]
        own = [
            kept_by(piece.clone(), outside) if part is None else part
            for part, piece in zip(parts, tensor.detach().split(sizes, dim), strict=True)
        ]
        return _Joined(tensor, dim, own, sizes)

    def whole(self) -> Tensor:
        """The input, made when it is first asked for."""
        if self.made is None:
            with torch.no_grad():
                made = torch.empty_strided(self.size, self.stride, dtype=self.like[0], device=self.like[1])
                for place, part in zip(made.split(self.sizes, self.dim), self.parts, strict=True):
                    place.copy_(part.tensor())
            self.made = made
        return self.made


class _Seen:
    """A view of a joined input, as autograd saved it."""

    def __init__(self, joined: _Joined, tensor: Tensor) -> None:
        self.joined, self.geometry = joined, (tensor.shape, tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        with torch.no_grad():
            return self.joined.whole().as_strided(*self.geometry)


class _Held:
    """An input, as autograd saved it."""

    def __init__(self, saved: Any, inputs: list[_Input]) -> None:
        self.saved, self.inputs = saved, inputs  # others may count on these, also where nothing is computed again

    def tensor(self) -> Tensor:
        tensor: Tensor = self.saved.tensor()
        return tensor


def _copy_cache(leaf: Any) -> Any:
    """A copy of a transformers key-value cache that shares its tensors; anything else as it is.

    Language models in train mode hand one to their blocks, which append to it: a recomputation must find it, and leave
    it, as it was.
    """
    if not any(c.__name__ == "Cache" and c.__module__.startswith("transformers.") for c in type(leaf).__mro__):
        return leaf
    twin = copy.copy(leaf)
    for name, value in vars(leaf).items():
        if isinstance(value, list):
            setattr(twin, name, [copy.copy(layer) for layer in value])
        elif isinstance(value, dict):
            setattr(twin, name, dict(value))
        else:
            setattr(twin, name, _copy_cache(value))
    return twin
