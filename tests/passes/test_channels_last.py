"""Convolutions in channels_last: the same values, objects and files; optimizers that were at work go on."""

import copy
import gc
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer as optimizers

import memopt
from memopt import InputError, NothingToDo, PassConflict
from memopt.checkpoints import load_weights
from memopt.optim import take_off_dead
from memopt.passes import (
    AMP,
    BlockSwap,
    ChannelsLast,
    Checkpoint,
    GradAccumulation,
    OffloadActivations,
    OffloadOptimizer,
    OptimizerInBackward,
)
from tests.zoo import differences, fingerprint

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Net(nn.Module):
    """Convolutions of 3x3 and 1x1, transposed, grouped, between norms; a linear layer."""

    def __init__(self, dims=2):
        super().__init__()
        conv, transposed = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        self.stem = conv(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.point = conv(8, 8, 1)
        self.down = conv(8, 8, 3, stride=2, padding=1, groups=2)
        self.up = transposed(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.point(F.silu(self.norm(x)))
        x = self.up(self.down(x))
        return self.head(x.flatten(2).mean(-1))


def build(dims=2, dtype=torch.float32):
    torch.manual_seed(0)
    return Net(dims).to(dtype)


def image(dims=2, seed=1):
    return torch.randn(2, 3, *[8] * dims, generator=torch.Generator().manual_seed(seed))


def outcome(model, x):
    model.zero_grad()
    x = x.to(next(model.parameters()).dtype).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def error(found, expected):
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_and_what_they_make_are_channels_last(dims):
    model = build(dims)
    objects = list(model.parameters())
    handle = memopt.apply(model, [ChannelsLast()])
    seen = []
    for module in convolutions(model):
        strides = torch.empty(module.weight.shape, memory_format=LAST[dims + 2]).stride()
        assert module.weight.stride() == strides  # of 1x1, too, where a conversion would leave it
        module.register_forward_hook(lambda m, args, y: seen.extend([args[0], y]))
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    x = image(dims)
    before = x.stride()
    model(x)
    assert len(seen) == 8
    assert seen[0].is_contiguous(memory_format=LAST[dims + 2])
    if dims == 2:  # on a CPU some kernels of 3-D ones give the default layout
        assert all(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in seen)
    assert x.stride() == before
    total = sum(m.weight.nbytes for m in convolutions(model))
    assert handle.report().rows[0].notes == (f"4 weights of 4 convolutions, {total:,} bytes",)


@pytest.mark.parametrize("dims", [2, 3])
def test_exact_to_rounding(dims):
    truth = outcome(build(dims, torch.float64), image(dims))
    own = error(outcome(build(dims), image(dims)), truth)
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, max(3 * own, 1e-6))):
        model = build(dims, dtype)
        memopt.apply(model, [ChannelsLast()])
        found = outcome(model, image(dims))
        assert error(found, truth) < bound
        assert dims == 3 or all(p.grad.stride() == p.stride() for p in model.parameters())


def test_undo_lays_out_the_values_of_now():
    model = build()
    gc.collect()
    take_off_dead()
    before, hooks = fingerprint(model), len(optimizers._global_optimizer_pre_hooks)
    handle = memopt.apply(model, [ChannelsLast()])
    handle.undo()
    assert differences(before, fingerprint(model)) == []
    assert hooks == len(optimizers._global_optimizer_pre_hooks)

    handle = memopt.apply(model, [ChannelsLast()])
    outcome(model, image())
    with torch.no_grad():
        model.stem.weight.mul_(2)
    values = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    handle.undo()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name][0])
        assert torch.equal(parameter.grad, values[name][1])
        assert parameter.is_contiguous()
        assert parameter.grad.is_contiguous()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, fused=True, amsgrad=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}


def steps(model, optimizer, seeds):
    for seed in seeds:
        outcome(model, image(seed=seed))
        optimizer.step()


def test_fused_steps_look_at_no_layout(monkeypatch):
    """Why the pass takes care of optimizers: torch steps wrongly, without an error."""
    monkeypatch.setattr(optimizers, "_global_optimizer_pre_hooks", {})  # of models of other tests
    found = []
    for relaid in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4, 3, 2, 2))
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
        for _ in range(2):
            p.grad = torch.randn(4, 3, 2, 2).contiguous(memory_format=LAST[4] if relaid else torch.contiguous_format)
            optimizer.step()
            if relaid:
                p.data = p.data.contiguous(memory_format=LAST[4])
        found.append(p)
    assert not torch.allclose(*found, atol=0.01)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_that_were_at_work_go_on(make):
    """Steps before, with and after the pass; nobody told it of the optimizer."""
    plain, model = build(dtype=torch.float64), build(dtype=torch.float64)
    expected, optimizer = make(plain.parameters()), make(model.parameters())
    steps(plain, expected, range(6))
    steps(model, optimizer, range(2))
    states = [value for state in optimizer.state.values() for value in state.values()]
    handle = memopt.apply(model, [ChannelsLast()])
    steps(model, optimizer, range(2, 4))
    handle.undo()
    steps(model, optimizer, range(4, 6))
    assert all(a is b for a, b in zip(states, [v for s in optimizer.state.values() for v in s.values()], strict=True))
    assert error([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()]) < 1e-9


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        [OffloadOptimizer(min_bytes=1, at_once=1)],
        [OptimizerInBackward()],
        [OffloadOptimizer(min_bytes=1), OptimizerInBackward()],
    ],
    ids=["offload", "in_backward", "both"],
)
def test_steps_that_passes_take_apart(more, undo):
    """Hooks of steps see no states that are on a shelf, and there are none for a step in backward."""
    plain, model = build(dtype=torch.float64), build(dtype=torch.float64)
    expected, optimizer = (torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (plain, model))
    if undo:  # in the middle, the others stay
        handle = memopt.apply(model, [ChannelsLast()])
        whole = nn.ModuleList([model])
        memopt.apply(whole, more, optimizer=optimizer)
    for seed in range(4):
        if seed == 2:
            handle.undo() if undo else memopt.apply(model, [ChannelsLast(), *more], optimizer=optimizer)
        for target, steps in ((plain, expected), (model, optimizer)):
            target(image(seed=seed).double()).square().sum().backward()
            steps.step()
            steps.zero_grad()
    assert error([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()]) < 1e-9


def test_states_of_complex_weights_are_laid_out():
    weights = [nn.Parameter(torch.ones(4, 3, 2, 2, dtype=torch.complex64)) for _ in range(2)]
    model = nn.Conv2d(3, 4, 2, bias=False)
    model.weight = weights[1]
    found = [torch.optim.Adam([p], lr=0.1) for p in weights]
    for step in range(2):
        if step:
            handle = memopt.apply(model, [ChannelsLast()])
        for p, optimizer in zip(weights, found, strict=True):
            p.grad = torch.arange(48.0).view(4, 3, 2, 2) * (1 + 1j)
            optimizer.step()
    assert found[1].state[weights[1]]["exp_avg"].stride() == weights[1].stride() != weights[0].stride()
    assert torch.allclose(*weights)
    handle.undo()


def test_lbfgs_is_refused():
    model = build()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    handle = memopt.apply(model, [ChannelsLast()])

    def closure():
        optimizer.zero_grad()
        loss = model(image()).square().sum()
        loss.backward()
        return loss

    with pytest.raises(InputError, match="channels_last: LBFGS joins all gradients to one vector"):
        optimizer.step(closure)
    handle.undo()
    optimizer.step(closure)


def test_states_that_are_loaded_are_laid_out_before_the_step():
    plain = build(dtype=torch.float64)
    expected = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    steps(plain, expected, range(2))
    model = copy.deepcopy(plain)
    memopt.apply(model, [ChannelsLast()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    steps(plain, expected, range(2, 4))
    steps(model, optimizer, range(2, 4))
    assert error([p.detach() for p in model.parameters()], [p.detach() for p in plain.parameters()]) < 1e-9


def test_gradients_that_were_begun_go_on():
    model, plain = build(dtype=torch.float64), build(dtype=torch.float64)
    for target in (plain, model):
        outcome(target, image())
    memopt.apply(model, [ChannelsLast()])
    for target in (plain, model):
        target(image(seed=2).double()).sum().backward()
    assert error([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]) < 1e-13
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


def test_quantized_states_are_refused():
    bnb = pytest.importorskip("bitsandbytes")

    def made(model):
        return bnb.optim.AdamW8bit(model.parameters(), lr=0.01, min_8bit_size=1)

    model = build()
    optimizer = made(model)
    steps(model, optimizer, [1])
    handle = memopt.apply(model, [ChannelsLast()])
    message = "state1 of AdamW8bit is quantized in blocks of memory, .* before the optimizer's first step"
    with pytest.raises(InputError, match=message):
        steps(model, optimizer, [2])
    handle.undo()
    steps(model, optimizer, [2])
    memopt.apply(model, [ChannelsLast()])
    optimizer = made(model)
    steps(model, optimizer, [3])  # states made with the pass lie as weights do
    memopt.apply(model, [AMP()])
    steps(model, optimizer, [4])


def test_quantized_states_are_refused_after_undo():
    bnb = pytest.importorskip("bitsandbytes")
    model = build()
    handle = memopt.apply(model, [ChannelsLast()])
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=0.01, min_8bit_size=1)
    steps(model, optimizer, [1])
    handle.undo()
    with pytest.raises(InputError, match="quantized in blocks of memory"):
        steps(model, optimizer, [2])


def test_files_are_interchangeable(tmp_path):
    from safetensors.torch import save_model

    model, plain = build(), build()
    memopt.apply(model, [ChannelsLast()])
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    plain.load_state_dict(torch.load(stream, weights_only=True))
    save_model(model, tmp_path / "model.safetensors")
    load_weights(tmp_path / "model.safetensors", plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(p.is_contiguous() for p in plain.parameters())
    with torch.no_grad():
        plain.stem.weight.add_(1)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.stem.weight, plain.stem.weight)
    assert model.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_is_not_its_own_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.tied, self.twin = (nn.Conv2d(4, 4, 3) for _ in range(3))
            self.twin.weight = self.tied.weight  # one parameter in two places: that is its own
            self.view = nn.Conv2d(4, 4, 3)
            self.view.weight = nn.Parameter(torch.randn(8, 4, 3, 3)[:4])
            self.whole = nn.Parameter(self.view.weight.detach())  # another parameter of the same memory
            self.ready = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
            self.matrix = nn.Conv1d(4, 4, 3)

    model = Model()
    assert model.whole.data_ptr() == model.view.weight.data_ptr()
    before = fingerprint(model)
    handle = memopt.apply(model, [ChannelsLast()])
    assert [claim.path for claim in handle.report().rows[0].claims] == ["own", "tied", "twin"]
    assert model.whole.data_ptr() == model.view.weight.data_ptr()
    assert model.twin.weight is model.tied.weight
    handle.undo()
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)]
)
def test_nothing_to_do(model):
    with pytest.raises(NothingToDo, match="2-D or 3-D convolutions with weights in the default layout"):
        memopt.apply(model, ["channels_last"])


def test_inputs_of_other_kinds_stay():
    class Takes(nn.Conv2d):
        def forward(self, x, mask, ids, pair):
            self.seen = (x, mask, ids, *pair["two"])
            return super().forward(x)

    model = Takes(3, 4, 3)
    memopt.apply(model, [ChannelsLast()])
    x, mask, ids = torch.randn(2, 3, 8, 8), torch.randn(2, 8), torch.ones(2, 3, 4, 4, dtype=torch.long)
    last = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    model(x, mask, ids, {"two": [x, last]})
    assert model.seen[0].is_contiguous(memory_format=torch.channels_last)
    assert model.seen[1] is mask
    assert model.seen[2] is ids
    assert torch.equal(model.seen[3], x)
    assert model.seen[4] is last


def test_a_view_that_needs_the_default_layout_is_explained():
    class Views(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).view(len(x), -1)

    class Pairs(nn.Conv2d):
        def forward(self, x):
            return torch.view_as_complex(super().forward(x).unflatten(-1, (3, 2)))

    model = Views(3, 4, 3)
    handle = memopt.apply(model, [ChannelsLast()])
    with pytest.raises(InputError, match=r"channels_last: Views takes a view .* Use reshape there"):
        model(torch.randn(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"channels_last: Pairs takes a view .*\(contiguous before view_as_complex"):
        memopt.apply(Pairs(3, 4, 3), [ChannelsLast()]).model(torch.randn(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="expected input"):  # errors of another kind stay what they are
        model(torch.randn(2, 5, 8, 8))
    handle.undo()
    model(torch.randn(2, 3, 8, 8))


def test_a_model_that_writes_to_its_input_is_told():
    class Writes(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.mul_(2))

    model = Writes(3, 4, 3)
    memopt.apply(model, [ChannelsLast()])
    with pytest.raises(InputError, match="Writes changes its input in place, which is a copy here"):
        model(torch.randn(2, 3, 8, 8))
    model(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last))


def test_dropout_is_mentioned():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.1))
    notes = memopt.apply(model, [ChannelsLast()]).report().rows[0].notes
    assert notes[1] == "dropout draws other masks: numbers are drawn in the order of memory"


def test_a_model_that_dies_with_the_pass_leaves_no_hook():
    model = build()
    gc.collect()
    take_off_dead()
    hooks = len(optimizers._global_optimizer_pre_hooks)
    memopt.apply(model, [ChannelsLast()])
    assert len(optimizers._global_optimizer_pre_hooks) == hooks + 1
    del model
    gc.collect()
    take_off_dead()
    assert len(optimizers._global_optimizer_pre_hooks) == hooks


@pytest.mark.parametrize("pass_", [ChannelsLast(), BlockSwap(blocks="*")])
def test_a_model_may_die_while_another_is_stepped(pass_):
    """torch is going through the hooks then, which must not change."""
    model = build()
    handle = memopt.apply(model, [pass_])
    take_off_dead()
    hooks = len(optimizers._global_optimizer_pre_hooks)
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)

    def dies(*_):
        nonlocal model, handle
        model = handle = None
        gc.collect()

    first = optimizers.register_optimizer_step_pre_hook(dies)
    optimizers._global_optimizer_pre_hooks.move_to_end(first.id, last=False)
    try:
        other(torch.randn(1, 2)).sum().backward()
        optimizer.step()
    finally:
        first.remove()
    take_off_dead()
    assert len(optimizers._global_optimizer_pre_hooks) == hooks - 1


def test_a_deep_copy():
    model = build(dtype=torch.float64)
    expected = outcome(copy.deepcopy(model), image())
    handle = memopt.apply(model, [ChannelsLast()])
    twin = copy.deepcopy(model)
    handle.undo()
    assert twin.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert error(outcome(twin, image()), expected) < 1e-13


OTHERS = [
    Checkpoint(blocks="stem"),
    OffloadActivations(min_bytes=1),
    BlockSwap(blocks="[sud]*"),
    BlockSwap(blocks="[sud]*", to="disk"),
    GradAccumulation(),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_with_other_passes(other, first):
    model = build(dtype=torch.float64)
    expected = outcome(copy.deepcopy(model), image())
    before = fingerprint(model)
    handles = [memopt.apply(model, [p]) for p in ((ChannelsLast(), other) if first else (other, ChannelsLast()))]
    for _ in range(2):
        assert error(outcome(model, image()), expected) < 1e-13
    handles[0].undo()
    assert error(outcome(model, image()), expected) < 1e-13
    handles[1].undo()
    model.zero_grad()
    assert differences(before, fingerprint(model)) == []


def test_compiled():
    model = build(dtype=torch.float64)
    expected = outcome(copy.deepcopy(model), image())
    memopt.apply(model, [ChannelsLast()])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error([compiled(image().double()).detach()], expected[:1]) < 1e-13


def test_twice():
    model = build()
    memopt.apply(model, [ChannelsLast()])
    with pytest.raises(PassConflict):
        memopt.apply(model, [ChannelsLast()])
