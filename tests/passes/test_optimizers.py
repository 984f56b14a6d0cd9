"""What the passes on optimizers have in common, and OffloadOptimizer and FusedOptimizer."""

import copy
import functools
import gc
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import memopt
from memopt import InputError, NothingToDo, PassConflict
from memopt.passes import (
    AMP,
    BlockSwap,
    FusedOptimizer,
    OffloadOptimizer,
    Optimizer8bit,
    OptimizerInBackward,
    SetToNone,
)

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}
EXACT = {
    "in_backward": [OptimizerInBackward()],
    "offload": [OffloadOptimizer(min_bytes=1, at_once=1)],
    "offload_disk": [OffloadOptimizer(to="disk", min_bytes=1, at_once="20KiB")],
    "offload_in_backward": [OffloadOptimizer(min_bytes=1), OptimizerInBackward(), SetToNone()],
}
ANY = {**EXACT, "8bit": [Optimizer8bit(min_values=64)], "fused": [FusedOptimizer()]}


class Net(nn.Module):
    """Parameters of several forms, one that is used twice and one that is never."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1).to(memory_format=torch.channels_last)
        self.layer = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        self.unused = nn.Parameter(torch.ones(100))

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.head(self.layer(self.layer(x).relu()))


def build(make, passes, scheduled=None):
    torch.manual_seed(0)
    model = Net()
    groups = [{"params": [*model.conv.parameters(), model.unused]}, {"params": [*model.layer.parameters()], "lr": 2e-3}]
    optimizer = make([*groups, {"params": [*model.head.parameters()]}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if scheduled == "before" else None
    handle = memopt.apply(model, passes, optimizer=optimizer)
    if scheduled == "after":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return model, optimizer, handle, scheduler


def steps(model, optimizer, scheduler=None, seeds=range(5)):
    losses = []
    for seed in seeds:
        torch.manual_seed(100 + seed)
        loss = model(torch.randn(4, 3, 6, 6)).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def flat(state):
    return {(key, name): torch.as_tensor(v) for key, s in state["state"].items() for name, v in s.items()}


def same(a, b):
    a, b = (flat(x) if "state" in x else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("scheduled", ["before", "after"])
@pytest.mark.parametrize("passes", EXACT.values(), ids=list(EXACT))
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_steps_are_bitwise_those_of_the_plain_optimizer(make, passes, scheduled):
    plain, reference, _, schedule = build(make, [], scheduled)
    model, optimizer, handle, scheduler = build(make, passes, scheduled)
    groups = list(optimizer.param_groups)
    assert isinstance(optimizer, type(reference))
    assert steps(model, optimizer, scheduler) == steps(plain, reference, schedule)
    assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
    assert same(plain.state_dict(), model.state_dict())
    assert same(reference.state_dict(), optimizer.state_dict())
    assert reference.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]

    handle.undo()
    assert type(optimizer) is type(reference)
    assert vars(optimizer).keys() == vars(reference).keys()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert steps(model, optimizer, scheduler, range(5, 8)) == steps(plain, reference, schedule, range(5, 8))
    assert same(reference.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("passes", ANY.values(), ids=list(ANY))
def test_passes_come_and_go_in_the_middle_of_a_training(passes):
    """And others beside them: each time the states are taken off the shelf and put there again."""
    make = OPTIMIZERS["adamw"]
    plain, reference, handle, schedule = build(make, passes, "before")
    for seed in range(4):
        steps(plain, reference, schedule, [seed])
    model, optimizer, handle, scheduler = build(make, passes, "before")
    steps(model, optimizer, scheduler, range(2))
    other = memopt.apply(model, ["release"], missing="skip")
    steps(model, optimizer, scheduler, [2])
    other.undo()
    handle.undo()
    memopt.apply(model, passes, optimizer=optimizer)
    steps(model, optimizer, scheduler, [3])
    assert same(plain.state_dict(), model.state_dict())
    assert same(reference.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("passes", ANY.values(), ids=list(ANY))
def test_states_load_with_and_without_the_pass(passes):
    make = OPTIMIZERS["adamw"]
    model, optimizer, _, _ = build(make, passes)
    steps(model, optimizer)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    assert all(type(t) is torch.Tensor for t in tree_leaves(saved["state"]) if not isinstance(t, (int, float)))
    twin, again, _, _ = build(make, passes)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(saved)
    assert same(optimizer.state_dict(), again.state_dict())
    assert again.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert steps(twin, again, seeds=range(5, 7)) == steps(model, optimizer, seeds=range(5, 7))
    _, without, _, _ = build(make, [])
    without.load_state_dict(saved)
    assert same(without.state_dict(), saved)
    assert not any(group["fused"] for group in without.param_groups)


@pytest.mark.parametrize("passes", ANY.values(), ids=list(ANY))
def test_hooks_of_steps_run_once_for_each_step(passes):
    model, optimizer, _, _ = build(OPTIMIZERS["adamw"], passes)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    steps(model, optimizer, seeds=range(2))
    assert calls == ["pre", "post"] * 2


@pytest.mark.parametrize("passes", ANY.values(), ids=list(ANY))
def test_a_copy_is_an_optimizer_of_its_own(passes):
    model, optimizer, handle, _ = build(OPTIMIZERS["adamw"], passes)
    steps(model, optimizer)
    twin, again = copy.deepcopy((model, optimizer))
    expected = optimizer.state_dict()
    handle.undo()
    steps(twin, again, seeds=[9])
    assert same(expected, optimizer.state_dict())  # the copy does not lean on it
    plain, reference, _, _ = build(OPTIMIZERS["adamw"], [])
    plain.load_state_dict(model.state_dict())
    reference.load_state_dict(expected)
    steps(plain, reference, seeds=[9])
    if passes != ANY["fused"]:
        assert same(plain.state_dict(), twin.state_dict())


@pytest.mark.parametrize("passes", [p for name, p in ANY.items() if "in_backward" not in name])
def test_a_step_that_fails_leaves_states_that_go_on(passes):
    results = []
    for broken in (False, True):
        model, optimizer, handle, _ = build(OPTIMIZERS["sgd"], passes)
        steps(model, optimizer)
        if broken:
            hook = optimizer.register_step_pre_hook(explode)
            with pytest.raises(OSError, match="disk on fire"):
                steps(model, optimizer, seeds=[5])
            hook.remove()
            optimizer.zero_grad()
            lr, optimizer.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"], None  # not the first piece
            frozen = [p.detach().clone() for p in model.conv.parameters()]
            with pytest.raises((TypeError, RuntimeError)):
                steps(model, optimizer, seeds=[5])
            assert [len(g["params"]) for g in optimizer.param_groups] == [3, 2, 2]
            optimizer.param_groups[1]["lr"] = lr
            optimizer.zero_grad()
            with torch.no_grad():
                for parameter, before in zip(model.conv.parameters(), frozen, strict=True):
                    parameter.copy_(before)
        results.append([p.clone() for p in model.layer.parameters()])
        steps(model, optimizer, seeds=[6])
        handle.undo()
        assert all(isinstance(v, torch.Tensor) for s in optimizer.state.values() for v in s.values())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def explode(*_):
    raise OSError("disk on fire")


def test_a_closure_is_called_once():
    model, optimizer, _, _ = build(OPTIMIZERS["adamw"], EXACT["offload"])
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3, 4, 4)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [True]


def test_accelerate_prepares_it():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain, reference, _, _ = build(OPTIMIZERS["adamw"], [])
    model, optimizer, _, _ = build(OPTIMIZERS["adamw"], EXACT["offload"])
    steps(plain, reference, seeds=range(2))
    steps(model, optimizer, seeds=range(2))
    prepared = accelerator.prepare(optimizer)  # loads its own states
    steps(plain, reference, seeds=range(2, 4))
    steps(model, prepared, seeds=range(2, 4))
    assert same(plain.state_dict(), model.state_dict())


class Own(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("pass_", [OptimizerInBackward(), OffloadOptimizer(), Optimizer8bit()], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Own])
def test_what_may_look_at_several_parameters_is_refused(pass_, kind):
    model = Net()
    optimizer = kind(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=rf"{pass_.name}: a step of {kind.__name__} .* may look at several parameters"):
        memopt.apply(model, [pass_], optimizer=optimizer)
    assert type(optimizer) is kind


def test_two_for_the_same_states():
    import bitsandbytes  # noqa: F401  # imported by a pass, it would keep that frame, which has the model, in its log

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(
        PassConflict, match=r"optimizer_8bit\(.*\) and offload_optimizer\(\) both change the optimizer of 0"
    ):
        memopt.apply(model, [Optimizer8bit(min_values=1), OffloadOptimizer()], optimizer=optimizer)
    other = nn.Linear(2, 2)
    memopt.apply(model, [OffloadOptimizer()], optimizer=optimizer)
    with pytest.raises(PassConflict, match="this AdamW has passes through another model"):
        memopt.apply(other, [OptimizerInBackward()], optimizer=optimizer)
    del model
    gc.collect()
    with pytest.raises(PassConflict, match=r"a model that is no longer there\. Make a new optimizer and load"):
        memopt.apply(other, [OptimizerInBackward()], optimizer=optimizer)


@pytest.mark.parametrize("like", ["method", "wrapper"])
def test_a_step_of_somebody_else_below_a_scheduler_is_not_dropped(like):
    def step(self, *args, **kwargs):
        return type(self).step(self, *args, **kwargs)

    optimizer = torch.optim.AdamW((model := Net()).parameters())
    optimizer.step = types.MethodType(
        step if like == "method" else functools.wraps(type(optimizer).step)(step), optimizer
    )
    torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(InputError, match=r"offload_optimizer cannot wrap AdamW\.step: another library replaced it"):
        memopt.apply(model, [OffloadOptimizer()], optimizer=optimizer)
    assert type(optimizer) is torch.optim.AdamW


def test_a_scheduler_that_was_made_with_a_pass_outlives_it():
    """It wrapped the step that the pass had made."""
    model, optimizer, handle, scheduler = build(OPTIMIZERS["adamw"], EXACT["offload"], "after")
    handle.undo()
    plain, reference, _, other = build(OPTIMIZERS["adamw"], [], "after")
    memopt.apply(model, [OptimizerInBackward()], optimizer=optimizer)
    assert steps(model, optimizer, scheduler) == steps(plain, reference, other)


@pytest.mark.parametrize("save", [pickle.dumps, lambda x: torch.save(x, io.BytesIO())], ids=["pickle", "torch"])
def test_an_optimizer_or_a_model_is_not_pickled_as_a_whole(save):
    model, optimizer, handle, _ = build(OPTIMIZERS["adamw"], [AMP(), OffloadOptimizer(), OptimizerInBackward()])
    for target in (model, optimizer):
        with pytest.raises(
            InputError, match=rf"this {type(target).__name__} has passes of memopt and cannot be pickled"
        ):
            save(target)
        copy.copy(target), copy.deepcopy(target)
    handle.undo()
    save(optimizer)
    save(model)


@pytest.mark.parametrize("name", ["optimizer_8bit", "optimizer_in_backward", "offload_optimizer", "fused_optimizer"])
def test_they_need_an_optimizer(name):
    with pytest.raises(NothingToDo, match=rf"{name}: .*memopt.apply\(..., optimizer=optimizer\)"):
        memopt.apply(Net(), [name])


def mlp(make=torch.optim.AdamW):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
    return model, make(model.parameters(), lr=1e-3), sum(p.numel() for p in model.parameters())


def peak_in(report, phase, category):
    (first, end) = next((a, b) for name, a, b in report.timeline.phases if name == phase)
    timeline = report.timeline
    return max(b for op, b in zip(timeline.ops, timeline.bytes[category], strict=True) if first <= op < end)


@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_states_leave_the_device(to):
    """In a fake profile of a GPU and in a real one of this machine, byte for byte."""
    model, optimizer, count = mlp()
    passes = [OffloadOptimizer(to=to, min_bytes=1, at_once=1)]
    for how in ({"device": "cuda", "rounding": 1}, {"real": True}):
        plain = memopt.profile(model, torch.randn(4, 128), optimizer=optimizer, **how)
        report = memopt.profile(model, torch.randn(4, 128), optimizer=optimizer, passes=passes, **how)
        steps_left = 0 if "device" in how else 4 * 4  # the numbers of the steps
        assert plain.start_by_category["optimizer_states"] == 8 * count + steps_left
        assert report.start_by_category["optimizer_states"] == steps_left
        assert report.timeline.bytes["optimizer_states"][-1] == steps_left
        if "device" in how:
            assert report.off_device == {to: 8 * count}
    model(torch.randn(4, 128)).mean().backward()
    handle = memopt.apply(model, passes, optimizer=optimizer)
    optimizer.step()
    assert not [t for t in tree_leaves(list(optimizer.state.values())) if isinstance(t, torch.Tensor) and t.dim()]
    handle.undo()
    assert all(state["exp_avg"].shape == p.shape for p, state in optimizer.state.items())


def test_files_that_cannot_be_written_are_an_error(tmp_path):
    model, optimizer, _ = mlp()
    memopt.apply(model, [OffloadOptimizer(to="disk", folder=str(tmp_path / "none"))], optimizer=optimizer)
    model(torch.randn(4, 128)).mean().backward()
    with pytest.raises(memopt.MemoptError, match="none"):
        [act() for act in (optimizer.step, optimizer.state_dict)]  # the thread that writes may be late


def test_options_are_checked():
    for make in (
        lambda: OffloadOptimizer(to="tape"),
        lambda: OffloadOptimizer(at_once="much"),
        lambda: FusedOptimizer(implementation="fast"),
        lambda: Optimizer8bit(min_values=-1),
    ):
        with pytest.raises(InputError):
            make()


def test_with_weights_that_come_and_go():
    """Each with block_swap: a step in backward writes to the weight that is there."""
    for passes in [*EXACT.values(), [FusedOptimizer(), OptimizerInBackward()]]:
        results = []
        for swapped in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            handle = memopt.apply(model, [BlockSwap(blocks="1.*")] * swapped + passes, optimizer=optimizer)
            for seed in range(4):
                torch.manual_seed(seed)
                model(torch.randn(3, 8)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            handle.undo()
            results.append(list(model.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- FusedOptimizer


@pytest.mark.parametrize("name", ["adamw", "sgd", "adagrad"])
def test_fused_steps_are_equal_to_rounding(name):
    plain, reference, _, schedule = build(OPTIMIZERS[name], [], "before")
    model, optimizer, handle, scheduler = build(OPTIMIZERS[name], [FusedOptimizer()], "before")
    assert all(group["fused"] for group in optimizer.param_groups)
    steps(plain, reference, schedule, range(20))
    steps(model, optimizer, scheduler, range(20))
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-7  # measured: 2e-8
    handle.undo()
    assert vars(optimizer).keys() == vars(reference).keys()
    for a, b in zip(reference.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


@pytest.mark.parametrize("more", [[], [OptimizerInBackward()]], ids=str)
def test_fused_steps_count_as_writes(more):
    """As without the pass: backward through a graph that was made before a step is an error."""
    for passes in ([], [FusedOptimizer(), *more]):
        model, optimizer, _, _ = build(OPTIMIZERS["adamw"], passes)
        loss = model(torch.randn(2, 3, 6, 6)).sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_fused_where_it_is_not():
    model = Net()
    for optimizer in (torch.optim.AdamW(model.parameters(), fused=True), torch.optim.RMSprop(model.parameters())):
        with pytest.raises(NothingToDo, match="fused_optimizer: found nothing to do"):
            memopt.apply(model, [FusedOptimizer()], optimizer=optimizer)
    optimizer = torch.optim.RMSprop(model.parameters())
    with memopt.apply(model, [FusedOptimizer(implementation="foreach")], optimizer=optimizer):
        assert optimizer.param_groups[0]["foreach"] is True
        steps(model, optimizer)
    assert optimizer.param_groups[0]["foreach"] is None


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_groups_that_come_later_and_a_scaler(implementation):
    """``foreach`` here is put over ``fused=True``, whose kernel would have unscaled the gradients."""
    results = []
    for passes in ([], [FusedOptimizer(implementation=implementation)]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        optimizer = torch.optim.AdamW(model[0].parameters(), lr=0.01, fused=implementation == "foreach")
        before = dict(optimizer.defaults)
        handle = memopt.apply(model, passes, optimizer=optimizer)
        optimizer.add_param_group({"params": list(model[1].parameters()), "lr": 0.02})
        assert not passes or all(group[implementation] for group in optimizer.param_groups)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(2):
            scaler.scale(model(torch.randn(2, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        handle.undo()
        assert optimizer.defaults == before
        results.append((list(model.parameters()), [group["fused"] for group in optimizer.param_groups]))
    (expected, options), (found, after) = results
    assert all((a - b).abs().max() <= 1e-6 for a, b in zip(expected, found, strict=True))
    assert after == options


def test_fused_has_no_temporaries_on_a_gpu():
    model, optimizer, count = mlp()
    how = {"device": "cuda", "rounding": 1, "optimizer": optimizer}
    plain = memopt.profile(model, torch.randn(4, 128), **how)
    fused = memopt.profile(model, torch.randn(4, 128), passes=[FusedOptimizer()], **how)
    assert peak_in(plain, "optimizer", "temporaries") >= 4 * count
    assert peak_in(fused, "optimizer", "temporaries") == 4 * 4 * 128  # the model's output


def test_a_scaler_lets_the_kernel_unscale():
    """As with fused=True: a step with an infinite gradient is left out, and others are those without a scaler."""
    results = []
    for scale in (1.0, 1024.0):
        model, optimizer, _, _ = build(OPTIMIZERS["adamw"], [FusedOptimizer()])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for seed in range(4):
            torch.manual_seed(seed)
            loss = model(torch.randn(4, 3, 6, 6)).square().mean() * (float("inf") if seed == 1 else 1)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((model.state_dict(), optimizer.state_dict()))
    (weights, states), (others, _) = results
    assert all((weights[k] - others[k]).abs().max() <= 1e-6 for k in weights)
    assert states["state"][0]["step"] == 3
