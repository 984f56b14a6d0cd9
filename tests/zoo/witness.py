"""Steps of a model as a loop runs them, and what independent witnesses say of their memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from memopt.memory.allocator import AllocatorPeak, allocator_peak

from .probe import leaves, loss_of


class Step:
    """One step, forward only or with backward and an optimizer's, that leaves no gradients behind.

    It begins in the midst of training: the optimizer has its states.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        train: bool,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Callable[[Any], Tensor] = loss_of,
    ) -> None:
        self.model, self.inputs, self.train, self.optimizer, self.loss = model, inputs, train, optimizer, loss

    def __call__(self) -> None:
        args, kwargs = self.inputs
        with torch.set_grad_enabled(self.train):
            output = self.model(*args, **kwargs)
            if self.train:
                loss = self.loss(output)
                del output
                loss.backward()
                del loss
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        for tensor in (*self.model.parameters(), *leaves(self.inputs)):
            tensor.grad = None

    def prepare(self) -> None:
        """Run it once, so that what a first step creates is there."""
        self.model.train(self.train)
        self()
        gc.collect()

    def states(self) -> list[Tensor]:
        return [] if self.optimizer is None else list(leaves(list(self.optimizer.state.values())))

    def allocator(self, device: str = "cpu") -> AllocatorPeak:
        self.prepare()
        held = [*self.model.parameters(), *self.model.buffers(), *leaves(self.inputs), *self.states()]
        return allocator_peak(self, held, device=device)

    def mem_tracker(self) -> int:
        """The peak that torch's MemTracker counts on the CPU."""
        self.prepare()
        tracker = MemTracker()
        tracker.track_external(self.model, self.optimizer, *leaves(self.inputs))
        with tracker:
            self()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def on_cuda(model: nn.Module, inputs: Any, *, train: bool) -> tuple[Any, AllocatorPeak, int, int]:
    """A prediction made on the CPU for a step on CUDA; the allocator's account of that step; its peak as
    ``torch.cuda.max_memory_allocated`` has it, and the peak of the bytes that were asked of the allocator. The model is
    on the GPU afterwards."""
    import memopt

    def optimizer() -> torch.optim.Optimizer | None:
        return torch.optim.AdamW(model.parameters()) if train else None

    predicted = memopt.profile(model, inputs, train=train, loss=loss_of, optimizer=optimizer(), device="cuda")
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().cuda(), inputs)
    step = Step(model.cuda(), moved, train=train, optimizer=optimizer())
    account = step.allocator("cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    requested = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    return predicted, account, torch.cuda.max_memory_allocated(), requested
