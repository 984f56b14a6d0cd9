"""A plan: passes with their settings, for one model and one budget, and its form as TOML."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from memopt import files
from memopt.errors import InputError
from memopt.registry import Pass, exactness, resolve
from memopt.units import format_bytes

SCHEMA = 1


@dataclass(frozen=True)
class Fingerprint:
    """What of a model a plan depends on."""

    model: str
    """Class of the model."""
    parameters: int
    """Elements of all parameters."""
    blocks: Mapping[str, str] = field(default_factory=dict)
    """Class of each block, by path."""

    def difference(self, other: Fingerprint) -> str:
        """The first thing in which another is not like this, in words; empty if there is none."""
        if self.model != other.model:
            return f"it is a {other.model}, the plan is for a {self.model}"
        for path, kind in self.blocks.items():
            if other.blocks.get(path) != kind:
                there = f"is a {other.blocks[path]}" if path in other.blocks else "is not there"
                return f"block {path} {there}, in the plan it is a {kind}"
        if more := [path for path in other.blocks if path not in self.blocks]:
            return f"it has a block {more[0]}, of which the plan does not know"
        if self.parameters != other.parameters:
            return f"it has {other.parameters:,} parameters, the plan is for {self.parameters:,}"
        return ""


def fingerprint(model: nn.Module) -> Fingerprint:
    """That of a model, with passes applied or not."""
    from memopt.blocks import find_blocks

    return Fingerprint(
        type(model).__name__,
        sum(p.numel() for p in model.parameters()),
        {path: type(model.get_submodule(path)).__name__ for path in find_blocks(model)},
    )


@dataclass(frozen=True)
class Plan:
    """Passes that keep a step within a budget. ``memopt.apply(model, plan)`` applies them."""

    passes: tuple[Pass, ...]
    peak: int
    """Bytes at the peak of the step with these passes, profiled on fake tensors."""
    seconds: float
    """Estimated time of the step, from the hardware's figures."""
    budget: int
    """Bytes that were asked for."""
    plain_peak: int
    """Bytes at the peak without any passes."""
    plain_seconds: float
    """Estimated time without them."""
    fingerprint: Fingerprint
    inputs: str
    """What the model was profiled with."""
    train: bool
    device: str
    hardware: str
    reasons: tuple[str, ...] = ()
    """Why these passes: what was looked at, in order."""

    @property
    def exact(self) -> bool:
        """Whether results stay those of the plain model (to rounding)."""
        return all(pass_.exact for pass_ in self.passes)

    def check(self, model: nn.Module) -> None:
        """Raise an InputError that names the difference if the plan was made for another model."""
        if difference := self.fingerprint.difference(fingerprint(model)):
            raise InputError(f"this plan does not fit the model: {difference}. Plan anew for it (memopt.plan).")

    def __str__(self) -> str:
        step = "training step" if self.train else "forward"
        slower = self.seconds / self.plain_seconds - 1 if self.plain_seconds else 0.0
        lines = [
            f"{self.fingerprint.model}: {step} on {self.device}, {self.inputs}",
            f"budget {format_bytes(self.budget)}, predicted peak {format_bytes(self.peak)} "
            f"({self.peak / self.plain_peak:.1%} of the plain {format_bytes(self.plain_peak)})",
            f"estimated time {slower:+.1%} against plain, on {self.hardware}",
            "passes:" if self.passes else "passes: none needed",
        ]
        for pass_ in self.passes:
            lines.append(f"  {describe(pass_)} ({exactness(pass_)})")
            if not pass_.exact:
                lines.append(f"    changes: {type(pass_).changes}")
        lines += [f"because {reason}" for reason in self.reasons]
        return "\n".join(lines)

    def save(self, file: str | Path) -> None:
        """Write the plan as TOML, to be read, changed and loaded again."""
        files.write(Path(file), to_toml(self))

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """A plan that ``save`` wrote, perhaps changed since.

        Raises:
            InputError: it cannot be read, or is no plan; unknown passes and options are named.
        """
        return from_toml(file)


def describe(pass_: Pass) -> str:
    """A pass in a line, with long lists of blocks cut short."""
    options = []
    for f in dataclasses.fields(pass_):
        value = getattr(pass_, f.name)
        if value == f.default:
            continue
        if isinstance(value, tuple) and len(value) > 4:
            options.append(f"{f.name}={value[0]} ... {value[-1]} ({len(value)} blocks)")
        elif isinstance(value, tuple):
            options.append(f"{f.name}={', '.join(value)}")
        else:
            options.append(f"{f.name}={value}")
    return f"{type(pass_).name}: {'; '.join(options)}" if options else type(pass_).name


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value)  # a basic string of TOML is one of JSON
    raise InputError(f"a plan cannot hold the option {value!r}, which has no form as text")


def to_toml(plan: Plan) -> str:
    """The plan as text. Passes come last, one table each, so that they are easy to change."""
    head = {
        "schema": SCHEMA,
        "budget": format_exact(plan.budget),
        "peak": format_exact(plan.peak),
        "plain_peak": format_exact(plan.plain_peak),
        "seconds": plan.seconds,
        "plain_seconds": plan.plain_seconds,
        "train": plan.train,
        "device": plan.device,
        "hardware": plan.hardware,
        "inputs": plan.inputs,
        "reasons": list(plan.reasons),
    }
    lines = ["# A plan of memopt. The passes below may be changed; the figures above them then no longer hold."]
    lines += [f"{name} = {_value(value)}" for name, value in head.items()]
    lines += ["", "[model]", f"class = {_value(plan.fingerprint.model)}", f"parameters = {plan.fingerprint.parameters}"]
    lines += ["", "[model.blocks]"]
    lines += [f"{_value(path)} = {_value(kind)}" for path, kind in plan.fingerprint.blocks.items()]
    for pass_ in plan.passes:
        lines += ["", "[[passes]]", f"name = {_value(type(pass_).name)}"]
        for f in dataclasses.fields(pass_):
            value = getattr(pass_, f.name)
            if value != f.default and value is not None:
                lines.append(f"{f.name} = {_value(value)}")
    return "\n".join(lines) + "\n"


def format_exact(size: int) -> str:
    """Bytes without loss: ``"1073741824 B"``."""
    return f"{size} B"


def from_toml(file: str | Path) -> Plan:
    """As :meth:`Plan.load`."""
    from memopt.units import parse_bytes

    try:
        data = _toml(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a plan: {error}") from None
    try:
        if data["schema"] != SCHEMA:
            raise InputError(f"{file} has plan schema {data['schema']}; this memopt reads schema {SCHEMA}")
        model = data["model"]
        blocks = {str(path): str(kind) for path, kind in model.get("blocks", {}).items()}
        made = Fingerprint(str(model["class"]), int(model["parameters"]), blocks)
        tables: Sequence[Any] = data.get("passes", [])
        passes = []
        for table in tables:
            options = {key: value for key, value in table.items() if key != "name"}
            passes += resolve({table["name"]: options})
        return Plan(
            passes=tuple(passes),
            peak=parse_bytes(data["peak"], "peak"),
            seconds=float(data["seconds"]),
            budget=parse_bytes(data["budget"], "budget"),
            plain_peak=parse_bytes(data["plain_peak"], "plain_peak"),
            plain_seconds=float(data["plain_seconds"]),
            fingerprint=made,
            inputs=str(data["inputs"]),
            train=bool(data["train"]),
            device=str(data["device"]),
            hardware=str(data["hardware"]),
            reasons=tuple(map(str, data.get("reasons", []))),
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is no whole plan: {type(error).__name__}: {error}") from None


def _toml(text: str) -> dict[str, Any]:
    reader: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    found: dict[str, Any] = reader.loads(text)
    return found
