"""Nested values, taken apart and put together: tuples, dicts, dataclasses, outputs of libraries."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

Path = tuple[str, ...]
Make = Callable[[Sequence[Any]], Any]


def flatten(value: Any) -> tuple[list[Path], list[Any], Make]:
    """The leaves of a value with the way to each, and a function that makes such a value of other leaves.

    What torch's pytree knows is taken apart, as outputs of transformers and diffusers are, and so are dataclasses.
    """
    if torch.compiler.is_compiling():  # dynamo knows pytree, and not what follows
        leaves, spec = tree_flatten(value)
        return [(str(i),) for i in range(len(leaves))], leaves, lambda leaves: tree_unflatten(list(leaves), spec)
    root = id(value)  # pytree keeps the function in a cycle, which must not hold tensors
    children, spec = tree_flatten(value, is_leaf=lambda inner: id(inner) != root)
    if children and children[0] is value:  # for pytree a leaf
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return [()], [value], lambda leaves: leaves[0]
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        paths, leaves, make = flatten({name: getattr(value, name) for name in names})
        return paths, leaves, lambda leaves: _like(value, make(leaves))
    keys = list(value) if isinstance(value, Mapping) else range(len(children))
    parts = [flatten(child) for child in children]

    def rebuild(leaves: Sequence[Any]) -> Any:
        made, start = [], 0
        for paths, _, make in parts:
            made.append(make(leaves[start : start + len(paths)]))
            start += len(paths)
        return tree_unflatten(made, spec)

    names = [str(key) for key in keys]
    return (
        [(name, *path) for name, (paths, _, _) in zip(names, parts, strict=True) for path in paths],
        [leaf for _, leaves, _ in parts for leaf in leaves],
        rebuild,
    )


def _like(value: Any, fields: dict[str, Any]) -> Any:
    twin = copy.copy(value)
    for name, field in fields.items():
        object.__setattr__(twin, name, field)  # of a frozen one, too
    return twin
