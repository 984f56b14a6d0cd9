"""Gradient checkpointing: keep a block's inputs, recompute the block in backward (Chen et al., arXiv 1604.06174).

Each block runs through ``torch.utils.checkpoint`` in its non-reentrant form, which restores the global random state of
CPU and device and the autocast state, works with ``retain_graph``, and lets exceptions through. On top of it this pass
takes care of what torch leaves to the caller (`recompute.py`), so that gradients stay bitwise those of the untouched
model:

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

What of a block's inside is kept is a policy (`policies.py`), carried out by modes that hand results to a recomputation
(`selective.py`; Korthikanti et al., arXiv 2205.05198, chose so by hand). How much is recomputed at once is the
granularity: blocks, the layers inside them, or layers inside of recomputed blocks.

Not covered: Python-side state (``self.calls += 1`` counts recomputations too) and NumPy's or ``random``'s state.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memopt import legacy
from memopt.blocks import find_blocks, find_layers
from memopt.core import Edit
from memopt.errors import InputError
from memopt.policies import Keeps, check_policy, keeps_of
from memopt.recompute import Run
from memopt.recording import recording
from memopt.registry import Claim, Context, Pass, matching_modules
from memopt.saved import in_checkpoint
from memopt.tape import tape_in_force


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Pass):
    """Keep only the inputs of each block and recompute the rest in backward: one more forward in time."""

    name: ClassVar[str] = "checkpoint"
    stage: ClassVar = "wrap"
    exact: ClassVar[bool] = True
    modes: ClassVar[frozenset[str]] = frozenset({"train"})
    needs: ClassVar[str] = "repeated blocks: composite modules in a ModuleList, ModuleDict or Sequential"

    blocks: str | tuple[str, ...] = "auto"
    """Which modules: "auto", or a glob over the names of ``named_modules()`` such as "layers.*", or several."""
    policy: Keeps | str = "full"
    """What is kept inside: "full": nothing; "cheap": what convolutions, matrix products and attention give; "skips":
    nothing in larger blocks, as the levels of a UNet; or a function of an operation that says whether."""
    granularity: Literal["block", "layer", "nested"] = "block"
    """What is recomputed at once: a block; each layer made of several inside it; or blocks, and layers again inside."""

    def __post_init__(self) -> None:
        check_policy(self.policy)
        if self.granularity not in ("block", "layer", "nested"):
            raise InputError(f"checkpoint: granularity {self.granularity!r} is not one of block, layer, nested")
        if self.policy == "skips" and self.granularity == "layer":
            raise InputError(
                "checkpoint: policy 'skips' recomputes larger blocks, granularity 'layer' smaller ones. "
                "Leave one out, or say granularity='nested'."
            )
        several = isinstance(self.blocks, tuple) and all(isinstance(glob, str) for glob in self.blocks)
        if not (several or isinstance(self.blocks, str)):
            raise InputError(f"checkpoint: blocks must be 'auto', a glob or several, not {self.blocks!r}")

    def wanted(self) -> str:
        return self.needs if self.blocks == "auto" else f"modules whose name matches {self.blocks!r}"

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        skips = self.policy == "skips"
        blocks = find_blocks(model, whole=skips) if self.blocks == "auto" else matching_modules(model, self.blocks)
        smaller = find_blocks(model) if skips else []
        names = []
        for block in blocks:
            inside = [name for name in smaller if name.startswith(f"{block}.")]
            layers = inside or find_layers(model.get_submodule(block), block)
            if self.granularity != "layer" or not layers:
                names.append(block)
            if self.granularity != "block":
                names += layers
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
            module = edit.module(path)
            edit.wrap(module, "forward", functools.partial(_forward, keeps_of(self.policy), _has_state(module)))


_MUTATED = "_memopt_checkpoint_mutated"
"""In the namespace of a block's own dynamic class: which inputs (by position in the flattened arguments) the block
changes in place, for each way of calling it that was seen."""


def _has_state(module: nn.Module) -> bool:
    """Whether a block holds what may be another when it is recomputed: a generator, or buffers that are no statistics
    of torch's norms, on which their output in training does not depend."""
    modules = [m for m in module.modules() if not isinstance(m, (_BatchNorm, _InstanceNorm))]
    return any(m._buffers or any(isinstance(v, torch.Generator) for v in vars(m).values()) for m in modules)


def _forward(
    keeps: Keeps | None,
    state: bool,
    module: nn.Module,
    inner: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return inner(*args, **kwargs)
    if state and torch.compiler.is_compiling():  # compiled, it would be recomputed from what forward has changed
        return _uncompiled(keeps, module, inner, args, kwargs)
    return _checkpointed(keeps, module, inner, args, kwargs)


def _checkpointed(
    keeps: Keeps | None, module: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda x: not isinstance(x, (tuple, list, dict)))
    if torch.compiler.is_compiling():  # the compiler sees mutations itself and replays random state
        calls: list[Run] = []

        def plain(*leaves: Any) -> Any:
            if torch.compiler.is_compiling():
                args, kwargs = tree_unflatten(list(leaves), spec)
                return inner(*args, **kwargs)
            if not calls:  # the compiler could not look inside and has torch's checkpoint call this
                calls.append(Run(module, inner, tree_unflatten(list(leaves), spec), leaves, spec))
            return calls[0](*leaves)

        if keeps is None:
            return checkpoint(plain, *leaves, use_reentrant=False)
        contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_compiled, keeps))
        return checkpoint(plain, *leaves, use_reentrant=False, context_fn=contexts)
    run = Run(module, inner, (args, kwargs), leaves, spec, keeps)
    seen = vars(type(module)).get(_MUTATED)
    if seen is None:
        seen = {}
        setattr(type(module), _MUTATED, seen)
    way = (module.training, *kwargs, *(isinstance(leaf, Tensor) for leaf in leaves))
    if way in seen:
        run.mutated = seen[way]
        # Others do better, which move both or know what a result was made of, or must find the same again.
        if not in_checkpoint() and recording() is None and tape_in_force() is None:
            run.keep_in_parts()
        return run.checkpointed(leaves)
    output = run.tried(leaves) if in_checkpoint() else run.watched(leaves)
    seen[way] = run.mutated
    return output


_uncompiled = torch._disable_dynamo(_checkpointed)  # type: ignore[attr-defined]
"""What torch.compile leaves alone: the graph breaks here."""


def _compiled(keeps: Keeps, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy as torch takes it."""
    return CheckpointPolicy.MUST_SAVE if keeps(op, *args, **kwargs) else CheckpointPolicy.PREFER_RECOMPUTE


def _plain_call(func: Callable[..., Any], inputs: Sequence[Any], params: Any, flag: bool) -> Any:
    return func(*inputs)
