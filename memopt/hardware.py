"""What a machine does in a second: measured once on this one, or taken from a table for one that is not here.

A plan weighs techniques against each other by time, and for that ratios matter more than figures: arithmetic against
memory, both against the way to the host. The table holds the makers' figures for dense arithmetic without sparsity, at
the shares that large matrix products and copies reach in practice (`REACHED`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memopt import files
from memopt.errors import InputError, MemoptError
from memopt.memory.cost import Cost

REACHED = 0.6
BESIDE = 0.1
"""Share of their time that copies beside a computation cost it: both use the device's memory."""
SCHEMA = 3


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and its way to host memory."""

    name: str
    flops: float
    """Floating-point operations per second of matrix products in float32."""
    narrow_flops: float
    """The same in bfloat16 and float16."""
    bandwidth: float
    """Bytes per second that the device reads and writes in its memory."""
    link: float
    """Bytes per second between the device and where passes move them, one way: a GPU's host, a CPU's files."""
    overlap: bool = False
    """Whether copies to and from the host run beside the computation."""
    launch: float = 0.0
    """Seconds that an operation takes, however small it is."""
    look: float = 0.0
    """Seconds that Python takes to look at an operation for a pass; 0 where the device works on meanwhile."""

    def __post_init__(self) -> None:
        for field in ("flops", "narrow_flops", "bandwidth", "link"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"hardware {self.name}: {field} must be positive, not {value!r}")
        for field in ("launch", "look"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"hardware {self.name}: {field} must not be negative, not {value!r}")

    def seconds(self, cost: Cost) -> float:
        """The time of one operation, or a lower bound of that of many."""
        arithmetic = (cost.flops - cost.narrow) / self.flops + cost.narrow / self.narrow_flops
        return max(arithmetic, cost.bytes / self.bandwidth) + cost.calls * self.launch

    def exposed(self, transferred: int, computing: float) -> float:
        """Seconds that copies of so many bytes add to a computation of so many seconds."""
        copying = transferred / self.link
        return max(BESIDE * copying, copying - computing) if self.overlap else copying


def _table(name: str, tflops: float, narrow: float, bandwidth: float, link: float) -> Hardware:
    return Hardware(
        name=name,
        flops=tflops * 1e12 * REACHED,
        narrow_flops=narrow * 1e12 * REACHED,
        bandwidth=bandwidth * 1e9 * REACHED,
        link=link * 1e9 * REACHED,
        overlap=True,
        launch=5e-6,
    )


KNOWN = {
    known.name: known
    for known in (
        _table("a100", 19.5, 312, 2039, 32),
        _table("h100", 67, 989, 3350, 64),
        _table("rtx3090", 35.6, 71, 936, 32),
        _table("rtx4090", 82.6, 165, 1008, 32),
        _table("t4", 8.1, 65, 320, 16),
    )
}
"""Devices by name: TFLOP/s in float32 and in half precision, GB/s of their memory and of PCI Express one way."""
DEFAULT = "a100"
"""What stands for CUDA where there is none."""


def hardware_for(given: Hardware | str | dict[str, Any] | None, device: str) -> Hardware:
    """The hardware that was given, as an object, a table or a name; None: this machine's, or the default's.

    Raises:
        InputError: there is no such name or key.
    """
    if isinstance(given, Hardware):
        return given
    if isinstance(given, str):
        if given not in KNOWN:
            raise InputError(f"unknown hardware {given!r}: choose one of {', '.join(KNOWN)}, or give its figures")
        return KNOWN[given]
    if given is not None:
        from memopt.config import build

        return build(Hardware, {"name": "given", **given}, what="hardware")
    if device == "cuda" and not torch.cuda.is_available():
        return KNOWN[DEFAULT]
    return this_machine(device)


def this_machine(device: str) -> Hardware:
    """What this machine does, measured within a few seconds the first time and kept in the user's cache folder."""
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    key = f"{name}, torch {torch.__version__}"
    file = _cache()
    known = _read(file)
    if key in known:
        try:
            return Hardware(**known[key])
        except (TypeError, InputError):
            pass
    found = measure(device, name)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"schema": SCHEMA, "measured": {**known, key: dataclasses.asdict(found)}}
        files.write(file, json.dumps(kept, indent=1))
    except (OSError, InputError):  # nothing is lost but the time
        pass
    return found


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "memopt" / "hardware.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
        measured = found["measured"] if found["schema"] == SCHEMA else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return measured if isinstance(measured, dict) else {}


def measure(device: str, name: str) -> Hardware:
    """Time large matrix products, copies and steps of tiny layers; each figure is the best of several."""
    n = 4096 if device == "cuda" else 768
    cuda = device == "cuda"

    def best(run: Callable[[], object], times: int = 5) -> float:
        run()
        found = math.inf
        for _ in range(times):
            _wait(cuda)
            began = time.perf_counter()
            run()
            _wait(cuda)
            found = min(found, time.perf_counter() - began)
        return found

    # What watches or limits memory where this is called would be measured, too.
    with _disable_current_modes(), torch.inference_mode():
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        wide = 2 * n**3 / best(lambda: a @ b)
        c, d = a.bfloat16(), b.bfloat16()
        narrow = 2 * n**3 / best(lambda: c @ d)
        large = torch.zeros(1 << (28 if cuda else 25), dtype=torch.uint8, device=device)
        other = torch.zeros_like(large)
        bandwidth = 2 * large.numel() / best(lambda: other.copy_(large))
        if cuda:
            host = torch.zeros(large.numel(), dtype=torch.uint8, pin_memory=True)
            link = large.numel() / best(lambda: host.copy_(large))
        else:
            link = max(1.0, 2 * large.numel() / _through_a_file(large, best))
        small = torch.zeros(16, device=device)
        alone = best(lambda: [small.add(1) for _ in range(1000)])
        with _Looking():
            look = (best(lambda: [small.add(1) for _ in range(1000)]) - alone) / 1000
    with _disable_current_modes():
        launch = _tiny_step(device, best)
    return Hardware(
        name=name,
        flops=wide,
        narrow_flops=narrow,
        bandwidth=bandwidth,
        link=link,
        overlap=cuda,
        launch=launch,
        look=0.0 if cuda else max(0.0, look),
    )


class _Looking(TorchDispatchMode):
    """Has a look at each operation and does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _tiny_step(device: str, best: Callable[..., float]) -> float:
    """Seconds an operation in forward and backward of layers with next to nothing to compute."""
    layers, each = 20, 6  # a linear layer's product, an activation; backward two products, a sum, the activation
    with torch.device(device), torch.random.fork_rng():
        model = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(16, 16), nn.GELU())))
        x = torch.zeros(4, 16, requires_grad=True)

    def step() -> None:
        model(x).sum().backward()
        model.zero_grad()

    return best(step) / (layers * each)


def _through_a_file(flat: torch.Tensor, best: Callable[..., float]) -> float:
    """Seconds for a tensor to be written to a file and read again, as the passes do it."""
    from memopt.transfer import Mover

    mover = Mover("disk")

    def run() -> None:
        parked = mover.out(flat)
        mover.worker.drain()  # else it would come back from the buffer that waits to be written
        parked.get()

    try:
        return best(run)
    except MemoptError:  # nowhere to write: what moves would take for ever
        return math.inf
    finally:
        mover.close()


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
