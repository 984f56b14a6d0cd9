"""Named entry points of a model run without autograd, and hand out their results in host memory.

Evaluation and sampling loops that forget ``torch.no_grad()`` keep every activation until the result is dropped, and
results that are collected over a data set stay on the device. This pass puts both right where a model is entered.

``forward`` is a training loop's entry point as well: in train mode it stays as it is. Other methods are called for
what they return, so they run without autograd in either mode.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memopt.core import Edit
from memopt.errors import InputError
from memopt.memory.ledger import active, moved, off_the_books
from memopt.nested import flatten
from memopt.registry import Claim, Context, Pass

GUARDS = {"no_grad": torch.no_grad, "inference": torch.inference_mode}


class _Depth(threading.local):
    value = 0


_DEPTH = _Depth()


@dataclass(frozen=True, kw_only=True)
class InferenceMode(Pass):
    """Evaluation and sampling keep nothing for backward; their results may leave the device at once."""

    name = "inference_mode"
    stage = "wrap"
    exact = True
    modes = frozenset({"infer"})
    needs = "a model with parameters"

    methods: tuple[str, ...] = ("forward",)
    """Entry points, such as ``sample`` or ``vae.decode``. ``forward`` counts while its module is in eval mode."""
    grad: Literal["no_grad", "inference"] = "no_grad"
    """``inference`` spares time as well; its results can take no part in training, nor can what is cached in it."""
    outputs: Literal["device", "cpu"] = "device"
    """Where the tensors of a result are: where they were made, or in host memory, those of a generator one by one."""

    def __post_init__(self) -> None:
        if self.grad not in GUARDS:
            raise InputError(f"inference_mode: grad {self.grad!r} is not one of {', '.join(GUARDS)}")
        if self.outputs not in ("device", "cpu"):
            raise InputError(f"inference_mode: outputs {self.outputs!r} is not one of device, cpu")
        if isinstance(self.methods, str) or not self.methods:
            raise InputError(f"inference_mode: methods must be a tuple of names, not {self.methods!r}")

    def plan(self, model: nn.Module, context: Context) -> list[Claim]:
        if not any(True for _ in model.parameters()):
            return []
        claims = []
        for name in dict.fromkeys(self.methods):
            path, _, method = name.rpartition(".")
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise InputError(
                    f"inference_mode: {type(model).__name__} has no module {path!r} (for {name})"
                ) from None
            found = inspect.getattr_static(type(module), method, None)
            if isinstance(found, (staticmethod, classmethod, property)):
                raise InputError(
                    f"inference_mode: {method!r} of {type(module).__name__} is a {type(found).__name__}, not a method "
                    "of one model. Name the methods that the loop calls."
                )
            if inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found):
                raise InputError(
                    f"inference_mode: {method!r} of {type(module).__name__} is async: other tasks run between its "
                    "parts, with or without autograd. Name the methods that it calls."
                )
            if not callable(getattr(type(module), method, None)):
                close = difflib.get_close_matches(method, [n for n in dir(type(module)) if n[0] != "_"], n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise InputError(f"inference_mode: {type(module).__name__} has no method {method!r}.{hint}")
            claims.append(Claim(path, "activations", method))
        return claims

    def apply(self, claims: Sequence[Claim], edit: Edit) -> None:
        counts, guard, to_cpu = edit.counts, GUARDS[self.grad], self.outputs == "cpu"

        @contextlib.contextmanager
        def entered() -> Iterator[bool]:
            """Without autograd; whether nobody was inside an entry point before."""
            _DEPTH.value += 1
            try:
                with guard():
                    yield _DEPTH.value == 1
            finally:
                _DEPTH.value -= 1

        def placed(result: Any, outermost: bool) -> Any:
            # What one entry point hands to another stays: only the loop's results leave.
            return _on_cpu(result, counts) if to_cpu and outermost else result

        def steps(generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            """As each is asked for; the caller's own code between two steps runs as it always does."""
            resume: Callable[[], Any] = functools.partial(next, generator)
            with contextlib.closing(generator):
                while True:
                    with entered() as outermost:
                        try:
                            result = placed(resume(), outermost)
                        except StopIteration as end:
                            return placed(end.value, outermost)
                        finally:
                            del resume  # an exception in it would hold this frame, which would hold it
                    try:
                        resume = functools.partial(generator.send, (yield result))
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        resume = functools.partial(generator.throw, error)

        def around(method: str) -> Callable[..., Any]:
            def run(module: nn.Module, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
                if method == "forward" and module.training:
                    return inner(*args, **kwargs)
                with entered() as outermost:
                    result = inner(*args, **kwargs)
                    return steps(result) if isinstance(result, GeneratorType) else placed(result, outermost)

            return run

        for claim in claims:
            edit.wrap(edit.module(claim.path), claim.part, around(claim.part))


def _on_cpu(value: Any, counts: Any) -> Any:
    """A nested value with its tensors in host memory."""
    _, leaves, make = flatten(value)
    copies: dict[int, Tensor] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i] = copies.get(id(leaf))
            if leaves[i] is None:
                leaves[i] = copies[id(leaf)] = _copy(leaf)
                counts["tensors moved"] += 1
    return make(leaves)


def _copy(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu" or not active():
        return tensor.to("cpu")
    # A ledger counts as if this CPU were the device: there the copy is another tensor, and not on the device.
    with off_the_books():
        copy = tensor.clone()
    moved(copy, "cpu")
    return copy
