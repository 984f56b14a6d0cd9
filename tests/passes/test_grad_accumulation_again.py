"""A batch in parts: what is computed again is what was computed, also with other passes, compiled, and in parallel."""

import copy
import gc
import os
import weakref

import pytest
import torch
from torch import nn

import memopt
from memopt import InputError
from memopt.passes import (
    AMP,
    BlockSwap,
    Checkpoint,
    FusedAttention,
    GradAccumulation,
    OffloadActivations,
    OffloadSkips,
    OuterProduct,
    SetToNone,
)
from tests.nets import Block
from tests.passes.test_grad_accumulation import build, contrastive, error, gradients, inputs
from tests.zoo import ZOO, run


class Random(nn.Module):
    """Dropout of the global generator and of one of its own, or one that it is given."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(16, 16), nn.Dropout(0.5)
        self.generator = torch.Generator().manual_seed(3)
        self.masks = []

    def forward(self, x, generator=None):
        x = self.drop(self.layer(x))
        keep = torch.rand(x.shape, generator=self.generator if generator is None else generator) > 0.5
        self.masks.append(((x.detach() != 0) & keep).clone())
        return (x * keep).square()


@pytest.mark.parametrize("given", [False, True], ids=["held", "given"])
def test_masks_are_drawn_again_as_they_were(given):
    model = Random()
    handle = memopt.apply(model, [GradAccumulation(parts=3)])
    assert any("other masks" in note for note in handle.report().rows[0].notes)
    x = torch.randn(6, 16)
    generator = torch.Generator().manual_seed(4) if given else model.generator
    model(x, generator)
    model.masks.clear()
    y = model(x, generator)
    kept = torch.cat(model.masks)
    assert torch.equal(y != 0, kept)
    global_state, own_state = torch.get_rng_state(), generator.get_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(generator.get_state(), own_state)
    # By hand: y = (2 kept (W x + b))^2.
    by_hand = 2 * 4 * ((model.layer(x) * kept).detach()).T @ x
    assert torch.allclose(model.layer.weight.grad, by_hand, atol=1e-4)


def test_the_first_try_leaves_random_numbers_alone():
    found = []
    for warm in (False, True):
        torch.manual_seed(0)
        model = Random()
        memopt.apply(model, [GradAccumulation(parts=3)])
        if warm:
            state, own = torch.get_rng_state(), model.generator.get_state()
            model(torch.ones(6, 16))
            torch.set_rng_state(state)
            model.generator.set_state(own)
        found.append(model(torch.ones(6, 16)))
    assert torch.equal(*found)


def test_modes_and_parameters_are_those_of_the_forward():
    model = build()
    expected = gradients(copy.deepcopy(model))
    memopt.apply(model, [GradAccumulation(parts=3)])
    for _ in range(2):
        x, t = inputs()
        loss = contrastive(model(x, t, scale=0.5))
        model.zero_grad()
        model.eval()
        loss.backward()
        model.train()
        assert error([p.grad for p in model.parameters()], expected[2:]) < 1e-13
    other = {name: (1.5 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    plain = build()
    for target in (plain, model):
        x, t = inputs()
        y = torch.func.functional_call(target, other, (x, t))
        loss = contrastive(y)
        found = torch.autograd.grad(loss, list(other.values()))
        if target is plain:
            expected = found
    assert error(found, expected) < 1e-13


def test_retained_graphs_and_second_derivatives():
    x, t = inputs()
    results = []
    for passes in ([], [GradAccumulation(parts=3)]):
        model = build()
        memopt.apply(model, passes)
        parameters = list(model.parameters())
        loss = contrastive(model(x, t))
        twice = [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2)]
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
        results.append([*twice[0], *twice[1], *second])
    assert error(results[1], results[0]) < 1e-10


def test_a_part_that_the_loss_leaves_out_and_outputs_that_die():
    model = build()
    memopt.apply(model, [GradAccumulation(samples=2)])
    x, t = inputs()
    model(x, t)[:2].sum().backward()
    plain = build()
    plain(x, t)[:2].sum().backward()
    found, expected = ([p.grad for p in m.parameters()] for m in (model, plain))
    assert error(found, expected) < 1e-13
    kept = weakref.ref(model(x, t))
    gc.collect()
    assert kept() is None


def test_functional_transforms_see_the_whole_batch():
    model, (x, t) = build(), inputs()
    memopt.apply(model, [GradAccumulation()])

    def loss(parameters):
        return contrastive(torch.func.functional_call(model, parameters, (x, t)))

    found = torch.func.grad(loss)(dict(model.named_parameters()))
    assert error(list(found.values()), gradients_of(build(), x, t)) < 1e-13


def gradients_of(model, x, t):
    return torch.autograd.grad(contrastive(model(x, t)), list(model.parameters()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in compile
def test_compiled_blocks_inside_and_a_compiled_model():
    x, t = inputs()
    expected = gradients_of(build(), x, t)
    model = build()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    handle = memopt.apply(model, [GradAccumulation(samples=2)])
    for _ in range(2):
        assert error(gradients_of(model, x, t), expected) < 1e-13
    assert handle.report().rows[0].counts["parts"] == 6
    handle.undo()
    torch.compiler.reset()
    model = build()
    handle = memopt.apply(model, [GradAccumulation(samples=2)])
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert error(gradients_of(whole, x, t), expected) < 1e-13
    assert handle.report().rows[0].counts == {}  # inside a model that is compiled as a whole nothing is split


OTHERS = [
    Checkpoint(),
    OffloadActivations(min_bytes=1),
    OffloadActivations(to="disk", min_bytes=1),
    OffloadSkips(min_bytes=1, waits=2),
    BlockSwap(),
    FusedAttention(),
    OuterProduct(),
]


def quiet(name):
    model = ZOO[name].build().double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(scope="module")
def expected():
    return run(quiet("hae_v2"), ZOO["hae_v2"])


def close(found, expected, relative=1e-9):
    assert abs(found[0] - expected[0]) <= relative * abs(expected[0])
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= relative * gradient.norm() + 1e-13, name


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_with_other_passes_in_either_order(other, first, expected):
    model = quiet("hae_v2")
    memopt.apply(model, [GradAccumulation(), other] if first else [other, GradAccumulation()])
    for _ in range(2):
        close(run(model, ZOO["hae_v2"]), expected)


def test_with_all_of_them(expected):
    model = quiet("hae_v2")
    chosen = [p for p in OTHERS if p != OffloadActivations(to="disk", min_bytes=1)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    memopt.apply(model, [*chosen, GradAccumulation(), SetToNone()], optimizer=optimizer)
    for _ in range(2):
        close(run(model, ZOO["hae_v2"]), expected)


@pytest.mark.parametrize("first", [True, False])
def test_with_mixed_precision(first):
    """Of the same size as the rounding of AMP itself."""
    truth = gradients(build(torch.float32), dtype=torch.float32)
    rounded = build(torch.float32)
    memopt.apply(rounded, [AMP()])
    own = error(gradients(rounded, dtype=torch.float32), truth)
    model = build(torch.float32)
    memopt.apply(model, [GradAccumulation(), AMP()] if first else [AMP(), GradAccumulation()])
    found = gradients(model, dtype=torch.float32)
    assert all(g.dtype == torch.float32 for g in found)
    assert 0 < error(found, truth) < 1.5 * own


def test_checkpoint_and_parts_keep_less_than_either():
    def kept(*passes):
        model = nn.Sequential(*(Block(16) for _ in range(4)))
        return memopt.profile(model, torch.empty(64, 16), passes=passes).kept

    both = kept(Checkpoint(blocks="*"), GradAccumulation(parts=4))
    assert both < min(kept(Checkpoint(blocks="*")), kept(GradAccumulation(parts=4))) < kept()


class Wrong(nn.Module):
    """Does, in a way that is asked for, what parts of a batch cannot do alike."""

    def __init__(self, way):
        super().__init__()
        self.layer, self.way = nn.Linear(4, 4), way
        self.code = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x, each=()):
        y = self.layer(x)
        if self.way == "code":
            with torch.no_grad():
                self.code.add_(1)
        if self.way == "statistics":  # the kernel counts no change
            y = nn.functional.batch_norm(y, self.mean, self.var, training=True)
        if self.way == "attribute":
            self.loss = y.square().mean()
        if self.way == "iterator":
            y = y * next(each)
        if self.way == "transposed":
            return y.mT
        return (y, {"row": self.code, "length": len(x), "shape": x.shape}[self.way]) if self.way in ROWS else y


ROWS = ("row", "length", "shape")
REFUSED = {
    "code": "changes its parameter code in forward",
    "statistics": "changes its buffer mean in forward",
    "attribute": "keeps a result with a gradient as loss, which would be that of the last part",
    "iterator": "each of Wrong is an iterator",
    "transposed": r"has the shape \[4, 3\] for a part of 3 samples",
    "row": r"the output 1 of Wrong has the shape \[4, 4\] for a part of 3 samples",
    "length": "the output 1 of Wrong is a int, another one for each part",
    "shape": r"the output 1\.0 of Wrong is a int, another one for each part",
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_equal_parts_would_hide_is_refused_and_nothing_has_changed(way):
    model = Wrong(way)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memopt.apply(model, [GradAccumulation(parts=2)])
    with pytest.raises(InputError, match=REFUSED[way]):
        model(torch.randn(8, 4), *([iter([2.0, 3.0])] if way == "iterator" else []))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("needs", [True, False])
def test_weights_that_are_frozen_or_thawed_between_forward_and_backward(needs):
    def gradients(*passes):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), torch.randn(8, 4).double()
        memopt.apply(model, passes)
        model.requires_grad_(needs)
        out = model(x.requires_grad_()).square().sum()
        model.requires_grad_(not needs)
        out.backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    assert error(gradients(GradAccumulation()), gradients()) < 1e-14


def test_a_weight_written_between_forward_and_backward_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    memopt.apply(model, [GradAccumulation()])
    out = model(torch.randn(8, 4)).sum()
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def worker(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    x, t = inputs(8)
    mine = slice(4 * rank, 4 * rank + 4)
    model = build()
    memopt.apply(model, [GradAccumulation(samples=1), Checkpoint()])
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        parallel.zero_grad()
        parallel(x[mine], t[mine]).square().mean().backward()
    torch.save([p.grad for p in model.parameters()], os.path.join(folder, f"{rank}.pt"))
    torch.distributed.barrier()  # gloo may abort a process whose partner is gone
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    x, t = inputs(8)
    model = build()
    model(x, t).square().mean().backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert error(found, [p.grad for p in model.parameters()]) < 1e-13
