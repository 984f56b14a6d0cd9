"""A module as it was when something ran, for computing that again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from memopt.saved import check_weight
from memopt.tensors import version_of

SMALL_BUFFER = 1 << 20
"""Buffers of up to this many bytes are kept for recomputation even if nothing shows that forward changed them: batch
norm's kernels update statistics without telling autograd."""


class Replay:
    """Remembers what a module's forward depends on and torch's checkpoint does not restore.

    Training modes, the parameters and buffers in use (``torch.func.functional_call`` puts others in place while it
    runs), which parameters require gradients, and the states of generators that modules hold or are given.

    Args:
        writes: whether forward may write to buffers. Copies of them are kept then, and each computation gets its own.
        given: what forward is called with.
    """

    def __init__(self, module: nn.Module, *, writes: bool = False, given: Iterable[Any] = ()) -> None:
        modules = list(module.modules())
        weights = [p for m in modules for p in m._parameters.values() if p is not None and p.is_leaf]
        self.weights = [(p, version_of(p), p.requires_grad) for p in weights]
        self.modes = [(m, m.training) for m in modules]
        kinds = ("_parameters",) if writes else ("_parameters", "_buffers")
        self.held = [(held, dict(held)) for m in modules for kind in kinds if (held := getattr(m, kind))]
        self.written = [
            (m._buffers, {n: (b, version_of(b), b.detach().clone()) for n, b in m._buffers.items() if b is not None})
            for m in modules
            if writes and m._buffers
        ]
        found = {id(v): v for v in (*given, *_attributes(modules)) if isinstance(v, torch.Generator)}
        self.copies = [(held, {n: copy for n, (_, _, copy) in old.items()}) for held, old in self.written]
        self.generators = [(generator, generator.get_state()) for generator in found.values()]

    def ran(self) -> None:
        """Forward is done: drop copies of what it has not written to."""
        for (held, old), (_, copies) in zip(self.written, self.copies, strict=True):
            if not any(held[n] is not b or version_of(b) != version for n, (b, version, _) in old.items()):
                for name in [n for n, copy in copies.items() if copy.nbytes > SMALL_BUFFER]:
                    del copies[name]
        self.written = []

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The module is as it was; afterwards it is as it is now, also when torch stops a recomputation early.

        Raises:
            RuntimeError: autograd's own, where a parameter was written to since.
        """
        for weight, version, _ in self.weights:
            check_weight(weight, version)
        other = [(weight, needs) for weight, _, needs in self.weights if weight.requires_grad != needs]
        modes = [(m, m.training) for m, _ in self.modes]
        held = [(held, {name: held[name] for name in old}) for held, old in [*self.held, *self.copies]]
        states = [(generator, generator.get_state()) for generator, _ in self.generators]
        copies = [(held, {name: copy.clone() for name, copy in old.items()}) for held, old in self.copies]
        try:
            for weight, needs in other:
                weight.requires_grad_(needs)
            self._put(self.modes, [*self.held, *copies], self.generators)
            yield
        finally:
            self._put(modes, held, states)
            for weight, needs in other:
                weight.requires_grad_(not needs)

    @staticmethod
    def _put(modes: list, held: list, states: list) -> None:  # type: ignore[type-arg]
        for module, mode in modes:
            module.training = mode
        for place, tensors in held:
            place.update(tensors)
        for generator, state in states:
            generator.set_state(state)


def _attributes(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """What modules hold by names of their own, also in lists, tuples and dicts."""
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, (list, tuple, dict)) and not name.startswith("_"):
                yield from value.values() if isinstance(value, dict) else value
            else:
                yield value
