"""Checkpoints that survive being killed at any moment, and are never half loaded.

A checkpoint is a folder ``step_00000100`` with ``model.safetensors``, ``ema.safetensors``, ``optimizer.pt`` (read with
``weights_only=True``), ``state.json`` and ``manifest.json``, which holds the size and SHA-256 of each of the others.
It is written under another name, flushed to the disk, and renamed as the last act: a folder with the right name is
whole unless something altered it later, and that the manifest tells. Reading takes the newest whole one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memopt.errors import InputError, MemoptError

MANIFEST = "manifest.json"
ESSENTIAL = ("model.safetensors", "optimizer.pt", "state.json")
_PARTIAL = ".partial-"


class CheckpointError(MemoptError):
    """A checkpoint could not be written, or none could be read."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    *,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` and drop all but the newest ``keep``.

    Args:
        folder: where checkpoints live; made if it does not exist.
        modules: file stem to module ("model", "ema"); weights are written as safetensors.
        state: anything JSON can hold.

    Raises:
        CheckpointError: the disk is full or unwritable; earlier checkpoints are untouched.
    """
    target = folder / f"step_{step:08d}"
    partial = folder / f"{_PARTIAL}{target.name}"
    try:
        _write(partial, modules, optimizer, {**state, "step": step})
        if target.exists():  # a broken one of the same step, which a resumed run has passed again
            target.rename(folder / f"{_PARTIAL}old-{target.name}")
        partial.rename(target)
        _flush(folder)
    except Exception as error:
        if not isinstance(error, OSError) and not _is_write_error(error):
            raise
        shutil.rmtree(partial, ignore_errors=True)
        older = _names(folder)
        left = f"The one before it, {older[-1].name}, is untouched" if older else "There is none before it"
        raise CheckpointError(
            f"could not save the checkpoint of step {step} in {folder}: {error}. {left}. "
            "When it can be written, go on with --resume."
        ) from error
    for old in _names(folder)[:-keep]:
        _discard(old)
    clean(folder)
    return target


def discard_after(folder: Path, step: int) -> None:
    """Remove the checkpoints beyond ``step``: broken ones, which a resumed run will write again."""
    for path in _names(folder):
        if int(path.name.removeprefix("step_")) > step:
            _discard(path)
    clean(folder)


def exist(folder: Path) -> bool:
    """Whether there is any checkpoint, whole or not."""
    return bool(_names(folder))


def _discard(path: Path) -> None:
    # Renamed first: a folder with a checkpoint's name is never half deleted.
    path.rename(path.with_name(f"{_PARTIAL}old-{path.name}"))


def clean(folder: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint, or None. Each broken one on the way is named to ``warn`` and skipped."""
    for path in reversed(_names(folder)):
        if broken := verify(path):
            warn(f"checkpoint {path} is broken ({broken}); trying the one before it")
            continue
        state = json.loads((path / "state.json").read_text())
        return Checkpoint(path, state["step"], state)
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file is as it was written."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        if missing := [name for name in ESSENTIAL if name not in files]:
            return f"{MANIFEST} does not list {', '.join(missing)}"
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} was altered: its checksum differs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def is_one(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint, or its manifest."""
    return _named(folder) or (folder / MANIFEST).is_file()


def step_of(digest: str, *places: Path) -> int | None:
    """The step of a checkpoint that has a file with this SHA-256, one of ``places`` or in one; None if none has."""
    for folder in (folder for place in places for folder in (place, *reversed(_names(place)))):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            listed = json.loads((folder / MANIFEST).read_text())["files"].values()
            if any(entry["sha256"] == digest for entry in listed):
                return int(json.loads((folder / "state.json").read_text())["step"])
    return None


def load_weights(file: Path, module: nn.Module) -> None:
    """Load safetensors weights into a module; raise before touching it if they are another model's.

    Raises:
        InputError: tensors missing, unknown or of another shape; names them.
    """
    from safetensors import safe_open
    from safetensors.torch import load_model

    with safe_open(file, framework="pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        tied = stored.metadata() or {}
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    problems = [
        f"{name} is not in the file" for name in expected if name not in shapes and tied.get(name) not in shapes
    ]
    problems += [f"{name} is not in the model" for name in shapes if name not in expected]
    problems += [
        f"{name} is {list(shapes[name])} in the file and {list(shape)} in the model"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(f"{file} holds the weights of another model: {shown}. Use the preset it was trained with.")
    load_model(module, file)


def publish(source: Path, target: Path) -> None:
    """Put a copy of a file in place atomically."""
    partial = target.with_name(f"{_PARTIAL}{target.name}")
    shutil.copyfile(source, partial)
    partial.replace(target)


def write_text(target: Path, text: str) -> None:
    """Write a text file atomically."""
    partial = target.with_name(f"{_PARTIAL}{target.name}")
    partial.write_text(text)
    partial.replace(target)


def _write(
    partial: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    from safetensors.torch import save_model

    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, module in modules.items():
        save_model(module, str(partial / f"{name}.safetensors"))
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    files = sorted(partial.iterdir())
    manifest = {"files": {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for file in [*files, partial / MANIFEST, partial]:
        _flush(file)


def _is_write_error(error: Exception) -> bool:
    """Failed writes that libraries report in their own words: safetensors (Rust) and torch.save (C++)."""
    from safetensors import SafetensorError

    return isinstance(error, SafetensorError) or (isinstance(error, RuntimeError) and "writ" in str(error))


def _names(folder: Path) -> list[Path]:
    return sorted(filter(_named, folder.glob("step_*")))


def _named(path: Path) -> bool:
    return re.fullmatch(r"step_\d{8,}", path.name) is not None and path.is_dir()


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot flush a folder; the rename is atomic all the same.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
