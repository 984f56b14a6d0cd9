"""``load_swapped``: a model larger than memory, from its safetensors file, without ever loading it whole.

The model is built without memory for its parameters (accelerate's ``init_empty_weights``). Each then becomes a part of
the mapped file, where the pass `block_swap` finds its home; what is in no block is copied to memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memopt.core import Handle, apply
from memopt.errors import InputError, MemoptError
from memopt.mapped import MappedFile
from memopt.passes import BlockSwap

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000
"""Bytes, as in the safetensors library."""


def load_swapped(
    factory: Callable[[], nn.Module],
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    passes: Sequence[Any] = (),
    **options: Any,
) -> Handle:
    """Build a model whose blocks' weights stay in a safetensors file and come when a block is used.

    Args:
        factory: makes the model; it is called without memory for parameters, and its initial values are not used.
        path: a ``.safetensors`` file, or the ``.index.json`` of several. They are never written to; weights that are
            trained are kept in memory.
        device: where to compute; default: the CPU.
        passes: further passes to apply.
        options: of the pass ``block_swap``: ``blocks``, ``level``, ``resident``, ``prefetch``.

    Returns:
        The handle of the passes; ``handle.model`` is the model, in eval mode.

    Raises:
        InputError: the file is not one of this model: names, shapes or types differ.
        NothingToDo: the model has no blocks.
    """
    from accelerate import init_empty_weights

    swap = BlockSwap(to="disk", device=None if device is None else str(device), **options)
    stored = read_tensors(path)
    with init_empty_weights(include_buffers=False):
        model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"load_swapped needs a function that makes a torch.nn.Module, not a {type(model).__name__}")
    _fill(model, stored, str(path))
    _into_memory(model.eval(), swap.swapped(model))
    return apply(model, [swap, *passes])


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of several by their index, as parts of mapped files.

    Raises:
        InputError: it is not such a file.
    """
    path = Path(path)
    if not path.name.endswith(".index.json"):
        return _read(path)
    try:
        names = set(json.loads(path.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not the index of safetensors files: {error}") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise InputError(f"{path} names files outside its folder")
    found: dict[str, Tensor] = {}
    for name in sorted(names):
        found.update(_read(path.parent / name))
    return found


def _read(path: Path) -> dict[str, Tensor]:
    file = MappedFile.existing(path)
    length = bytearray(8)
    try:
        file.fill(0, length)
        size = int.from_bytes(length, "little")
        if not 2 <= size <= min(file.bytes - 8, _LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        text = bytearray(size)
        file.fill(8, text)
        header = json.loads(bytes(text), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        parts = {name: _part(**entry) for name, entry in header.items()}
        end = 0
        for _, _, start, stop in sorted(parts.values(), key=lambda part: part[2:]):
            if start != end:
                raise ValueError(f"its tensors do not lie one after another at byte {end}")
            end = stop
        if end != file.bytes - 8 - size:
            raise ValueError(f"its tensors end at byte {end} of {file.bytes - 8 - size}")
        return {
            name: file.tensor(kind, 8 + size + start, shape.numel()).view(shape) if stop > start else torch.empty(shape)
            for name, (kind, shape, start, stop) in parts.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError, MemoptError) as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands in its header twice")
    return dict(pairs)


def _part(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[torch.dtype, torch.Size, int, int]:
    """Type, shape and bytes of a tensor."""
    if dtype not in _DTYPES:
        raise ValueError(f"torch has no type for {dtype}")
    kind, size, (start, stop) = _DTYPES[dtype], torch.Size(shape), data_offsets
    if any(n < 0 for n in size) or start < 0 or stop - start != size.numel() * kind.itemsize:
        raise ValueError(f"a tensor of shape {shape} cannot lie in bytes {start} to {stop}")
    return kind, size, start, stop


def _fill(model: nn.Module, stored: Mapping[str, Tensor], path: str) -> None:
    """Give the model's parameters and buffers what the file has; ties of parameters stay."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter.untyped_storage()._cdata, []).append(name)
    missing, places = [], []
    for names in groups.values():
        given = [name for name in names if name in stored]
        if not given:
            missing.append(names[0])
        elif any(not torch.equal(stored[name], stored[given[0]]) for name in given[1:]):
            raise InputError(f"{path} has different values for {' and '.join(given)}, which are one in the model")
        else:
            places.append((names, given[0]))
    buffers = dict(model.named_buffers())
    persistent = set(model.state_dict(keep_vars=True))
    missing += [name for name in buffers if name in persistent and name not in stored]
    unknown = set(stored) - {name for names, _ in places for name in names} - set(buffers)
    for verb, names in (("has no", missing), ("has unknown", sorted(unknown))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise InputError(f"{path} {verb} {', '.join(names[:5])}{more}: it is not of this {type(model).__name__}")
    for names, first in [*places, *(([name], name) for name in buffers if name in stored)]:
        value = stored[first]
        made: Any = value.clone() if names[0] in buffers else None
        for name in names:
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            old: Tensor = getattr(module, last)
            if old.shape != value.shape or old.dtype != value.dtype:
                raise InputError(
                    f"{name} is {list(value.shape)} {value.dtype} in {path}, and {list(old.shape)} {old.dtype} in "
                    f"{type(model).__name__}"
                )
            if name in buffers:
                module._buffers[last] = made
            else:
                made = made if made is not None else nn.Parameter(value, requires_grad=old.requires_grad)
                module._parameters[last] = made


def _into_memory(model: nn.Module, swapped: set[int]) -> None:
    """Copy the parameters that are in no block: nobody would bring them in."""
    for parameter in model.parameters():
        if id(parameter) not in swapped and MappedFile.of(parameter.data) is not None:
            parameter.data = parameter.data.clone()
