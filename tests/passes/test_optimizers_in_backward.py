"""OptimizerInBackward: gradients that go, and what must be refused."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memopt
from memopt import InputError, PassConflict
from memopt.passes import AMP, GradAccumulation, Optimizer8bit, OptimizerInBackward, SetToNone
from memopt.recipe import configure, load_recipe
from memopt.training import Trainer
from tests.passes.test_optimizers import mlp, peak_in, same
from tests.training_jobs import TINY
from tests.zoo import ZOO, loss_of, placed

EARLY = [OptimizerInBackward()]


def put(model, lr=0.1, passes=EARLY, make=torch.optim.SGD):
    optimizer = make(model.parameters(), lr=lr)
    return optimizer, memopt.apply(model, passes, optimizer=optimizer)


@pytest.mark.parametrize("case", ZOO.values(), ids=str)
def test_the_zoo_trains_to_the_same_weights(case):
    results = []
    for passes in ([], EARLY):
        model = case.build()
        optimizer, _ = put(model, 1e-3, passes, torch.optim.AdamW)
        for seed in range(2):
            args, kwargs = placed(case.inputs(), model)
            torch.manual_seed(seed)
            loss_of(model(*args, **kwargs)).backward()
            assert not passes or all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_go_as_they_come():
    """One of the four is there at a time; none waits for the step."""
    model, optimizer, count = mlp()
    how = {"device": "cuda", "rounding": 1, "optimizer": optimizer}
    plain = memopt.profile(model, torch.randn(4, 128), **how)
    report = memopt.profile(model, torch.randn(4, 128), passes=[OptimizerInBackward()], **how)
    assert max(plain.timeline.bytes["gradients"]) == 4 * count
    assert max(report.timeline.bytes["gradients"]) == 0
    largest = 4 * 128 * 512
    assert peak_in(report, "backward", "temporaries") < 4 * largest < peak_in(plain, "optimizer", "gradients") * 2.1
    optimizer, handle = put(model)
    seen = []
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _: seen.append(sum(q.grad is not None for q in model.parameters())))
        for p in model.parameters()
    ]
    model(torch.randn(4, 128)).mean().backward()
    assert seen == [0, 0, 0, 0]
    assert handle.report().rows[0].notes == ("4 parameters are stepped in backward",)
    for hook in hooks:
        hook.remove()


def test_a_second_gradient_before_the_step_is_an_error():
    model = nn.Linear(4, 4)
    optimizer, _ = put(model)
    x = torch.randn(2, 4)
    model(x).mean().backward()
    with pytest.raises(InputError, match=r"(bias|weight) was stepped already .* call optimizer.step\(\) after each"):
        model(x).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(x).mean().backward()
    optimizer.zero_grad()  # dropping a gradient does not take its step back
    with pytest.raises(
        InputError, match=r"was stepped already .* a step\(\) that is skipped or fails takes no step back"
    ):
        model(x).mean().backward()


def test_parameters_of_several_reentrant_checkpoints_are_refused():
    layer = nn.Linear(4, 4)
    put(layer)
    x = torch.randn(2, 4, requires_grad=True)
    y = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(InputError, match="reentrant checkpoints of shared parameters"):
        y.mean().backward()


def test_after_a_backward_that_failed_the_next_one_goes_on():
    class Planned(Exception):
        pass

    def explode(_):
        raise Planned

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    _, handle = put(model)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        hidden = model[0](torch.randn(2, 4))
        hidden.register_hook(explode)
        with pytest.raises(Planned):
            model[1](hidden).mean().backward()
    changed = [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
    assert changed == [False, False, True, True]
    model(torch.randn(2, 4)).mean().backward()
    with pytest.raises(InputError, match="was stepped already"):  # that one did not fail
        model(torch.randn(2, 4)).mean().backward()
    handle.undo()


def test_what_has_no_gradient_or_came_later_is_left_to_the_step():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    optimizer, handle = put(model)
    assert handle.report().rows[0].notes == ("2 parameters are stepped in backward",)
    model[1].requires_grad_(True)
    late = nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [late]})
    (model(torch.randn(2, 4)) * late).mean().backward()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    before = model[1].weight.clone()
    optimizer.step()
    assert not torch.equal(before, model[1].weight)
    assert not torch.equal(late, torch.ones(4))


def test_fp16_waits_for_its_scaler():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(PassConflict, match=r"amp\(dtype='fp16'\) and .* both change the gradients of step"):
        memopt.apply(model, [AMP(dtype="fp16"), OptimizerInBackward()], optimizer=optimizer)
    memopt.apply(model, [AMP(), OptimizerInBackward(), SetToNone()], optimizer=optimizer)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_of_the_loops_own_fails(late, unscale):
    """Also where a parameter that came later is left for it to look at."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    handle = memopt.apply(model, EARLY, optimizer=optimizer)
    if late:
        optimizer.add_param_group({"params": list(model[1].parameters())})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.randn(2, 4)).mean()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(InputError, match="optimizer_in_backward: a GradScaler steps the optimizer, but"):
        scaler.step(optimizer)
    optimizer.step()  # without it all is well
    handle.undo()
    assert not {"found_inf", "grad_scale", "_step_supports_amp_scaling"} & vars(optimizer).keys()


def test_a_parameter_in_two_optimizers_is_refused():
    model = nn.Linear(4, 4)
    both = [torch.optim.SGD(p, lr=0.1) for p in (model.parameters(), [model.weight])]
    with pytest.raises(InputError, match="optimizer_in_backward: weight is in two of the optimizers"):
        memopt.apply(model, EARLY, optimizer=both)
    memopt.apply(model, EARLY, optimizer=[both[0], both[0]])  # that is one


@pytest.mark.parametrize("change", ["pop", "reverse", "drop"])
def test_groups_that_are_changed_later(change):
    results = []
    for passes in ([], EARLY):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        groups = [{"params": list(part.parameters()), "lr": lr} for part, lr in zip(model, (0.1, 0.5), strict=True)]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        memopt.apply(model, passes, optimizer=optimizer)
        if change == "drop":
            optimizer.param_groups[1]["params"].pop(0)
        else:
            getattr(optimizer.param_groups, change)()
        for _ in range(2):
            optimizer.zero_grad()
            model.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
        left_out = {"pop": [True, True], "reverse": [False, False], "drop": [True, False]}[change]
        if passes:
            assert [p.grad is not None for p in model[1].parameters()] == left_out
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_several_processes_are_refused():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = nn.Linear(4, 4)
    put(model)
    loss = model(torch.randn(2, 4)).mean()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(InputError, match="optimizer_in_backward: 2 processes train together"):
            loss.backward()
        with pytest.raises(InputError, match="optimizer_in_backward: 2 processes train together"):
            put(nn.Linear(2, 2))
    finally:
        torch.distributed.destroy_process_group()


def test_with_a_batch_in_parts():
    """grad_accumulation has each gradient arrive once."""
    results = []
    for passes in ([GradAccumulation(parts=2)], [GradAccumulation(parts=2), OptimizerInBackward()]):
        model, optimizer, _ = mlp()
        memopt.apply(model, passes, optimizer=optimizer)
        for seed in range(2):
            torch.manual_seed(seed)
            model(torch.randn(4, 128)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_with_states_in_8_bits():
    """The same steps, whether all at once or one by one."""
    results = []
    for passes in ([Optimizer8bit()], [OptimizerInBackward(), Optimizer8bit()]):
        model, optimizer, _ = mlp()
        memopt.apply(model, passes, optimizer=optimizer)
        for seed in range(3):
            torch.manual_seed(seed)
            model(torch.randn(4, 128)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((model, optimizer))
    assert same(*(model.state_dict() for model, _ in results))
    assert same(*(optimizer.state_dict() for _, optimizer in results))


def trainer(tmp_path, **values):
    recipe = load_recipe(TINY)
    return Trainer(recipe, configure(recipe, None, values), data=None, cache=tmp_path)


def test_the_training_loop(tmp_path):
    runs = [trainer(tmp_path), trainer(tmp_path, passes=("optimizer_in_backward",))]
    for data in runs[0].loader(range(3)):
        losses = [run.train_step(data) for run in runs]
        assert torch.equal(*losses)
    for name, value in runs[0].model.state_dict().items():
        assert torch.equal(value, runs[1].model.state_dict()[name])
    for values, named in (
        ({"grad_clip": 1.0}, "grad_clip=1.0 need"),
        ({"microbatch": 2}, "microbatch=2 need"),
        ({"grad_clip": 1.0, "microbatch": 2}, "grad_clip=1.0 and microbatch=2 need"),
    ):
        with pytest.raises(
            InputError, match=f"optimizer_in_backward steps each parameter .* but {named} all gradients"
        ):
            trainer(tmp_path, passes=("optimizer_in_backward",), **values)
