"""What a test asks of a model: one training step, and everything that an undo must give back."""

from __future__ import annotations

import dataclasses
import hashlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from . import Case


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings (so model outputs too) and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name))


def loss_of(output: Any) -> Tensor:
    """A scalar that every floating tensor of the output takes part in, each with a weight of its own."""
    total = None
    for index, leaf in enumerate(leaf for leaf in leaves(output) if leaf.is_floating_point()):
        leaf = leaf if leaf.dtype == torch.float64 else leaf.float()
        term = leaf.square().mean() / (1 + index)
        total = term if total is None else total + term
    if total is None:
        raise ValueError(f"no floating tensor in the output: {type(output).__name__}")
    return total


def run(model: nn.Module, case: Case, seed: int = 0) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """Forward, loss and backward from a seeded state; returns the loss, the gradients and the buffers afterwards.

    Gradients are keyed by parameter name, those of the inputs by `input.<i>`, i counting the tensors among the inputs.
    Buffers include the state of explicit generators (`<module>.<attribute>`), which forward advances too. Where there
    are any, a run depends on the runs before: compare models that were built afresh. The inputs go where the model is,
    and are float64 if the model is.
    """
    args, kwargs = placed(case.inputs(), model)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = loss_of(model(*args, **kwargs))
    loss.backward()
    grads = {name: _copy(parameter.grad) for name, parameter in model.named_parameters()}
    for index, tensor in enumerate(leaves((args, kwargs))):
        if tensor.requires_grad:
            grads[f"input.{index}"] = _copy(tensor.grad)
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Generator):
                buffers[f"{path}.{name}"] = value.get_state()
    return loss.detach().clone(), grads, buffers


def placed(inputs: Any, model: nn.Module) -> Any:
    """The inputs on the device of the model's first parameter, and in float64 if that is its dtype."""
    like = next(model.parameters())

    def place(value: Any) -> Any:
        if isinstance(value, Tensor):
            double = value.is_floating_point() and like.dtype == torch.float64
            moved = value.detach().to(like.device, torch.float64 if double else value.dtype)
            return moved.requires_grad_(value.requires_grad)
        if isinstance(value, dict):
            return {key: place(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(place(item) for item in value)
        return value

    return place(inputs)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


class Same:
    """Equal to another one if both hold the very same object (which it keeps alive, so that no id is used twice)."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        name = getattr(self.value, "__qualname__", type(self.value).__qualname__)
        return f"<{name} at {id(self.value):#x}>"


PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range)
OPAQUE = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def fingerprint(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Everything that undo must restore, by module path; compare with `==`, or with `differences` to name the gap.

    Each path of each module, shared ones as often as they are listed, holds the class and its `forward`, all of the
    instance's attributes (hook dicts, `training` and an own `forward` are among them), and for each tensor its
    identity, bytes, layout, hooks and attributes. `<global>` holds the hooks that torch calls for every module.
    """
    everywhere = {name: value for name, value in vars(nn.modules.module).items() if name.startswith("_global_")}
    print_of = {"<global>": {name: _snapshot(value, ()) for name, value in everywhere.items()}}
    for path, module in model.named_modules(remove_duplicate=False):
        cls = type(module)
        own = {"<self>": Same(module), "<class>": Same(cls)}
        own |= {f"<class>.{name}": Same(getattr(cls, name)) for name in ("forward", "__call__", "__init__")}
        own |= {name: _snapshot(value, (id(module),)) for name, value in sorted(vars(module).items())}
        print_of[path] = own
    return print_of


def differences(before: dict, after: dict, limit: int = 10) -> list[str]:
    """Where two fingerprints differ: one line for each module attribute, the first `limit` of them."""
    found = []
    for path in dict.fromkeys([*before, *after]):
        old, new = before.get(path, {}), after.get(path, {})
        for key in dict.fromkeys([*old, *new]):
            if key not in old or key not in new:
                found.append(f"{path or '<root>'}: {key} {'appeared' if key in new else 'is gone'}")
            elif old[key] != new[key]:
                found.append(f"{path or '<root>'}: {key} changed from {old[key]!r:.200} to {new[key]!r:.200}")
    return found[:limit]


def _snapshot(value: Any, above: tuple[int, ...]) -> Any:
    """What to compare a value by: plain ones by themselves, all others by identity and by what is in them."""
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # so that nan equals nan
    if isinstance(value, Tensor):
        return _tensor(value, above)
    if isinstance(value, torch.Generator):
        return Same(value), _digest(value.get_state())
    if id(value) in above or isinstance(value, OPAQUE):
        return Same(value)
    above = (*above, id(value))
    if isinstance(value, Mapping):  # in order: the order of parameters is the order of the state_dict
        return type(value), [(_key(key), _snapshot(item, above)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value), [_snapshot(item, above) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_key(item) for item in value)
    inside = vars(value) if hasattr(value, "__dict__") else {}
    return Same(value), [(name, _snapshot(item, above)) for name, item in sorted(inside.items())]


def _key(key: Any) -> Any:
    return key if isinstance(key, (*PLAIN, float)) else Same(key)


def _tensor(tensor: Tensor, above: tuple[int, ...]) -> tuple:
    above = (*above, id(tensor))
    hooks = [_snapshot(getattr(tensor, name, None) or {}, above) for name in TENSOR_HOOKS]
    layout = (tensor.dtype, tensor.device, tuple(tensor.shape), tensor.layout, tensor.requires_grad, tensor.is_leaf)
    strides = tensor.stride() if tensor.layout == torch.strided else None
    pinned = torch.cuda.is_available() and tensor.device.type == "cpu" and tensor.is_pinned()
    attributes = [(name, _snapshot(item, above)) for name, item in sorted(vars(tensor).items())]
    return Same(tensor), type(tensor), _digest(tensor), layout, strides, pinned, hooks, attributes


TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta or tensor.layout != torch.strided:
        return str(tensor.layout)
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        return "storage is empty"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def reseeded(seed: int, factory: Callable[[], nn.Module]) -> nn.Module:
    """The module that `factory` makes from this seed, in train mode, with no constant parameter left.

    A weight of zeros (the last convolution of most diffusion models) hides all that comes before it, and a norm whose
    scale is all ones makes the mean of squares of its output a constant: noise is added to both. The global random
    state stays.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = factory()
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
            elif parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()
