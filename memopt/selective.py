"""A recomputation that is handed some results rather than computing them.

Two dispatch modes share a record of one forward. In forward, :class:`Keep` notes each operation and keeps the results
that a policy names. In a recomputation :class:`Hand` compares: as long as the same operations come in the same order,
and are given what the same operations made, it hands out what was kept. Where they do not, as after something that
forward made for good for several blocks, it computes all the rest. So what is kept saves time, and is never the result
of another operation.

torch has such modes (``create_selective_checkpoint_contexts``); they are used under torch.compile, which knows them. In
eager mode they allow one backward only, keep what no recomputation asks for, fail where an operation comes once more or
a kept result was changed in place, and draw other random numbers after a kept operation that draws some.

* What a recomputation never gets to is not kept: it ends with the last tensor that autograd saved.
* A kept result is let go of once handed out, unless the graph is retained.
* Views, operations in place and those with a generator are always done again. A kept result that was changed in place
  is computed again, also where it was changed by another name that counts changes for itself (`matmul`, RNNs' gates).
* After a kept operation that drew random numbers, the state of the generator is set to what it was then.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._python_dispatch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from memopt.policies import Keeps
from memopt.tensors import storage_of, version_of

_PASSED_OVER = frozenset({torch.ops.aten.detach.default, torch.ops.prim.device.default})
"""Operations that torch's checkpoint does itself."""
_UNCOUNTED = frozenset({torch.ops.aten._to_copy.default})
"""Autocast casts a weight once for several uses, a recomputation for each."""


class Record:
    """What one forward did, and what is kept of it.

    Args:
        keeps: the policy.
    """

    def __init__(self, keeps: Keeps) -> None:
        self.keeps = keeps
        self.weights: frozenset[int] = frozenset()
        """Storages that are the same in forward and recomputation."""
        self.steps: list[Any] = []  # an operator, or a _Result
        self.quiet = False
        self.asked = 0
        """How many steps a recomputation needs."""

    def keeping(self) -> TorchDispatchMode:
        """The mode for forward."""
        return Keep(self)

    def handing(self) -> TorchDispatchMode:
        """The mode for a recomputation."""
        return Hand(self)

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """What is done inside is no part of forward."""
        self.quiet, before = True, self.quiet
        try:
            yield
        finally:
            self.quiet = before

    def ask(self) -> None:
        """Say that autograd saves what a recomputation has to make."""
        self.asked = len(self.steps)

    def close(self) -> None:
        """Forward is done: let go of what will not be asked for, or has changed."""
        del self.steps[self.asked :]
        for i, step in enumerate(self.steps):
            if isinstance(step, _Result) and step.changed:
                self.steps[i] = step.op


class _Result:
    """A kept result."""

    def __init__(self, op: Any, given: list[Any], out: Any, random: Tensor | None) -> None:
        self.op, self.given, self.random = op, given, random
        leaves, self.spec = tree_flatten(out)
        # Detached: torch gives the result itself a history, which would keep the graph that keeps it.
        self.leaves = [_detached(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.versions = [(leaf, version_of(leaf)) for leaf in self.leaves if isinstance(leaf, Tensor)]

    def also(self, tensor: Tensor) -> None:
        """Mind changes of another tensor, too."""
        self.versions.append((_detached(tensor), version_of(tensor)))

    @property
    def changed(self) -> bool:
        return any(version_of(tensor) != version for tensor, version in self.versions)

    def value(self) -> Any:
        if self.random is not None:
            _set_random_state(self.leaves[0].device, self.random)
        return tree_unflatten([_detached(x) if isinstance(x, Tensor) else x for x in self.leaves], self.spec)


class _Mode(TorchDispatchMode):
    """What both have in common: they know where a tensor comes from."""

    supports_higher_order_operators = True

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record, self.at = record, 0
        self.origins: dict[int, int] = {}  # of storages: the operation that made them or wrote to them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        if self.record.quiet or kind.passed_over:
            return func(*args, **kwargs)
        if kind.counts:
            out = self.step(func, kind, args, kwargs)
            self.at += 1
        else:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self.origins[storage_of(out)] = self.at
        else:
            self.origins.update((storage_of(x), self.at) for x in tree_leaves(out) if isinstance(x, Tensor))
        return out

    def step(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        """Do, or hand out the result of, an operation that counts."""
        raise NotImplementedError

    def given(self, args: Any) -> list[Any]:
        """What an operation is given: for each tensor its shape and where it comes from."""
        weights = self.record.weights
        places = [(arg.shape, storage_of(arg)) for arg in args if isinstance(arg, Tensor)]
        return [(shape, place if place in weights else -self.origins.get(place, 0)) for shape, place in places]


class Keep(_Mode):
    """Notes what forward does and keeps what the policy names."""

    def __init__(self, record: Record) -> None:
        super().__init__(record)
        self.kept: dict[int, _Result] = {}  # by storage

    def step(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        if not kind.can_be_kept or not self.record.keeps(func, *args, **kwargs):
            self.record.steps.append(func)
            out = func(*args, **kwargs)
            if not kind.says_what_it_shares and self.kept:
                self.minds(out)
            return out
        before = _random_state(args) if kind.draws else None
        given = self.given(args)
        out = func(*args, **kwargs)
        if self.minds(out):
            self.record.steps.append(func)
            return out
        after = _random_state(args) if kind.draws else None
        drew = after is not None and before is not None and not _same(before, after)
        result = _Result(func, given, out, after if drew else None)
        self.record.steps.append(result)
        self.kept.update((storage_of(x), result) for x in result.leaves if isinstance(x, Tensor))
        return out

    def minds(self, out: Any) -> bool:
        """Whether tensors are other names of what is kept; notes that they are."""
        tensors = [x for x in ((out,) if isinstance(out, Tensor) else tree_leaves(out)) if isinstance(x, Tensor)]
        kept = [(result, x) for x in tensors if (result := self.kept.get(storage_of(x))) is not None]
        for result, tensor in kept:
            result.also(tensor)
        return bool(kept)


class Hand(_Mode):
    """Hands out what was kept, and computes the rest."""

    lost = False

    def step(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        steps, at = self.record.steps, self.at
        if self.lost or at >= len(steps) or steps[at] is func:
            return func(*args, **kwargs)
        step = steps[at]
        if not isinstance(step, _Result) or step.op is not func or step.given != self.given(args):
            self.lost = True  # another course than forward's
            return func(*args, **kwargs)
        if not _retained():
            steps[at] = func
        return func(*args, **kwargs) if step.changed else step.value()


class _Kind:
    """What there is to know of an operation."""

    def __init__(self, func: Any) -> None:
        self.passed_over, self.counts = func in _PASSED_OVER, func not in _UNCOUNTED
        self.draws = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        self.can_be_kept = self.says_what_it_shares = False
        """Whether it gives new memory and nothing but that; whether its results share that of arguments, as views do,
        and its schema tells."""
        if isinstance(func, torch._ops.OpOverload):
            takes, gives = func._schema.arguments, func._schema.returns
            self.says_what_it_shares = any(v.alias_info is not None for v in gives)
            plain = not any(v.alias_info is not None or "Generator" in str(v.type) for v in (*takes, *gives))
            # Otherwise it does not say whose generator it draws from.
            from_its_own = not self.draws or str(takes[0].type) == "Tensor"
            self.can_be_kept = plain and from_its_own and any("Tensor" in str(v.type) for v in gives)


_kind = functools.cache(_Kind)


def _detached(tensor: Tensor) -> Tensor:
    # Below autograd, where a detached tensor would count its versions by itself.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _retained() -> bool:
    """Whether the backward that runs keeps the graph, or none does and nobody knows."""
    if torch._C._current_graph_task_id() == -1:
        return True
    keep: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return keep


def _random_state(args: Any) -> Tensor | None:
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if tensor is None or isinstance(tensor, FakeTensor):
        return None
    if tensor.device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(tensor.device)
    state: Tensor | None = module.get_rng_state(tensor.device) if hasattr(module, "get_rng_state") else None
    return state


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _same(a: Tensor, b: Tensor) -> bool:
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.equal(a, b)
