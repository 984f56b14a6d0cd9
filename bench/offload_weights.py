"""The first table of bench/offload.py: weights of a model in a file, with memopt and with accelerate.

Each method runs in a process of its own, which this file is, too: it says what its process takes above the interpreter
with torch imported. All stay alive, and their forwards take turns, so that what else the machine does slows all alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
MIB = 1 << 20
LIMIT = 450 * MIB


@dataclass(frozen=True)
class Sizes:
    """Of the encoder: a block has 12 width² + 13 width weights."""

    width: int
    blocks: int
    tokens: int
    vocabulary: int = 1000

    @property
    def heads(self) -> int:
        return self.width // 64


FULL = Sizes(width=1664, blocks=24, tokens=128)
SMALL = Sizes(width=832, blocks=8, tokens=128)


class Block(nn.Module):
    """A pre-norm block: attention, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return out


class Encoder(nn.Module):
    """A transformer encoder as anybody would write it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.place = nn.Embedding(sizes.tokens, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.blocks))
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


# --- the methods: each makes a model of a safetensors file, with a folder for what it writes ----------------------


def _plain(sizes: Sizes, file: Path, folder: Path) -> nn.Module:
    from safetensors.torch import load_model

    model = Encoder(sizes).eval()
    load_model(model, file)
    return model


def _load_swapped(prefetch: int) -> Callable[[Sizes, Path, Path], nn.Module]:
    def make(sizes: Sizes, file: Path, folder: Path) -> nn.Module:
        import memopt

        return memopt.load_swapped(lambda: Encoder(sizes), file, resident=1, prefetch=prefetch).model

    return make


def _block_swap(sizes: Sizes, file: Path, folder: Path) -> nn.Module:
    import memopt

    model = _plain(sizes, file, folder)
    memopt.apply(model, [memopt.passes.BlockSwap(to="disk", folder=str(folder))])
    return model


def _disk_offload(sizes: Sizes, file: Path, folder: Path) -> nn.Module:
    """At its best, without ever loading the model: one weight after another goes into a file of accelerate's own."""
    from accelerate import disk_offload, init_empty_weights
    from accelerate.utils.offload import offload_weight, save_offload_index
    from safetensors import safe_open

    with init_empty_weights():
        model = Encoder(sizes).eval()
    index: dict[str, Any] = {}  # load_checkpoint_in_model cannot do it: where all is for the disk, it fails
    for name in model.state_dict():
        with safe_open(file, framework="pt") as stored:  # opened anew: what it has mapped counts as memory
            offload_weight(stored.get_tensor(name), name, str(folder), index=index)
    save_offload_index(index, str(folder))
    made: nn.Module = disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return made


def _dispatch(sizes: Sizes, file: Path, folder: Path) -> nn.Module:
    """From the file itself, as transformers asks for it: an index says where each weight is."""
    from accelerate import dispatch_model, init_empty_weights

    with init_empty_weights():
        model = Encoder(sizes).eval()
    index = {n: {"safetensors_file": str(file), "weight_name": n, "dtype": "float32"} for n in model.state_dict()}
    made: nn.Module = dispatch_model(model, {"": "disk"}, main_device="cpu", offload_index=index)
    return made


def _cpu_offload(sizes: Sizes, file: Path, folder: Path) -> nn.Module:
    from accelerate import cpu_offload

    made: nn.Module = cpu_offload(_plain(sizes, file, folder), execution_device=torch.device("cpu"))
    return made


PLAIN, SWAPPED = "plain", "memopt load_swapped, prefetch 1"
PEERS = ("accelerate disk_offload", "accelerate dispatch_model, index into the file")
METHODS: dict[str, Callable[[Sizes, Path, Path], nn.Module]] = {
    PLAIN: _plain,
    SWAPPED: _load_swapped(1),
    "memopt load_swapped, prefetch 0": _load_swapped(0),
    "memopt BlockSwap disk, of the loaded model": _block_swap,
    PEERS[0]: _disk_offload,
    PEERS[1]: _dispatch,
    "accelerate cpu_offload": _cpu_offload,
}


# --- a process of one method --------------------------------------------------------------------------------------


class Watch:
    """Samples this process's memory every 2 ms."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.base = self.peak = self.now()
        threading.Thread(target=self._run, daemon=True).start()

    def now(self) -> int:
        return int(self._process.memory_info().rss)

    def _run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    def take(self) -> dict[str, int]:
        """Above the start: the peak since the last call, and now."""
        now = self.now()
        peak, self.peak = max(self.peak, now), now
        return {"peak": peak - self.base, "resident": now - self.base}


def serve(name: str, sizes: Sizes, file: Path, folder: Path) -> None:
    """Make the model, then run a forward for each line of the standard input; each answers with a line of JSON."""
    watch = Watch()  # first of all: nothing but torch has been imported
    began = time.perf_counter()
    model = METHODS[name](sizes, file, folder)
    _say({"seconds": time.perf_counter() - began, **watch.take()})
    tokens = torch.arange(sizes.tokens).mul(7).remainder(sizes.vocabulary)[None]
    for _ in sys.stdin:
        began = time.perf_counter()
        with torch.no_grad():
            out = model(tokens)
        seconds = time.perf_counter() - began
        _say({"seconds": seconds, **watch.take(), "digest": hashlib.sha256(out.numpy().tobytes()).hexdigest()})


def make_file(sizes: Sizes, file: Path) -> None:
    from safetensors.torch import save_model

    torch.manual_seed(0)
    save_model(Encoder(sizes), str(file), metadata={"format": "pt"})  # accelerate warns without
    os.sync()


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


# --- all of them --------------------------------------------------------------------------------------------------


class Worker:
    """A process of this file."""

    def __init__(self, what: str, sizes: Sizes, file: Path, folder: Path) -> None:
        folder.mkdir()
        environment = {**os.environ, "TMPDIR": str(folder), "TQDM_DISABLE": "1"}
        threads = str(torch.get_num_threads())
        arguments = [sys.executable, __file__, what, json.dumps(asdict(sizes)), str(file), str(folder), threads]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.answers: list[dict[str, Any]] = []

    def ask(self) -> None:
        """Let it run a forward."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.hear()

    def hear(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")
        self.answers.append(json.loads(line))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary one for everything that is written."""
    with tempfile.TemporaryDirectory(prefix="memopt-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def table(small: bool, runs: int, progress: Callable[[str], None]) -> None:
    """Print it, and the two verdicts."""
    sizes = SMALL if small else FULL
    with folder() as home, contextlib.ExitStack() as stack:
        file = home / "model.safetensors"
        progress("weights: writing the model's file")
        maker = Worker("make", sizes, file, home / "make")
        stack.callback(maker.end)
        if maker.process.wait():
            raise RuntimeError("the model's file could not be made")
        workers: dict[str, Worker] = {}
        for i, name in enumerate(METHODS):
            progress(f"weights: {name} starts")
            with open(file, "rb", buffering=0) as stream:  # so that all find it in the system's cache
                while stream.read(1 << 24):
                    pass
            workers[name] = Worker(name, sizes, file, home / str(i))
            stack.callback(workers[name].end)
            workers[name].hear()
        os.sync()  # what was written is on the disk before anything is timed
        for run in range(runs + 1):  # the first warms up
            for name in [*METHODS][run % len(METHODS) :] + [*METHODS][: run % len(METHODS)]:
                progress(f"weights: forward {run} of {runs}, {name}")
                workers[name].ask()
        answers = {name: worker.answers for name, worker in workers.items()}
        _print(sizes, file.stat().st_size, answers)


def _print(sizes: Sizes, size: int, answers: dict[str, list[dict[str, Any]]]) -> None:
    seconds = {name: statistics.median(a["seconds"] for a in found[2:]) for name, found in answers.items()}
    peaks = {name: max(a["peak"] for a in found) for name, found in answers.items()}
    digest = answers[PLAIN][1]["digest"]
    runs = len(answers[PLAIN]) - 2
    print(
        f"\nA pre-norm encoder, {sizes.blocks} blocks of {_block_bytes(sizes) / MIB:.1f} MiB, "
        f"{size / (1 << 30):.2f} GiB of float32 in one safetensors file; {sizes.tokens} tokens; memory of the process "
        f"above the interpreter with torch; median of {runs} interleaved forwards. A thread that reads is not one of "
        "torch's:\n\n"
        "| method | start-up, s | peak of the start, MiB | peak of forwards, MiB | resident after, MiB | forward, s "
        "| ratio to plain | fastest, s | output |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, (start, *forwards) in answers.items():
        same = all(a["digest"] == digest for a in forwards)
        print(
            f"| {name} | {start['seconds']:.1f} | {start['peak'] / MIB:.0f} "
            f"| {max(a['peak'] for a in forwards) / MIB:.0f} | {forwards[-1]['resident'] / MIB:.0f} "
            f"| {seconds[name]:.2f} | {seconds[name] / seconds[PLAIN]:.2f} "
            f"| {min(a['seconds'] for a in forwards[1:]):.2f} | {'bitwise equal' if same else 'DIFFERS'} |"
        )
    print(
        f"\n{SWAPPED}: peak {peaks[SWAPPED] / MIB:.0f} MiB above the interpreter, demanded at most {LIMIT // MIB}: "
        f"{'holds' if peaks[SWAPPED] <= LIMIT else 'FAILS'}."
    )
    for peer, demanded in zip(PEERS, ("demanded at most 1", "the same, not demanded"), strict=True):
        pairs = [a["seconds"] / b["seconds"] for a, b in zip(answers[SWAPPED][2:], answers[peer][2:], strict=True)]
        ratio = seconds[SWAPPED] / seconds[peer]
        print(
            f"Its forward takes {ratio:.2f} times as long as that of {peer} (round by round {min(pairs):.2f} to "
            f"{max(pairs):.2f}), {demanded}: {'holds' if ratio <= 1 else 'FAILS'}.",
            flush=True,
        )


def _block_bytes(sizes: Sizes) -> int:
    with torch.device("meta"):
        return sum(p.nbytes for p in Block(sizes.width, sizes.heads).parameters())


if __name__ == "__main__":
    _what, _sizes, _file, _folder, _threads = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    with contextlib.suppress(KeyboardInterrupt):
        if _what == "make":
            make_file(Sizes(**json.loads(_sizes)), Path(_file))
        else:
            serve(_what, Sizes(**json.loads(_sizes)), Path(_file), Path(_folder))
