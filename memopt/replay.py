"""A module as it was when something ran, for computing that again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Replay:
    """Remembers what a module's forward depends on and torch's checkpoint does not restore.

    Training modes, the parameters and buffers in use (``torch.func.functional_call`` puts others in place while it
    runs), and the states of generators that modules hold.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.modes = [(m, m.training) for m in modules]
        self.held = [(held, dict(held)) for m in modules for held in (m._parameters, m._buffers) if held]
        found = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, torch.Generator)}
        self.generators = [(generator, generator.get_state()) for generator in found.values()]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The module is as it was; afterwards it is as it is now, also when torch stops a recomputation early."""
        modes = [(m, m.training) for m, _ in self.modes]
        held = [(place, {name: place[name] for name in old}) for place, old in self.held]
        states = [(generator, generator.get_state()) for generator, _ in self.generators]
        try:
            self.restore()
            yield
        finally:
            self._put(modes, held, states)

    def restore(self) -> None:
        """Make the module as it was."""
        self._put(self.modes, self.held, self.generators)

    @staticmethod
    def _put(modes: list, held: list, states: list) -> None:  # type: ignore[type-arg]
        for module, mode in modes:
            module.training = mode
        for place, tensors in held:
            place.update(tensors)
        for generator, state in states:
            generator.set_state(state)
