"""A small device, simulated: when it runs out, and what is left then."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import memopt
from memopt.errors import InputError
from memopt.memory import limit
from memopt.memory.ledger import active
from tests.test_memory_tracker import F4, Tower, Two


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    model(x).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_predicted_peak_fits_and_one_byte_less_does_not():
    model, x = Tower(3, again=True), torch.randn(30, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    peak = memopt.profile(model, x, optimizer=optimizer).peak
    for _ in range(2):  # the second has optimizer states
        with limit(peak, model, optimizer, x) as device:
            step(model, x, optimizer)
    assert device.peak == peak
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate .* At aten"):  # noqa: SIM117
        with limit(peak - 1, model, optimizer, x):
            step(model, x, optimizer)
    optimizer.zero_grad()
    with limit(peak, model, optimizer, x):  # and the model still works
        step(model, x, optimizer)


def test_a_refused_result_is_not_kept_by_the_error():
    with limit("1KiB") as device:
        x = torch.zeros(200)
        with pytest.raises(
            torch.OutOfMemoryError, match=r"allocate 800 B\. .* capacity of 1.00 KiB of which 224 B is free\. 800"
        ):
            torch.zeros(200)
        assert device.total == 800
        try:
            x + 1
        except torch.OutOfMemoryError:
            assert device.total == 800  # although the error and its traceback are alive
        del x
        torch.zeros(256)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1).untyped_storage().resize_(2000)
        assert device.total == 0


def test_what_is_held_counts_from_the_start():
    model = Two()
    size = 2 * 8 * 16 * F4
    with limit(size, model) as device:
        assert device.total == size
    with pytest.raises(torch.OutOfMemoryError, match="Before any operation"), limit(size - 1, model):
        pass
    assert active() == ()


@pytest.mark.parametrize("budget", ["8 potatoes", "", "-1GiB", "GiB", 0, -5, float("nan"), None, True, "1e400"])
def test_budgets_that_are_none(budget):
    with pytest.raises(InputError, match="budget"):
        limit(budget)


def test_limit_refuses_what_it_cannot_count():
    with pytest.raises(InputError, match="not a object"):
        limit("1GiB", object())


def test_other_libraries_take_the_error_for_what_it_says():
    from accelerate.utils import find_executable_batch_size

    tried = []

    @find_executable_batch_size(starting_batch_size=64)
    def run(batch_size: int) -> int:
        tried.append(batch_size)
        torch.zeros(batch_size)
        return batch_size

    with limit(100):
        assert run() <= 25
    assert tried[0] == 64


def test_fake_tensors_take_nothing_of_the_device():
    model = Two(64)
    with limit("1MiB", model) as device:
        report = memopt.profile(model, torch.empty(4096, 64, device="meta"))
        assert report.peak > 1 << 20
        assert device.peak == sum(p.numel() * F4 for p in model.parameters())


def test_the_peak_is_what_fitted_and_sizes_that_look_alike_are_told_apart():
    with limit(128 * 1024 + 3) as device:
        x = torch.zeros(2, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError, match=r"allocate 131074 B\. .* of which 131073 B is free"):
            torch.zeros(128 * 1024 + 2, dtype=torch.uint8)
        assert device.peak == x.numel()


def test_nested_tensors_and_iterables():
    model, x = Two(), torch.zeros(4)
    with limit("1GiB", model.parameters(), {x}) as device:
        assert device.total == 2 * 8 * 16 * F4 + 16
        nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
        assert device.total > 2 * 8 * 16 * F4 + 16
        del nested
