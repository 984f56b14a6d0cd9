"""What a memory profile says: plain data with a stable JSON form, and ways to show it.

All sizes are bytes. A *storage* is one allocation; tensors that are views of one another share it and it counts once.
Every storage is in one of six categories:

- ``parameters``, ``buffers``: those of the model;
- ``optimizer_states``: what the optimizer keeps between steps, and a moving average of the weights;
- ``gradients``: the ``.grad`` of parameters and inputs;
- ``activations``: kept for backward, by autograd or by what a custom function put aside;
- ``temporaries``: everything else: inputs, outputs, values in flight.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt import files
from memopt.errors import InputError

CATEGORIES = ("parameters", "buffers", "optimizer_states", "gradients", "activations", "temporaries")
SCHEMA = 1
"""Version of the JSON form; it changes when a key changes its meaning or goes."""


@dataclass(frozen=True)
class TensorInfo:
    """One storage that was alive at the peak, by the tensor that brought it into being."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    """As ``float32``."""
    category: str
    op: str
    """The operation that made it, as ``aten.convolution``; empty if it was there before the step."""
    module: str
    """Path of the module that made it, or whose parameter, buffer, gradient or state it is; "" is the model."""
    phase: str
    """When it was made: ``start`` (before the step), ``forward``, ``backward``, ``optimizer``."""


@dataclass(frozen=True)
class Skip:
    """A tensor that waits: between two of its uses in forward, many other modules run."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    """Path of the module it was made in."""
    used_by: str
    """Path of the module that uses it after the longest wait."""
    waits: int
    """Calls of leaf modules that begin between the two uses."""
    born: int
    """Operation at which it came into being, counted from the start of the step."""
    waits_from: int
    """Operation of the last use before the wait."""
    waits_until: int
    """Operation that uses it after the wait."""
    kept: bool
    """Whether it is also kept for backward."""


@dataclass(frozen=True)
class ModuleNode:
    """One module in the tree of what is kept for backward."""

    path: str
    """As in ``named_modules()``; "" is the model itself."""
    type: str
    kept: int
    """Bytes kept for backward at the end of forward that were made inside it, its children included."""
    own: int
    """Those made by the module itself, outside its children."""
    parameters: int
    """Bytes of its parameters, its children's included; a shared parameter counts once in each module that holds it."""
    children: tuple[ModuleNode, ...] = ()

    def walk(self, depth: int = 0) -> Iterator[tuple[int, ModuleNode]]:
        """This node and all below it, with their depth, parents first."""
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)


@dataclass(frozen=True)
class Timeline:
    """Live bytes after every change, by category. All columns have one length; point i is the state after change i."""

    ops: tuple[int, ...]
    """The operation that the change belongs to, counted from the start of the step; never decreases."""
    bytes: Mapping[str, tuple[int, ...]]
    """One column for each of ``CATEGORIES``; at every point they sum to ``total``."""
    total: tuple[int, ...]
    phases: tuple[tuple[str, int, int], ...]
    """(name, first operation, operation after the last), in order: forward, backward, optimizer."""


@dataclass(frozen=True)
class MemoryReport:
    """Where the bytes of one step go. ``print(report)`` shows it; see the module for the categories."""

    model: str
    """Class of the model."""
    train: bool
    """A training step (forward, backward, optimizer), or inference (forward without gradients)."""
    device: str
    """The kind of device it speaks of: ``cpu`` or ``cuda``."""
    real: bool
    """Measured on a true step; otherwise computed on fake tensors."""
    inputs: str
    """What the model was called with."""
    passes: tuple[str, ...]
    """The passes that were applied."""
    rounding: int
    """Every storage counts as a multiple of this many bytes; 1 counts them as they are."""
    peak: int
    """The most bytes alive at once on the device."""
    peak_point: int
    """The first point of the timeline at which they are."""
    peak_phase: str
    peak_op: str
    peak_module: str
    peak_by_category: Mapping[str, int]
    """Their sum is ``peak``."""
    start_by_category: Mapping[str, int]
    """Alive before the step."""
    kept: int
    """Bytes kept for backward at the end of forward: the activations."""
    off_device: Mapping[str, int]
    """The most bytes at once on each other tier (``cpu``, ``disk``)."""
    largest: tuple[TensorInfo, ...]
    """The largest storages alive at the peak, largest first."""
    modules: ModuleNode
    skips: tuple[Skip, ...]
    """Largest first."""
    timeline: Timeline
    assumptions: tuple[str, ...]
    """What was assumed about a device that is not there, and what could not be followed."""
    seconds: float
    """How long the profile took."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types, with its schema version."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def save_json(self, file: str | Path) -> None:
        """Write the report; ``load`` reads it back."""
        files.write(Path(file), json.dumps(self.to_dict(), separators=(",", ":")))

    @classmethod
    def load(cls, file: str | Path) -> MemoryReport:
        """A report that ``save_json`` wrote.

        Raises:
            InputError: the file is missing, is no report, or has another schema version.
        """
        try:
            data = json.loads(Path(file).read_text(encoding="utf-8"))
            version = data.pop("schema")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{file} is not a memory report: {error!r}") from None
        if version != SCHEMA:
            raise InputError(f"{file} has report schema {version}; this memopt reads schema {SCHEMA}")
        try:
            return cls(
                **{
                    **data,
                    "passes": tuple(data["passes"]),
                    "assumptions": tuple(data["assumptions"]),
                    "largest": tuple(TensorInfo(**{**t, "shape": tuple(t["shape"])}) for t in data["largest"]),
                    "skips": tuple(Skip(**{**s, "shape": tuple(s["shape"])}) for s in data["skips"]),
                    "modules": _node(data["modules"]),
                    "timeline": _timeline(data["timeline"]),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file} is not a whole memory report: {error!r}") from None

    def plot(self, file: str | Path) -> None:
        """A PNG of the timeline: live bytes stacked by category, the peak marked, phases shaded."""
        from memopt.memory.show import plot_timeline

        plot_timeline(self, Path(file))

    def save_html(self, file: str | Path) -> None:
        """One self-contained HTML page: summary, timeline, module tree, largest tensors, skip connections."""
        from memopt.memory.html import render

        files.write(Path(file), render(self))

    def __str__(self) -> str:
        from memopt.memory.show import summary

        return summary(self)


def _node(data: Mapping[str, Any]) -> ModuleNode:
    return ModuleNode(**{**data, "children": tuple(_node(child) for child in data["children"])})


def _timeline(data: Mapping[str, Any]) -> Timeline:
    return Timeline(
        ops=tuple(data["ops"]),
        bytes={name: tuple(column) for name, column in data["bytes"].items()},
        total=tuple(data["total"]),
        phases=tuple((name, first, end) for name, first, end in data["phases"]),
    )
