"""SetToNone and CacheCleanup."""

import gc
import weakref

import pytest
import torch
from torch import nn

import memopt
from memopt import NothingToDo
from memopt.passes import CacheCleanup, SetToNone


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_every_zero_grad_drops_gradients(make):
    model = nn.Linear(4, 4)
    optimizer = make(model.parameters(), lr=0.1)
    handle = memopt.apply(model, [SetToNone()], optimizer=optimizer)
    for call in (
        optimizer.zero_grad,
        lambda: optimizer.zero_grad(False),
        lambda: optimizer.zero_grad(set_to_none=False),
    ):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        call()
        assert all(p.grad is None for p in model.parameters())
    assert isinstance(optimizer, make)
    assert handle.report().rows[0].counts == {"calls that wanted zeros": 2}
    handle.undo()
    assert type(optimizer) is make
    model(torch.randn(2, 4)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())


def test_all_given_optimizers_and_only_they():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model]
    memopt.apply(model, [SetToNone()], optimizer=optimizers[:2])
    model(torch.randn(1, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=False)
    assert [next(layer.parameters()).grad is None for layer in model] == [True, True, False]


def test_through_schedulers_and_accelerate():
    from accelerate import Accelerator

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memopt.apply(model, [SetToNone()], optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    prepared = Accelerator(cpu=True).prepare(optimizer)
    model(torch.randn(1, 2)).sum().backward()
    prepared.step()
    scheduler.step()
    prepared.zero_grad(set_to_none=False)
    assert model.weight.grad is None


def test_set_to_none_needs_an_optimizer():
    with pytest.raises(NothingToDo, match=r"an optimizer: memopt.apply\(..., optimizer=optimizer\)"):
        memopt.apply(nn.Linear(2, 2), ["set_to_none"])


def test_cleanup_collects_cycles_at_phase_ends_and_never_between():
    class Node:
        pass

    handle = memopt.apply(nn.Linear(2, 2), [CacheCleanup(after=("checkpoint",))])
    gc.collect()
    gc.disable()
    try:
        node = Node()
        node.self = node
        alive = weakref.ref(node)
        del node
        with handle.phase("sampling"):
            pass
        assert alive() is not None
        with handle.phase("checkpoint"):
            assert alive() is not None
        assert alive() is None
    finally:
        gc.enable()
