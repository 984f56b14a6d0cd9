"""Weights that live elsewhere: bitwise the same training, exactly as many bytes as promised, the model always whole."""

import contextlib
import copy
import gc
import os
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memopt
from memopt import InputError, MemoptError, NothingToDo
from memopt.memory import limit
from memopt.memory.ledger import Ledger
from memopt.passes import AMP, BlockSwap, Checkpoint, OffloadActivations
from tests.passes.test_offload_activations import FailsAt, Net, Recomputes, assert_equal, build, gradients, inputs

DIM = 32


class Block(nn.Module):
    """A weight of its own besides its layers'; one layer's weight is read without calling the layer."""

    def __init__(self, dim=DIM):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        hidden = F.dropout(F.gelu(self.up(self.norm(x))), 0.1, self.training)
        return x + self.scale * F.linear(hidden, self.down.weight, self.down.bias)


class Stack(nn.Module):
    def __init__(self, depth=5, dim=DIM, order=None):
        super().__init__()
        self.first, self.last = nn.Linear(dim, dim), nn.Linear(dim, 1)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.order = order or range(depth)

    def forward(self, x):
        x = self.first(x)
        for i in self.order:
            x = self.blocks[i](x)
        return self.last(x)


def stack(**how):
    torch.manual_seed(0)
    return Stack(**how)


def batch(seed=1):
    return torch.randn(7, DIM, generator=torch.Generator().manual_seed(seed))


def trained(model, passes=(), steps=20, before=True):
    """The weights after steps of AdamW."""
    if before:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = memopt.apply(model, passes)
    if not before:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(steps):
        torch.manual_seed(seed)
        for half in range(2):  # gradients add up
            model(batch(2 * seed + half)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    handle.undo()
    assert_equal(model.state_dict().values(), state.values())
    return state


KINDS = {
    "cpu": BlockSwap(),
    "disk": BlockSwap(to="disk"),
    "alone": BlockSwap(prefetch=0),
    "many": BlockSwap(to="disk", resident=2, prefetch=2),
    "leaf": BlockSwap(level="leaf"),
    "leaf on disk": BlockSwap(to="disk", level="leaf", prefetch=3),
}


@pytest.mark.parametrize("before", [True, False], ids=["optimizer before", "optimizer after"])
@pytest.mark.parametrize("name", KINDS)
def test_training_gives_the_same_weights(name, before):
    expected = trained(stack())
    assert_equal(trained(stack(), [KINDS[name]], before=before).values(), expected.values())


@pytest.mark.parametrize(
    "more",
    [[Checkpoint()], [AMP()], [AMP(), Checkpoint()], [OffloadActivations(min_bytes=1), Checkpoint()]],
    ids=str,
)
@pytest.mark.parametrize("name", ["cpu", "disk", "leaf"])
def test_training_with_others(name, more):
    expected = trained(stack(), more, steps=4)
    assert_equal(trained(stack(), [KINDS[name], *more], steps=4).values(), expected.values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("level", ["block", "leaf"])
def test_checkpoints_inside_and_outside(level, reentrant):
    def run(model):
        torch.manual_seed(1)
        model.zero_grad()
        x = inputs().requires_grad_()
        loss = model(x).sum() + checkpoint(model, 2 * x, use_reentrant=reentrant).sum()
        loss.backward()
        return [x.grad, *(p.grad.clone() for p in model.parameters())]

    model, plain = Recomputes(reentrant).eval(), Recomputes(reentrant).eval()
    handle = memopt.apply(model, [BlockSwap(to="disk", blocks="net", level=level)])
    for _ in range(2):
        assert_equal(run(model), run(plain))
    assert handle.report().rows[0].counts["blocks brought in"] > 0


NETS = {
    "cpu": BlockSwap(blocks="*"),
    "disk": BlockSwap(blocks="*", to="disk", prefetch=2),
    "leaf": BlockSwap(level="leaf", resident=2),
}


@pytest.fixture(params=NETS)
def swapped(request):
    model = build()
    handle = memopt.apply(model, [NETS[request.param]])
    yield model
    assert handle.report().rows[0].counts["blocks brought in"] > 0


def test_retained_graphs(swapped):
    assert_equal(gradients(swapped, times=3), gradients(build(), times=3))


def test_double_backward(swapped):
    def twice(model):
        torch.manual_seed(1)
        x = inputs().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return [grad.detach(), *torch.autograd.grad(grad.square().sum(), [*model.parameters()][:6])]

    assert_equal(twice(swapped), twice(build()))


def test_several_forwards_before_one_backward_and_two_models_in_turn(swapped):
    def run(model, other):
        torch.manual_seed(1)
        model.zero_grad()
        other.zero_grad()
        losses = [(model, other)[i % 2](inputs(i)).square().sum() for i in range(4)]
        losses[1].backward()
        (losses[0] + losses[2] + losses[3]).backward()
        return [p.grad.clone() for m in (model, other) for p in m.parameters()]

    other, *plain = build(), build(), build()
    memopt.apply(other, [NETS["disk"]])
    assert_equal(run(swapped, other), run(*plain))


def test_changes_in_place_are_an_error_as_they_were(swapped):
    loss = swapped(inputs()).sum()
    with torch.no_grad():
        swapped.out.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_undone_while_a_graph_is_alive():
    model, plain = build(), build()
    handle = memopt.apply(model, [NETS["disk"]])
    torch.manual_seed(1)
    loss = model(inputs()).square().sum()
    handle.undo()
    loss.backward()
    assert_equal([p.grad for p in model.parameters()], gradients(plain)[1:])


def test_threads_share_a_model(swapped):
    plain = build().eval()
    swapped.eval()
    expected = [plain(inputs(i)).detach() for i in range(4)]
    found = [[] for _ in expected]

    def work(i):
        for _ in range(10):
            with torch.no_grad():
                found[i].append(swapped(inputs(i)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, one in zip(found, expected, strict=True):
        assert len(results) == 10
        assert all(torch.equal(result, one) for result in results)


# Which weights come and go.


class Odd(nn.Module):
    """Tied weights, a block used twice, a block's weight read from outside, buffers written in forward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4))
        self.blocks[2][0].weight = self.blocks[0][0].weight
        self.head = nn.Linear(8, 8)
        self.head.weight = self.blocks[3][0].weight

    def forward(self, x):
        for block in (*self.blocks, self.blocks[1]):
            x = block(x).relu()
        outside = self.blocks[1][0].weight
        x = self.blocks[0](x)
        return self.head(x) @ outside + self.blocks[2][1].bias * x


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_tied_shared_and_outside(to):
    torch.manual_seed(0)
    model = Odd()
    plain = copy.deepcopy(model)
    handle = memopt.apply(model, [BlockSwap(to=to)])
    for seed in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        for m in (plain, model):
            m.zero_grad()
            m(x).square().sum().backward()
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
        assert_equal(model.buffers(), plain.buffers())
    row = handle.report().rows[0]
    assert row.counts["blocks kept because others read their weights"] == 6  # blocks 1 and 2, three times
    norms, biases, square = 4 * 2 * 8, 4 * 8, 8 * 8
    assert row.notes[0].startswith(f"{4 * (norms + biases + square):,} bytes of weights in 4 blocks")
    assert row.notes[0].endswith(f"{4 * (2 * square + 8):,} stay on the device")


def test_weights_that_forward_writes_keep_what_is_written():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4), requires_grad=False)
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                self.weight += 1
            return self.layer(x) * self.weight

    for to in ("cpu", "disk"):
        model = nn.Sequential(Counts(), Counts())
        with memopt.apply(model, [BlockSwap(to=to)]):
            for i in range(3):
                model(torch.ones(1, 4))
                assert all((block.weight == i + 1).all() for block in model)
        assert (model[1].weight == 3).all()


def test_the_order_is_learned_and_may_change():
    model, plain = stack(order=[3, 1, 4, 0, 2]).eval(), stack(order=[3, 1, 4, 0, 2]).eval()
    memopt.apply(model, [BlockSwap(to="disk", prefetch=2)])
    for order in ([3, 1, 4, 0, 2], [3, 1, 4, 0, 2], [0, 0, 1, 3, 1], [2], [4, 3, 2, 1, 0]):
        model.order = plain.order = order
        for _ in range(2):
            assert torch.equal(model(batch()), plain(batch()))
            for m in (model, plain):
                m.zero_grad()
                m(batch()).square().sum().backward()
            for a, b in zip(model.parameters(), plain.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None)
                assert a.grad is None or torch.equal(a.grad, b.grad)


def test_new_data_and_new_parameters_are_used():
    model, plain = stack().eval(), stack().eval()
    memopt.apply(model, [BlockSwap(to="disk")])
    state = {name: torch.randn_like(value) for name, value in plain.state_dict().items()}
    for assign in (False, True, False):
        for m in (model, plain):
            m.load_state_dict(copy.deepcopy(state), assign=assign)
        assert_equal(gradients_of(model), gradients_of(plain))
        assert_equal(model.state_dict().values(), plain.state_dict().values())
    model.blocks[1].scale.data = plain.blocks[1].scale.data = torch.full((DIM,), 2.0)
    assert_equal(gradients_of(model), gradients_of(plain))
    for m in (model, plain):
        m.half().double()
    x = batch().double()
    assert torch.equal(model(x), plain(x))


def gradients_of(model):
    model.zero_grad()
    loss = model(batch()).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_what_cannot_be_swapped_says_why():
    for options, message in (
        ({"to": "tape"}, "block_swap: to='tape' is not one of cpu, disk"),
        ({"level": "row"}, "block_swap: level 'row' is not one of block, leaf"),
        ({"resident": 0}, "block_swap: resident must be at least 1, not 0"),
        ({"prefetch": -1}, "block_swap: prefetch must be at least 0, not -1"),
        ({"folder": "/tmp"}, "block_swap: folder is for to='disk'"),
    ):
        with pytest.raises(InputError, match=message):
            BlockSwap(**options)
    with pytest.raises(NothingToDo, match=r"block_swap: found nothing to do. It needs repeated blocks with parameters"):
        memopt.apply(nn.Linear(2, 2), [BlockSwap()])
    with pytest.raises(NothingToDo, match="modules with parameters whose name matches 'up'"):
        memopt.apply(stack(), [BlockSwap(blocks="up")])
    with pytest.raises(InputError, match=r"block_swap: blocks.0.scale has no values. Use memopt.load_swapped"):
        memopt.apply(nn.ModuleDict({"blocks": nn.ModuleList([Block().to("meta")])}), [BlockSwap()])
    with pytest.raises(InputError, match=r"0.weight gets its shape when the model is called"):
        memopt.apply(nn.Sequential(nn.LazyLinear(3)), [BlockSwap(level="leaf")])


# Memory.


@pytest.mark.parametrize(("resident", "prefetch"), [(1, 0), (1, 1), (2, 1), (2, 3), (9, 0)])
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_weights_on_the_device_are_exactly_those_promised(resident, prefetch, real, train):
    model = stack()
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    outside = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("blocks"))
    swap = BlockSwap(to="disk" if real else "cpu", resident=resident, prefetch=prefetch)
    optimizer = torch.optim.AdamW(model.parameters()) if train else None
    report = memopt.profile(model, batch(), train=train, passes=[swap], real=real, optimizer=optimizer)
    assert max(report.timeline.bytes["parameters"]) == outside + min(resident + prefetch, 5) * block
    assert report.timeline.bytes["parameters"][-1] == outside
    if train:  # gradients and states are where the weights are
        assert max(report.timeline.bytes["gradients"]) == outside
        assert max(report.timeline.bytes["optimizer_states"]) == 2 * outside + 4 * len(list(model.parameters()))
        host = 5 * block * (3 if real else 4)
        assert report.off_device["cpu"] >= host


def test_fake_and_true_profiles_agree():
    model = stack()
    for passes in ([BlockSwap()], [BlockSwap(prefetch=2), Checkpoint()], [BlockSwap(level="leaf", resident=2)]):
        fake, real = (memopt.profile(model, batch(), passes=passes, real=real) for real in (False, True))
        assert (fake.peak, fake.kept, fake.off_device) == (real.peak, real.kept, real.off_device)
        assert fake.peak < memopt.profile(model, batch(), passes=passes[1:]).peak


def test_autocast_keeps_no_casts_of_weights_without_gradients():
    model = stack().eval()
    with memopt.apply(model, [AMP(), BlockSwap()]):
        found = memopt.profile(model, batch(), train=False)
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    assert found.peak < memopt.profile(model, batch(), train=False, passes=[AMP()]).peak - 2 * block


def test_nothing_is_left_after_undo(tmp_path):
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    model = stack()
    handle = memopt.apply(model, [BlockSwap(to="disk", folder=str(tmp_path))])
    gradients_of(model)
    assert os.listdir(tmp_path) == []  # the file has no name
    assert len(os.listdir("/proc/self/fd")) > files
    handle.undo()
    del handle
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files
    assert not any(thread.name.startswith("memopt-read") for thread in threading.enumerate())
    with Ledger() as ledger:
        for parameter in model.parameters():
            ledger.see(parameter)
    assert ledger.total == sum(p.nbytes for p in model.parameters())


def test_no_growth_over_many_steps(tmp_path):
    model = stack(depth=2, dim=8)
    memopt.apply(model, [BlockSwap(to="disk", folder=str(tmp_path))])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(3, 8)

    def state():
        gc.collect()
        live = sum(type(o) in (torch.Tensor, nn.Parameter) for o in gc.get_objects())
        return len(os.listdir("/proc/self/fd")), live, threading.active_count(), os.listdir(tmp_path)

    for i in range(2000):
        loss = model(x).sum()
        if i % 3:  # some steps have no backward
            loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
        if i == 10:
            early = state()
    assert early == state()


# Failures.


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["cpu", "disk", "leaf"])
def test_an_exception_at_any_operation_leaves_the_model_whole(name, error):
    model, plain = build(), build()
    memopt.apply(model, [NETS[name]])
    weights = [p.detach().clone() for p in plain.parameters()]
    gradients(model)
    count = 0
    while True:
        count += 1
        with FailsAt(count, error) as mode, contextlib.suppress(error):
            gradients(model)
        assert_equal(model.parameters(), weights)
        if mode.left > 0:
            break
    assert count > 100
    model.load_state_dict(plain.state_dict())  # statistics of batch norm, which failed steps have moved
    assert_equal(gradients(model), gradients(plain))
    with Ledger() as ledger:  # nothing is on the device but what is in no block
        for parameter in model.parameters():
            ledger.see(parameter)
    assert ledger.total == 0


def test_running_out_of_memory():
    model = build().eval()
    expected = gradients(model)
    memopt.apply(model, [NETS["disk"]])
    for budget in ("5KiB", "20KiB", "40KiB"):
        with pytest.raises(torch.OutOfMemoryError), limit(budget):
            gradients(model)
    assert_equal(gradients(model), expected)


def test_a_disk_that_is_full_or_closed(tmp_path, monkeypatch):
    model = stack()
    expected = trained(stack(), steps=2)
    closed = tmp_path / "closed"
    with pytest.raises(InputError, match=f"cannot keep files in {closed}: No such file or directory"):
        memopt.apply(model, [BlockSwap(to="disk", folder=str(closed))])

    def full(descriptor, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MemoptError, match=rf"cannot keep [\d,]+ bytes in {tmp_path}: No space left on device. Choose"):
        memopt.apply(model, [BlockSwap(to="disk", folder=str(tmp_path))])
    assert_equal(trained(model, steps=2).values(), expected.values())


def test_a_failed_read_is_told_and_the_next_call_works(monkeypatch):
    from memopt.mapped import MappedFile

    model = stack().eval()
    expected = model(batch()).detach()
    memopt.apply(model, [BlockSwap(to="disk")])

    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(MappedFile, "fill", fails)
    with pytest.raises(OSError, match="Input/output error"):
        model(batch())
    monkeypatch.undo()
    assert torch.equal(model(batch()), expected)


def test_a_copy_is_a_model_of_its_own():
    model, plain = stack(), stack()
    handle = memopt.apply(model, [BlockSwap(to="disk")])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert_equal(trained(twin.blocks[0], steps=0).values(), [p + 1 for p in plain.blocks[0].state_dict().values()])
    assert torch.equal(twin.blocks[0](batch()).shape and twin.eval()(batch()), raised(plain).eval()(batch()))
    handle.undo()
    assert torch.equal(twin(batch()), raised(stack()).eval()(batch()))
    assert isinstance(twin.blocks[0], Block)
    assert isinstance(build(), Net)


def raised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model
