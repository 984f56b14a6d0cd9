"""Gradient checkpointing: keep a block's inputs, recompute the block in backward (Chen et al., arXiv 1604.06174).

Each block runs through ``torch.utils.checkpoint`` in its non-reentrant form, which restores the global random state of
CPU and device and the autocast state, works with ``retain_graph``, and lets exceptions through. On top of it this pass
takes care of what torch leaves to the caller, so that gradients stay bitwise those of the untouched model:

* Inputs. Positional, keyword and nested inputs are flattened to positional tensors: torch looks only there for the
  devices whose random state it must restore, and autograd's in-place check then covers them. Lists, dicts and
  transformers caches that the block writes to are as before the call when it is recomputed.
* A block that changes its own input in place would be recomputed from the changed input. The first call of each block
  watches for that on a copy, freed again at once; where it happens, recomputation starts from a copy.
* Buffers changed in forward (BatchNorm statistics, counters, power iterations): recomputation runs on the values of
  before, and leaves those of after. Without this BatchNorm counts each batch twice.
* ``torch.Generator`` objects held by the block are rewound for the recomputation, then put back.
* A model's own checkpointing is replaced, not nested in: flags such as ``gradient_checkpointing`` and
  ``use_checkpoint`` are turned off around the wrapped blocks, and calls of a guided-diffusion style
  ``checkpoint(func, inputs, params, flag)``, which restores neither random nor autocast state, become plain calls.

Not covered: Python-side state (``self.calls += 1`` counts recomputations too) and NumPy's or ``random``'s state.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from memopt import legacy
from memopt.blocks import find_blocks
from memopt.core import Edit
from memopt.errors import InputError
from memopt.registry import Claim, Context, Pass, matching_modules
from memopt.saved import hold_for_now
from memopt.tensors import version_of


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Pass):
    """Keep only the inputs of each block and recompute the rest in backward: one more forward in time."""

    name: ClassVar[str] = "checkpoint"
    stage: ClassVar = "wrap"
    exact: ClassVar[bool] = True
    modes: ClassVar[frozenset[str]] = frozenset({"train"})
    needs: ClassVar[str] = "repeated blocks: composite modules in a ModuleList, ModuleDict or Sequential"

    blocks: str = "auto"
    """Which modules: "auto", or a glob over the names of ``named_modules()`` such as "layers.*"."""

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, str):
            raise InputError(f"checkpoint: blocks must be 'auto' or one glob, not {self.blocks!r}")

    def wanted(self) -> str:
        return self.needs if self.blocks == "auto" else f"modules whose name matches {self.blocks!r}"

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        names = find_blocks(model) if self.blocks == "auto" else matching_modules(model, self.blocks)
        return [Claim(name, "activations", "activations") for name in names]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        paths = [claim.path for claim in claims]
        flags = calls = 0
        for path, module in edit.model.named_modules():
            inside = any(path == p or path.startswith(f"{p}.") for p in paths)
            around = any(path == "" or p.startswith(f"{path}.") for p in paths)
            if inside or around:
                for flag in legacy.flags(module):
                    edit.set(module, flag, False)
                    flags += 1
            # Unwrapped: what another pass made of the legacy call does not matter when there is none.
            if inside and (plain := legacy.rewrite(inspect.unwrap(type(module).forward), lambda _: _plain_call)):
                edit.wrap(module, "forward", legacy.instead(plain))
                calls += 1
        if flags or calls:
            edit.note(f"replaced the model's own checkpointing: {flags} flags turned off, {calls} forwards rewritten")
        for path in paths:
            edit.wrap(edit.module(path), "forward", _forward)


_MUTATED = "_memopt_checkpoint_mutated"
"""In the namespace of a block's own dynamic class: which inputs (by position in the flattened arguments) the block
changes in place, for each way of calling it that was seen."""

SMALL_BUFFER = 1 << 20
"""Buffers of up to this many bytes are kept for recomputation even if nothing shows that forward changed them: batch
norm's kernels update statistics without telling autograd."""


def _forward(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return inner(*args, **kwargs)
    leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda x: not isinstance(x, (tuple, list, dict)))
    if torch.compiler.is_compiling():  # the compiler sees mutations itself and replays random state

        def plain(*leaves: Any) -> Any:
            args, kwargs = tree_unflatten(list(leaves), spec)
            return inner(*args, **kwargs)

        return checkpoint(plain, *leaves, use_reentrant=False)
    run = _Run(module, inner, (args, kwargs), spec)
    seen = vars(type(module)).get(_MUTATED)
    if seen is None:
        seen = {}
        setattr(type(module), _MUTATED, seen)
    way = (module.training, *kwargs, *(isinstance(leaf, Tensor) for leaf in leaves))
    if way not in seen:
        output = run.watched(leaves)
        seen[way] = run.mutated
        return output
    run.mutated = seen[way]
    return checkpoint(run, *run.copied(leaves), use_reentrant=False)


class _Run:
    """One call of a block: its forward first, then a recomputation for each backward.

    The forward gets the very arguments of the call, so that lists and dicts it writes to are the caller's; a
    recomputation gets new containers with what was in them before the call.
    """

    def __init__(self, module: nn.Module, inner: Callable[..., Any], arguments: Any, spec: Any) -> None:
        self.module, self.inner, self.spec = module, inner, spec
        self.arguments: Any = arguments  # until the forward is done
        self.mutated: frozenset[int] = frozenset()
        self.replaced: list[tuple[dict[str, Any], dict[str, Any]]] = []  # parameters and buffers of the forward
        self.modes: list[tuple[nn.Module, bool]] = []
        self.generators: list[tuple[torch.Generator, Tensor]] = []

    def __call__(self, *leaves: Any) -> Any:
        return self.recompute(leaves) if self.arguments is None else self.forward()

    def copied(self, leaves: Sequence[Any]) -> list[Any]:
        """The flattened arguments, with copies of those that the block changes."""
        return [leaf.clone() if i in self.mutated else _copy_cache(leaf) for i, leaf in enumerate(leaves)]

    def forward(self) -> Any:
        self.generators = [(g, g.get_state()) for g in _generators(self.module)]
        self.modes = [(m, m.training) for m in self.module.modules()]
        # The parameters themselves: functional_call may have put others in place by the time of the recomputation.
        self.replaced = [(m._parameters, dict(m._parameters)) for m, _ in self.modes if m._parameters]
        before = [
            (m._buffers, {n: (b, version_of(b), b.detach().clone()) for n, b in m._buffers.items() if b is not None})
            for m, _ in self.modes
            if m._buffers
        ]
        args, kwargs = self.arguments
        output = self.inner(*args, **kwargs)
        for buffers, old in before:
            changed = any(buffers[name] is not b or version_of(b) != version for name, (b, version, _) in old.items())
            kept = {n: value for n, (_, _, value) in old.items() if changed or value.nbytes <= SMALL_BUFFER}
            self.replaced.append((buffers, kept))
        self.arguments = None
        return output

    def recompute(self, leaves: Sequence[Any]) -> Any:
        args, kwargs = tree_unflatten(self.copied(leaves), self.spec)
        states = [(g, g.get_state()) for g, _ in self.generators]
        current = [(held, {name: held[name] for name in old}) for held, old in self.replaced]
        modes = [(m, m.training) for m, _ in self.modes]
        try:
            for generator, state in self.generators:
                generator.set_state(state)
            for held, old in self.replaced:
                # Buffers as copies: the recomputation changes them once more. Parameters as they are.
                held.update({n: v if isinstance(v, nn.Parameter) or v is None else _scratch(v) for n, v in old.items()})
            for module, mode in self.modes:
                module.training = mode
            return self.inner(*args, **kwargs)
        finally:  # also when torch stops the recomputation early, by an exception
            for generator, state in states:
                generator.set_state(state)
            for held, now in current:
                held.update(now)
            for module, mode in modes:
                module.training = mode

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
            if self.arguments is None:
                if any(kept[i]._version != version for i, version in after.items()):
                    raise RuntimeError(
                        f"checkpoint: an input of a {type(self.module).__name__} was changed in place after the block "
                        "had run, so it cannot be recomputed. Leave this block out with Checkpoint(blocks=...)."
                    )
                return self.recompute(kept)
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


def _scratch(value: Tensor) -> Tensor:
    """A buffer to recompute with; a tensor with history (a parameter that functional_call put in place) as it is."""
    return value if value.requires_grad else value.clone()


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


def _generators(module: nn.Module) -> Iterator[torch.Generator]:
    found = {id(v): v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Generator)}
    return iter(found.values())


def _plain_call(func: Callable[..., Any], inputs: Sequence[Any], params: Any, flag: bool) -> Any:
    return func(*inputs)
