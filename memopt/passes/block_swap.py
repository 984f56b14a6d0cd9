"""Weights of blocks live in host memory or in a file, and are on the device only while their block is used.

The engine is `memopt/swapping.py`. Each block's forward brings its weights in. So does reading a parameter, which goes
through ``nn.Module.__getattr__``: a block that a checkpoint computes again piece by piece, or whose weights somebody
uses without calling it, finds them, too. When the model's forward or a backward pass is over, all blocks are away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from memopt.blocks import find_blocks
from memopt.core import Edit
from memopt.errors import InputError
from memopt.homes import Weight, can_leave
from memopt.registry import Claim, Context, Pass, matching_modules
from memopt.swapping import Swapper, Unit
from memopt.tensors import storage_of
from memopt.transfer import Mover

_SWAPPER, _UNIT = "_memopt_swapper", "_memopt_unit"


@dataclass(frozen=True, kw_only=True)
class BlockSwap(Pass):
    """Weights of blocks wait in host memory or in a file; each block's come just before it is used."""

    name: ClassVar[str] = "block_swap"
    stage: ClassVar = "hook"  # inside checkpoints, which then bring weights in again as they recompute
    exact: ClassVar[bool] = True
    needs: ClassVar[str] = (
        "repeated blocks with parameters: composite modules in a ModuleList, ModuleDict or Sequential"
    )

    to: Literal["cpu", "disk"] = "cpu"
    """Where the weights live."""
    blocks: str = "auto"
    """Which modules: "auto", or a glob over the names of ``named_modules()`` such as "layers.*"."""
    level: Literal["block", "leaf"] = "block"
    """What comes and goes at a time: a block, or each single layer inside the blocks."""
    resident: int = 1
    """How many stay on the device, the one in use among them."""
    prefetch: int = 1
    """How many of the next are brought ahead."""
    folder: str | None = None
    """Where the file is kept (disk); by default in the system's folder for temporary files."""
    device: str | None = None
    """Where to compute; by default where the model is. What is in no block is moved there."""

    def __post_init__(self) -> None:
        if self.level not in ("block", "leaf"):
            raise InputError(f"block_swap: level {self.level!r} is not one of block, leaf")
        self._check_at_least(resident=1, prefetch=0)
        try:
            self._mover()
            torch.device(self.device or "cpu")
        except (InputError, RuntimeError) as error:
            raise InputError(f"block_swap: {error}") from None

    def _mover(self) -> Mover:
        return Mover(self.to, folder=self.folder)

    def wanted(self) -> str:
        if self.blocks != "auto":
            return f"modules with parameters whose name matches {self.blocks!r}"
        return self.needs if self.level == "block" else "layers with parameters"

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        for name, parameter in model.named_parameters():
            if is_lazy(parameter):
                raise InputError(f"block_swap: {name} gets its shape when the model is called: call it once before")
            if parameter.device.type == "meta":
                raise InputError(f"block_swap: {name} has no values. Use memopt.load_swapped to load them.")
        if self.device is not None and torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"block_swap: there is no device {self.device!r} on this machine")
        found = self._found(model)
        movable = _movable(model, found)
        return [Claim(path, "weights") for path in found if movable[path]]

    def swapped(self, model: nn.Module) -> set[int]:
        """The ids of the parameters that would come and go."""
        places = _movable(model, self._found(model)).values()
        return {id(owner._parameters[name]) for found in places for owner, name in found}

    def _found(self, model: nn.Module) -> list[str]:
        found = find_blocks(model) if self.blocks == "auto" else matching_modules(model, self.blocks)
        if self.level == "block":
            return found
        around = [""] if self.blocks == "auto" else found
        modules = {id(m): path for path, m in model.named_modules()}
        leaves = [m for path in around for m in model.get_submodule(path).modules() if _is_leaf(m)]
        return [modules[key] for key in dict.fromkeys(map(id, leaves))]

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        paths = [claim.path for claim in claims]

        def swapper_of(model: nn.Module) -> Swapper:
            movable = _movable(model, paths)
            device = torch.device(self.device) if self.device else None
            units = {path: Unit([Weight(*place, device) for place in movable[path]]) for path in paths}
            return Swapper(units, self._mover(), self.folder, self.resident, self.prefetch, edit.counts)

        def places(swapper: Swapper, model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
            yield model, _SWAPPER, swapper
            for path, unit in swapper.paths.items():
                for module in {model.get_submodule(path), *(weight.owner for weight in unit.weights)}:
                    yield module, _UNIT, unit

        def around_model(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            swapper = vars(module).get(_SWAPPER)
            if swapper is None:  # of a copy
                swapper = swapper_of(module)
                for place in places(swapper, module):
                    object.__setattr__(*place)
            with swapper.call():
                return inner(*args, **kwargs)

        swapper = swapper_of(edit.model)
        edit.hook(lambda: swapper)  # first: it puts back also what has moved half way
        swapper.settle()
        for place in places(swapper, edit.model):
            edit.set(*place)
        for unit in swapper.units:
            for owner in {weight.owner for weight in unit.weights}:
                edit.wrap(owner, "__getattr__", _around_read)
        for path in paths:
            edit.wrap(edit.module(path), "forward", _around_block)  # also when a checkpoint computes it again
            edit.wrap(edit.module(path), "__call__", _around_block)  # also around hooks, which may read weights
        edit.wrap(edit.model, "forward", around_model)
        inside = sum(unit.bytes for unit in swapper.units)
        largest = max(unit.bytes for unit in swapper.units)
        outside = sum(p.nbytes for p in edit.model.parameters()) - inside
        edit.note(
            f"{inside:,} bytes of weights in {len(paths)} blocks, the largest of {largest:,}; {outside:,} stay on the "
            "device"
        )
        if self.device is not None:
            swapped = {id(weight.parameter) for unit in swapper.units for weight in unit.weights}
            for tensor in [*edit.model.parameters(), *edit.model.buffers()]:
                if id(tensor) not in swapped:
                    edit.hook(_Moved, tensor, torch.device(self.device))


def _around_block(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    unit: Unit | None = vars(module).get(_UNIT)
    if unit is None:  # of a copy of the model that was not called
        return inner(*args, **kwargs)
    with unit.swapper.call(unit):
        return inner(*args, **kwargs)


def _around_read(module: nn.Module, inner: Callable[..., Any], name: str, /) -> Any:
    unit: Unit | None = vars(module).get(_UNIT)
    if unit is not None and name in vars(module)["_parameters"]:
        unit.swapper.read(unit)
    return inner(name)


def _is_leaf(module: nn.Module) -> bool:
    """Whether it has parameters of its own and nothing inside it has."""
    own = any(parameter is not None for parameter in module._parameters.values())
    return own and sum(1 for _ in module.parameters()) == sum(1 for _ in module.parameters(recurse=False))


def _movable(model: nn.Module, paths: Sequence[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """The parameters (owner, name) of each block that can come and go: of no other block, and nobody else's."""
    blocks: dict[int, set[str]] = {}
    for path in paths:
        for module in model.get_submodule(path).modules():
            blocks.setdefault(id(module), set()).add(path)
    found: dict[str, list[tuple[nn.Module, str]]] = {path: [] for path in paths}
    users: dict[int, set[tuple[int, str]]] = {}
    places: dict[int, tuple[nn.Module, str]] = {}
    for buffer in model.buffers():
        users.setdefault(storage_of(buffer), set()).add((id(buffer), ""))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), (module, name))
                users.setdefault(storage_of(parameter), set()).update(
                    (id(parameter), path) for path in blocks.get(id(module), {""})
                )
    for module, name in places.values():
        parameter = module._parameters[name]
        assert parameter is not None
        using = users[storage_of(parameter)]
        (_, path), *others = using
        if path and not others and can_leave(parameter):
            found[path].append((module, name))
    return found


class _Moved:
    """A tensor that is on another device for a while."""

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.tensor, self.before = tensor, tensor.device
        self._move(device)

    def remove(self) -> None:
        """Move it back."""
        self._move(self.before)

    def _move(self, device: torch.device) -> None:
        grad, self.tensor.grad = self.tensor.grad, None
        self.tensor.data = self.tensor.data.to(device)
        self.tensor.grad = None if grad is None else grad.to(device)
