"""Optimizer8bit: what rounding does, what it saves, and states that come and go."""

import sys

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import memopt
from memopt import InputError, NothingToDo, checkpoints
from memopt.passes import Optimizer8bit
from memopt.passes.optimizer_8bit import decode, encode
from memopt.recipe import configure, load_recipe
from memopt.training import train
from tests.passes.test_optimizers import mlp, same
from tests.training_jobs import TINY


def states(size=256 * 40 + 7):
    """Values over eleven powers of ten, with zeros, whole blocks of them, and blocks of tiny values."""
    spread = torch.randn(size) * 10 ** torch.linspace(-8, 3, size)[torch.randperm(size)]
    spread[::50] = 0
    spread[512:1024] = 0
    spread[1024:1280] *= 1e-30
    return spread


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_within_their_bound_and_stay_what_they_became(squares, dtype):
    state = states().square().to(dtype) if squares else states().to(dtype)
    coded = encode(state, squares)
    found = decode(coded)
    assert found.dtype == dtype
    a, b = ((x.float().sqrt() if squares else x.float()) for x in (state, found))
    blocks = [nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256) for x in (a, b)]
    largest = blocks[0].abs().amax(1, keepdim=True)
    slack = largest / (1 << 7) if dtype == torch.bfloat16 else largest * 1e-6
    assert ((blocks[0] - blocks[1]).abs() <= largest / 140 + slack).all()
    if dtype == torch.float32:
        again = encode(found, squares)
        assert torch.equal(coded.codes, again.codes)
        assert torch.equal(coded.scales, again.scales)
    if squares:  # what was seen is not forgotten
        assert (found[state > 1e-30] > 0).all()


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(squares, bad):
    """Its block, and no other; the last one is shorter than the rest."""
    for size, place in ((700, 300), (700, 600), (512, 0), (100, 99)):
        state = torch.ones(size)
        state[place] = bad
        found = decode(encode(state, squares))
        expected = torch.arange(size) // 256 == place // 256
        assert torch.equal(found.isnan(), expected)
        assert torch.equal(found[~expected], state[~expected])


def test_muon():
    layer = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.Muon(layer.parameters())
    memopt.apply(layer, [Optimizer8bit()], optimizer=optimizer)
    layer(torch.randn(2, 64)).square().mean().backward()
    optimizer.step()
    assert not isinstance(optimizer.state[layer.weight]["momentum_buffer"], torch.Tensor)


def test_forms_are_kept():
    for state in (torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last), torch.randn(70, 9).mT):
        coded = encode(state, False)
        found = decode(coded)
        assert coded.codes.stride() == found.stride() == state.stride()
        assert (found - state).abs().max() <= state.abs().max() / 140


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p: torch.optim.NAdam(p, lr=1e-3), {"exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.RAdam(p, lr=1e-3), {"exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5), {"square_avg", "momentum_buffer"}),
        (lambda p: torch.optim.Adadelta(p, lr=1.0), {"square_avg", "acc_delta"}),
        (lambda p: torch.optim.Adagrad(p, lr=1e-2), {"sum"}),
    ],
)
def test_trainings_go_the_same_way(make, names):
    """60 steps of learning from a teacher: the loss stays within 0.5% of that with float states."""
    losses = []
    for passes in ([], [Optimizer8bit()]):
        teacher, _, _ = mlp()
        model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
        optimizer = make(model.parameters())
        memopt.apply(model, passes, optimizer=optimizer)
        total = 0.0
        for step in range(60):
            x = torch.randn(64, 128)
            loss = nn.functional.mse_loss(model(x), teacher(x).detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * (step >= 50)
        losses.append(total / 10)
    assert losses[0] < 0.09  # at first it is 0.1
    assert abs(losses[1] - losses[0]) <= 0.005 * losses[0]  # measured: 0.1%
    coded = {
        name for s in optimizer.state.values() for name, v in s.items() if not isinstance(v, (torch.Tensor, float))
    }
    assert coded == names
    small = optimizer.state[model[0].bias]
    assert all(isinstance(v, (torch.Tensor, float)) for v in small.values())  # 512 values


def test_bytes():
    """In a fake profile of a GPU and in fact: one byte a value, and four for each 256."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 300, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    count = sum(p.numel() for p in model.parameters())
    exact = 2 * (count + 4 * count // 256)
    x = torch.randn(2, 512)
    report = memopt.profile(model, x, optimizer=optimizer, passes=["optimizer_8bit"], device="cuda", rounding=1)
    assert report.start_by_category["optimizer_states"] == exact
    assert report.timeline.bytes["optimizer_states"][-1] == exact
    real = memopt.profile(model, x, optimizer=optimizer, passes=["optimizer_8bit"], real=True)
    assert real.start_by_category["optimizer_states"] == exact + 2 * 4  # the numbers of the steps
    assert not optimizer.state
    memopt.apply(model, ["optimizer_8bit"], optimizer=optimizer)
    model(x).mean().backward()
    optimizer.step()
    tensors = [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == exact + 2 * 4
    assert exact <= 2.1 * count


def test_apply_converts_and_undo_converts_back():
    model, optimizer, _ = mlp()
    model(torch.randn(4, 128)).square().mean().backward()
    optimizer.step()
    before = optimizer.state_dict()
    before = {key: {n: v.clone() for n, v in s.items()} for key, s in before["state"].items()}
    handle = memopt.apply(model, [Optimizer8bit()], optimizer=optimizer)
    assert handle.report().rows[0].notes == ("states of 131,072 of 131,712 parameters in 8 bits",)
    inside = optimizer.state_dict()
    handle.undo()
    assert same(inside, optimizer.state_dict())
    for key, state in before.items():
        for name, value in state.items():
            found = inside["state"][key][name]
            assert torch.equal(value, found) == (value.numel() < 4096)
            assert (value - found).norm() <= 0.03 * value.norm()


def test_what_must_not_be_rounded_is_refused():
    model, _, _ = mlp()
    for optimizer, named in (
        (torch.optim.Adafactor(model.parameters()), "Adafactor"),
        (torch.optim.ASGD(model.parameters()), "ASGD"),
        (torch.optim.RMSprop(model.parameters(), centered=True), "a centered RMSprop"),
    ):
        with pytest.raises(InputError, match=f"optimizer_8bit: {named} has states that must not be rounded"):
            memopt.apply(model, [Optimizer8bit()], optimizer=optimizer)
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.AdamW([model[0].bias])):
        with pytest.raises(NothingToDo, match=r"optimizer_8bit: .* of 4096 values at least"):
            memopt.apply(model, [Optimizer8bit()], optimizer=optimizer)


def test_without_the_library(monkeypatch):
    model, optimizer, _ = mlp()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(InputError, match="optimizer_8bit needs bitsandbytes: pip install bitsandbytes"):
        memopt.apply(model, ["optimizer_8bit"], optimizer=optimizer)


def test_checkpoints(tmp_path):
    model, optimizer, _ = mlp()
    memopt.apply(model, ["optimizer_8bit"], optimizer=optimizer)
    model(torch.randn(4, 128)).square().mean().backward()
    optimizer.step()
    path = checkpoints.save(tmp_path, 1, modules={"model": model}, optimizer=optimizer, state={}, keep=1)
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    assert same(saved, optimizer.state_dict())
    twin, again, _ = mlp()
    memopt.apply(twin, ["optimizer_8bit"], optimizer=again)
    again.load_state_dict(saved)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        for a, b in zip(tree_leaves(optimizer.state[parameter]), tree_leaves(again.state[other]), strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)  # codes and scales


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    recipe = load_recipe(TINY)

    def go(out, steps, resume=False):
        values = {"steps": steps, "passes": ("optimizer_8bit:min_values=16",), "ema_decay": None}
        return train(recipe, configure(recipe, None, values), out=tmp_path / out, resume=resume)

    whole = go("whole", 12)
    go("parts", 8)
    assert go("parts", 12, resume=True).losses[-4:] == whole.losses[-4:]
