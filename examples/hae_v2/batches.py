"""A split of slices in batches, shared among processes, each batch a file: work that is interrupted goes on after it.

Batches are the same whatever the number of processes, so their results are, too. A folder of batches holds
`settings.json`, everything that determines them: with other settings it is refused, never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import InputError

Arrays = dict[str, NDArray[Any]]


class Batches:
    """The results of a split, in files `batch_00000.safetensors` of named arrays.

    Args:
        folder: where they are; made if it does not exist.
        size: slices of the split.
        batch: slices of a batch.
        settings: whatever determines the results, as JSON holds it.

    Raises:
        InputError: the folder holds batches of other settings.
    """

    def __init__(self, folder: Path, size: int, batch: int, settings: dict[str, Any]) -> None:
        self.folder, self.size, self.batch = folder, size, batch
        settings = json.loads(json.dumps({**settings, "slices": size, "batch_size": batch}))
        file = folder / "settings.json"
        try:
            before = json.loads(file.read_text())
        except FileNotFoundError:
            before = None
        except ValueError:
            before = {}
        if before is not None and before != settings:
            other = [f"{k}={before.get(k)} there, {v} now" for k, v in settings.items() if before.get(k) != v]
            raise InputError(
                f"{folder} holds the batches of a run with other settings ({'; '.join(other) or 'unreadable'}): "
                "remove it, or choose another --out"
            )
        for left_over in folder.glob(".partial-batch*"):  # by a process that was killed; the folder is this run's alone
            left_over.unlink(missing_ok=True)
        if before is None:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(file, json.dumps(settings, indent=1).encode())

    def __len__(self) -> int:
        return -(-self.size // self.batch)

    def rows(self, number: int) -> range:
        """The slices of a batch."""
        return range(number * self.batch, min(self.size, (number + 1) * self.batch))

    def missing(self, needed: Iterable[str] = ()) -> list[int]:
        """Batches that are not there, or not whole, or lack one of the arrays needed."""
        names = set(needed)
        return [number for number in range(len(self)) if not self._whole(number, names)]

    def write(self, number: int, arrays: Arrays) -> None:
        """Keep the arrays of a batch, in one step."""
        from safetensors.numpy import save

        _replace(self._file(number), save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))

    def read(self, number: int, name: str) -> NDArray[Any]:
        """One array of a batch."""
        from safetensors import SafetensorError, safe_open

        file = self._file(number)
        try:
            with safe_open(file, framework="np") as stored:
                return np.asarray(stored.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} is missing or damaged ({error}): remove it and run the task again") from None

    def joined(self, name: str, axis: int = 0) -> NDArray[Any]:
        """One array of all batches, along the axis of slices."""
        return np.concatenate([self.read(number, name) for number in range(len(self))], axis=axis)

    def _file(self, number: int) -> Path:
        return self.folder / f"batch_{number:05d}.safetensors"

    def _whole(self, number: int, names: set[str]) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(number), framework="np") as stored:  # compares its length with its header's
                return names <= set(stored.keys())
        except (OSError, SafetensorError):
            return False


def _replace(file: Path, data: bytes) -> None:
    partial = file.with_name(f".partial-{file.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(file)
