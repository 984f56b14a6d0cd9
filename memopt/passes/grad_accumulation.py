"""A batch goes through the model in parts, inside one call of it: the training loop stays as it is.

As in GradCache (Gao et al., arXiv 2101.06983): forward runs the parts one after another and joins their outputs, so
that the loss sees the whole batch and may be any function of it, a contrastive one or one with a mean over pixels.
Nothing of a part is kept but its outputs. In backward, when the gradient of a part's outputs arrives, the part is
computed again with its graph. Autograd takes the newest nodes first, so it is done with one part, gradients of
parameters apart, before it begins another. The last part, whose turn is first, keeps its graph: of P parts P - 1 run
twice.

All of it is one graph: each gradient of a parameter arrives once, as hooks of distributed training expect. Gradients
are sums over parts of what were sums over the batch, which rounds in another way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

from memopt.core import Edit
from memopt.deferred.standin import made
from memopt.errors import InputError
from memopt.nested import Path, flatten
from memopt.registry import Claim, Context, Pass
from memopt.replay import SMALL_BUFFER, Replay
from memopt.saved import hooks_allowed
from memopt.tensors import is_memory, version_of

CONSTANTS = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device)
"""Types of outputs that need not be joined where they are equal."""
Known = dict[tuple[Path, ...], dict[int, bool]]
"""By the structure of the arguments: which tensors are split with the batch, as far as calls have shown."""
Rehearsed = dict[tuple[Any, ...], int]
"""By the way in which a model is called: the size of the largest part it has been tried on."""


@dataclass(frozen=True, kw_only=True)
class GradAccumulation(Pass):
    """Split each batch inside the model: activations of one part at a time, one more forward in time."""

    name = "grad_accumulation"
    stage = "wrap"
    exact = True
    rounding = True
    needs = "a model with parameters"
    not_by_default = "another batch in each forward"

    parts: int = 2
    """How many parts a batch is split into; a smaller batch into its samples."""
    samples: int | None = None
    """Instead of ``parts``: how many samples a part has at most."""
    split: tuple[str, ...] = ()
    """Names of the arguments of forward that hold the batch. Default: the first tensor, and those of its length."""

    def __post_init__(self) -> None:
        self._check_at_least(parts=1)
        if self.samples is not None:
            self._check_at_least(samples=1)
            if self.parts != type(self).parts:
                raise InputError("grad_accumulation: give parts or samples, not both")
        if isinstance(self.split, str) or not all(isinstance(name, str) for name in self.split):
            raise InputError(f"grad_accumulation: split must be a tuple of names, not {self.split!r}")

    def sizes(self, batch: int) -> list[int]:
        """How many samples each part of a batch has."""
        if self.samples is not None:
            full, rest = divmod(batch, self.samples)
            return [self.samples] * full + [rest] * (rest > 0)
        parts = max(1, min(self.parts, batch))
        return [batch // parts + (i < batch % parts) for i in range(parts)]

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise InputError(
                "grad_accumulation: a DistributedDataParallel counts one forward for each backward. Apply the pass to "
                "the model inside, before it is wrapped."
            )
        _refuse_batch_statistics(model)
        parameters = inspect.signature(model.forward).parameters.values()
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            for name in self.split:
                if name not in {p.name for p in parameters}:
                    raise InputError(
                        f"grad_accumulation: forward of {type(model).__name__} has no argument {name!r}; it has "
                        f"{', '.join(p.name for p in parameters)}"
                    )
        return [Claim("", "activations", "batch")] if any(True for _ in model.parameters()) else []

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        counts, known, rehearsed = edit.counts, Known(), Rehearsed()

        def forward(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not hooks_allowed():
                return inner(*args, **kwargs)
            bound = inspect.signature(inner).bind(*args, **kwargs)
            paths, leaves, make = flatten(bound.arguments)
            names = [_name(path, bound.signature) for path in paths]
            batch, chosen = _batch(type(module).__name__, leaves, names, paths, self.split, known)
            sizes = self.sizes(batch)
            if len(sizes) < 2:
                return inner(*args, **kwargs)
            _refuse_batch_statistics(module)

            def call(*leaves: Any) -> Any:
                part = inspect.BoundArguments(bound.signature, make(leaves))
                return inner(*part.args, **part.kwargs)

            pieces = {i: leaves[i].split(sizes) for i in chosen}
            way = (module.training, *paths)
            if rehearsed.get(way, 0) < sizes[0]:
                _rehearse(module, call, leaves, names, chosen, sizes[0])
                rehearsed[way] = sizes[0]
            outputs = []
            for k in range(len(sizes)):
                part = [pieces[i][k] if i in pieces else leaf for i, leaf in enumerate(leaves)]
                outputs.append(_run(module, call, part, names, first=k == 0, again=k < len(sizes) - 1))
            counts["batches split"] += 1
            counts["parts"] += len(sizes)
            del pieces, part
            return _joined(type(module).__name__, outputs, sizes)

        edit.wrap(edit.model, "forward", forward)
        if any(isinstance(module, _DropoutNd) and module.p for module in edit.model.modules()):
            edit.note("dropout draws other masks: those of a batch are drawn part by part")


def _name(path: Path, signature: inspect.Signature) -> str:
    """The name of the argument of forward that a leaf is in."""
    inside = len(path) > 1 and signature.parameters[path[0]].kind is inspect.Parameter.VAR_KEYWORD
    return path[1] if inside else path[0]


def _batch(
    model: str, leaves: list[Any], names: list[str], paths: list[Path], split: tuple[str, ...], known: Known
) -> tuple[int, list[int]]:
    """The size of the batch and which leaves are split with it.

    A length that is only by chance that of the batch shows in calls with batches of other sizes, which are remembered.
    """
    tensors = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and not x.is_nested and x.dim()}
    asked = {i: x for i, x in tensors.items() if names[i] in split} if split else tensors
    if not asked:
        among = f"the arguments {', '.join(split)}" if split else "the arguments"
        raise InputError(f"grad_accumulation: there is no tensor with a batch dimension among {among} of {model}")
    lead = min(asked, key=lambda i: (split.index(names[i]) if split else 0, i))
    batch = len(leaves[lead])
    chosen = [i for i, x in asked.items() if len(x) == batch]
    if split or batch < 2:
        return batch, chosen
    found = known.setdefault(tuple(paths), {})
    doubtful = [i for i in chosen if i != lead and i not in found]
    if doubtful and (other := next((i for i, x in tensors.items() if batch in x.shape[1:]), None)) is not None:
        i, like = doubtful[0], tuple(dict.fromkeys(names[i] for i in chosen))
        raise InputError(
            f"grad_accumulation: cannot tell whether {names[i]} {list(leaves[i].shape)} belongs to the batch of {batch}"
            f", because {names[other]} {list(leaves[other].shape)} has another dimension of that length. Name the "
            f"arguments of {model} that are split, such as GradAccumulation(split={like})."
        )
    found.update(dict.fromkeys(doubtful, True))
    found.update({i: False for i, x in tensors.items() if len(x) not in (1, batch) and i not in found})
    return batch, [i for i in chosen if i == lead or found[i]]


def _rehearse(
    module: nn.Module, call: Callable[..., Any], leaves: list[Any], names: list[str], chosen: list[int], size: int
) -> None:
    """Run a part for nothing: other passes learn from a model's first forward, and then do something else.

    What is recorded and what is computed again must be alike. A part of another size tells which outputs have a row for
    each sample, and not the length of a part by chance.
    """
    model = type(module).__name__
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, Iterator):
            raise InputError(f"grad_accumulation: {name} of {model} is an iterator, which the first part would empty")
    devices = {x.device.index for x in leaves if isinstance(x, Tensor) and x.device.type == "cuda"}
    sizes = [size, size - 1 or 2]
    with torch.random.fork_rng(sorted(devices)), Replay(module, writes=True, given=leaves).again():
        before, held = _state(module), _attributes(module)
        copies = {key: x.detach().clone() for key, (x, _) in before.items() if _may_change_unseen(x)}
        outputs: list[Any] = []
        for n in sizes:
            part = [x[:n] if i in chosen else x for i, x in enumerate(leaves)]
            part = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in part]
            _, found, make = flatten(made(call(*part)))
            outputs.append(make([x.detach() if isinstance(x, Tensor) else x for x in found]))
        try:
            _check_state(module, before, copies)
        except InputError:
            with torch.no_grad():
                for key, copy in copies.items():
                    before[key][0].copy_(copy)
            raise
        for key, value in _attributes(module).items():
            if value.requires_grad and held.get(key) is not value:
                raise InputError(
                    f"grad_accumulation: {model} keeps a result with a gradient as {'.'.join(key).lstrip('.')}, which "
                    "would be that of the last part of a batch alone. Return it, or leave the pass out."
                )
        _joined(model, outputs, sizes)


def _run(
    module: nn.Module, call: Callable[..., Any], leaves: list[Any], names: list[str], *, first: bool, again: bool
) -> Any:
    """The outputs of one part. What the parts would spoil for each other, the first one shows."""
    again = again and torch.is_grad_enabled()
    before = _state(module) if first else {}
    inputs = [(i, version_of(x)) for i, x in enumerate(leaves) if again and isinstance(x, Tensor)]
    if again:
        replay = Replay(module, given=leaves)
        began = False

        def run(*leaves: Any) -> Any:
            nonlocal began
            if not began:
                began = True
                return call(*leaves)
            with replay.again():
                return call(*leaves)

        output = checkpoint(run, *leaves, use_reentrant=False)
    else:
        output = call(*leaves)
    if first:
        _check_state(module, before, {})
    for i, version in inputs:
        if version_of(leaves[i]) != version:
            raise InputError(
                f"grad_accumulation: {type(module).__name__} changes its argument {names[i]} in place, so a part could "
                "not be computed again. Leave the pass out."
            )
    return output


State = dict[tuple[str, str], tuple[Tensor, int]]
"""Tensors of modules by the paths of these and their own names, with their versions."""


def _state(module: nn.Module) -> State:
    return {
        (path, name): (x, version_of(x))
        for path, m in module.named_modules()
        for name, x in [*m._buffers.items(), *m._parameters.items()]
        if x is not None
    }


def _attributes(module: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Tensors that modules hold otherwise."""
    return {
        (path, name): value
        for path, m in module.named_modules()
        for name, value in vars(m).items()
        if isinstance(value, Tensor)
    }


def _may_change_unseen(tensor: Tensor) -> bool:
    """Whether its content is compared: kernels of batch norm, and ``.data``, write without counting."""
    seen = tensor.requires_grad or tensor.nbytes > SMALL_BUFFER or isinstance(tensor, FakeTensor)
    return is_memory(tensor) and not seen


def _check_state(module: nn.Module, before: State, copies: dict[tuple[str, str], Tensor]) -> None:
    """Raise an InputError where a buffer or parameter is another than before."""
    now = _state(module)
    for key, (tensor, version) in before.items():
        same = key in now and now[key][0] is tensor and now[key][1] == version
        if not same or (key in copies and not torch.allclose(tensor, copies[key], rtol=0, atol=0, equal_nan=True)):
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            raise InputError(
                f"grad_accumulation: {type(module).__name__} changes its {kind} {'.'.join(key).lstrip('.')} in "
                "forward, which would happen once for each part of a batch. Leave the pass out."
            )


def _joined(model: str, outputs: list[Any], sizes: list[int]) -> Any:
    """The output for the whole batch."""
    (paths, _, make), *others = flattened = [flatten(made(output)) for output in outputs]
    outputs.clear()
    if any(other[0] != paths for other in others):
        raise InputError(f"grad_accumulation: {model} returns outputs of another structure for each part of a batch")
    joined = []
    for i, path in enumerate(paths):
        values = [leaves[i] for _, leaves, _ in flattened]
        for _, leaves, _ in flattened:
            leaves[i] = None  # a part's output goes when it is joined
        what = f"the output {'.'.join(path)} of {model}" if path else f"the output of {model}"
        if all(isinstance(value, Tensor) for value in values):
            for value, size in zip(values, sizes, strict=True):
                if not value.dim() or len(value) != size or value.shape[1:] != values[0].shape[1:]:
                    raise InputError(
                        f"grad_accumulation: {what} has the shape {list(value.shape)} for a part of {size} samples, so "
                        "it cannot be joined along the batch. A loss is computed outside of the model, from what it "
                        "returns. If the batch is another argument than the first, say GradAccumulation(split=...)."
                    )
            joined.append(torch.cat(values))
        elif all(v is values[0] or (isinstance(v, CONSTANTS) and v == values[0]) for v in values):
            joined.append(values[0])
        else:
            raise InputError(
                f"grad_accumulation: {what} is a {type(values[0]).__name__}, another one for each part of a batch, and "
                "cannot be joined. Turn it off (use_cache=False, for a cache) or leave the pass out."
            )
    return make(joined)


def _refuse_batch_statistics(model: nn.Module) -> None:
    """Raise an InputError where modules would compute the statistics of a part in place of the batch's."""
    found = [
        f"{path or 'the model itself'} ({type(module).__name__})"
        for path, module in model.named_modules()
        if (isinstance(module, _BatchNorm) and (module.training or module.running_mean is None))
        or (isinstance(module, _InstanceNorm) and module.training and module.track_running_stats)
    ]
    if found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise InputError(
            f"grad_accumulation: {shown} of {type(model).__name__} computes statistics of the batch, which those "
            "of its parts are not. Put such layers into eval mode, use GroupNorm, or leave the pass out."
        )
