"""What a run says and records: progress, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from memopt.checkpoints import write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from memopt.training import Trainer

GIB = 1 << 30


def bar(console: Console) -> Progress:
    """Progress bars, whose tasks have a ``status``; nothing where there is no terminal to draw them on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


class RunLog:
    """Progress on the terminal and metrics in the run folder; silent in all processes but the main one.

    ``metrics.jsonl`` has one line per step with its loss; the last line of each group of ``log_every`` steps also has
    the learning rate, samples per second, the peak of allocated device memory since the line before, reserved device
    memory, process memory (bytes), and a warning if there was one.
    """

    def __init__(self, out: Path, steps: int, *, main: bool) -> None:
        from rich.console import Console

        self.out, self.steps, self.main = out, steps, main
        self.recorded: list[int] = []
        """Steps whose losses are in ``losses``."""
        self.losses: list[float] = []
        self._console = Console(quiet=not main, soft_wrap=True)
        self._progress = bar(self._console)
        self._task = self._progress.add_task("training", total=steps, status="")
        self._board: Any = None
        self._metrics: Any = None
        self._process = psutil.Process()
        self._said = 0.0
        self._device_peak = 0

    def file(self, name: str) -> Path:
        """A path in the run folder."""
        return self.out / name

    def say(self, text: str) -> None:
        """A line for the user."""
        self._console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """A warning for the user."""
        self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)

    def rewind(self, step: int) -> None:
        """Keep the metrics of the first ``step`` steps; what a killed run wrote beyond its checkpoint is done again."""
        if not self.main:
            return
        path = self.file("metrics.jsonl")
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
                number, loss = int(entry["step"]), float(entry["loss"])
            except (ValueError, KeyError, TypeError):
                continue  # cut off in the middle of a line
            if number <= step:
                kept.append(line)
                self.recorded.append(number)
                self.losses.append(loss)
        if len(kept) < step:
            self.warn(f"{path} is damaged: {step - len(kept)} of the first {step} steps are missing from it")
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._metrics = path.open("a")

    def start(self, trainer: Trainer) -> None:
        """Say what is about to run."""
        if not self.main:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=trainer.step + 1)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        processes = f", {trainer.world} processes" if trainer.world > 1 else ""
        self.say(
            f"{trainer.recipe.name}: {parameters:,} parameters on {trainer.accelerator.device}{processes}, "
            f"{trainer.size:,} samples, batch {trainer.config.batch_size}, step {trainer.step} of {self.steps}; "
            f"run folder {self.out}"
        )
        if trainer.handle.passes:
            self.say(str(trainer.handle.report()))
        self._progress.start()
        self._progress.update(self._task, completed=trainer.step)

    def record(
        self, step: int, losses: list[float], *, lr: float, samples_per_second: float, warning: str | None = None
    ) -> None:
        """Write the losses of the steps up to ``step``, and what goes with the last of them."""
        if not self.main:
            return
        more = {
            "lr": lr,
            "samples_per_second": round(samples_per_second, 3),
            "device_peak_bytes": self._new_device_peak(),
            "device_reserved_bytes": torch.cuda.memory_reserved() if torch.cuda.is_available() else 0,
            "process_bytes": self._process.memory_info().rss,
        }
        with_last = more if warning is None else {**more, "warning": warning}
        first = step - len(losses) + 1
        for i, loss in enumerate(losses):
            entry = {"step": first + i, "loss": loss, **(with_last if i == len(losses) - 1 else {})}
            self._metrics.write(json.dumps(entry) + "\n")
            self._board.add_scalar("loss", loss, first + i)
        self._metrics.flush()
        for name, value in more.items():
            self._board.add_scalar(name, value, step)
        self.recorded.extend(range(first, step + 1))
        self.losses.extend(losses)
        mean = sum(losses) / len(losses)
        device = f"  device {more['device_peak_bytes'] / GIB:.2f} GiB" if more["device_peak_bytes"] else ""
        host = f"process {more['process_bytes'] / GIB:.2f} GiB"
        status = f"loss {mean:.4f}  {samples_per_second:.1f} samples/s{device}  {host}"
        self._progress.update(self._task, completed=step, status=status)
        # Where there is no terminal to draw a bar on, a line now and then keeps a log readable.
        if not self._console.is_terminal and (time.monotonic() - self._said > 10 or step == self.steps):
            self._said = time.monotonic()
            self.say(f"step {step}/{self.steps}  {status}")
        if warning is not None:
            self.warn(warning)

    def summarize(self) -> None:
        """Say how the run went: the loss of its first and last tenth, the peak of its memory, where it is."""
        if not self.losses:
            return
        tenth = max(1, len(self.losses) // 10)
        first, last = (sum(part) / tenth for part in (self.losses[:tenth], self.losses[-tenth:]))
        ratio = f" (ratio {last / first:.3f})" if first else ""
        self._new_device_peak()
        device = f"device {self._device_peak / GIB:.2f} GiB, " if self._device_peak else ""
        self.say(
            f"done: mean loss {first:.4f} in the first tenth, {last:.4f} in the last{ratio}; "
            f"peak memory: {device}process {_peak_process_bytes() / GIB:.2f} GiB; run folder {self.out}"
        )

    def _new_device_peak(self) -> int:
        """The most bytes that tensors took on the device since the last call, 0 without a GPU."""
        if not torch.cuda.is_available():
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._device_peak = max(self._device_peak, peak)
        return peak

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        for stream in (self._metrics, self._board):
            if stream is not None:
                stream.close()


def _peak_process_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
