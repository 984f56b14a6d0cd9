"""What the policies and granularities of Checkpoint keep, to the byte, and that they stay exact."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import memopt
from memopt import policies
from memopt.blocks import find_blocks, find_layers
from memopt.memory import profile
from memopt.passes import AMP, Checkpoint, OffloadActivations, OuterProduct
from tests.passes.test_checkpoint import Net, saved_bytes
from tests.zoo import ZOO, differences, fingerprint, run

WAYS = {
    "cheap": Checkpoint(policy="cheap"),
    "skips": Checkpoint(policy="skips"),
    "layer": Checkpoint(granularity="layer"),
    "nested": Checkpoint(granularity="nested"),
    "cheap_layer": Checkpoint(policy="cheap", granularity="layer"),
    "cheap_nested": Checkpoint(policy="cheap", granularity="nested"),
    "skips_nested": Checkpoint(policy="skips", granularity="nested"),
    "everything": Checkpoint(policy=lambda op, *args, **kwargs: True),
}
CASES = [case for case in ZOO.values() if case.blocks and case.name != "guided_unet_legacy"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bitwise_on_every_model(case):
    plain = case.build()
    expected = [run(plain, case, seed) for seed in range(2)]
    for name, way in WAYS.items():
        model = case.build()
        handle = memopt.apply(model, [way])
        for seed, (loss, grads, buffers) in enumerate(expected):
            loss_found, grads_found, buffers_found = run(model, case, seed)
            assert torch.equal(loss, loss_found), name
            for a, b in ((grads, grads_found), (buffers, buffers_found)):
                assert a.keys() == b.keys()
                for key in a:
                    assert (a[key] is None) == (b[key] is None), (name, key)
                    assert a[key] is None or torch.equal(a[key], b[key]), (name, key)
        handle.undo()


@pytest.mark.parametrize("name", ["cheap", "nested", "skips_nested"])
def test_undo_leaves_no_trace(name):
    for case in (ZOO["hae_v2"], ZOO["unet2d"]):
        model = case.build()
        before = fingerprint(model)
        memopt.apply(model, [WAYS[name]]).undo()
        assert not differences(before, fingerprint(model))


class Residual(nn.Module):
    """Two layers and a layer on the input beside them: the shape of a residual block."""

    def __init__(self, width=16):
        super().__init__()
        self.norm1, self.a = nn.LayerNorm(width), nn.Linear(width, 64)
        self.norm2, self.b = nn.LayerNorm(64), nn.Linear(64, width)
        self.beside = nn.Linear(width, width)

    def forward(self, x):
        h = self.a(F.silu(self.norm1(x)))
        h = self.b(F.silu(self.norm2(h)))
        return self.beside(x) + h


def counted(model, *names):
    """How often modules' operations run in one training step, in forward and in all."""
    calls = []
    model.zero_grad()
    x = torch.randn(10, 16)

    class Counts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name[6:] in names:
                calls.append(func)
            return func(*args, **(kwargs or {}))

    with Counts():
        out = model(x).sum()
        forward = len(calls)
        out.backward()
    return forward, len(calls)


def kept_by(passes, model, x):
    """Bytes that are kept for backward, which begins with nothing: those that go when the graph does."""
    memopt.apply(model, passes)
    model(x).sum().backward()  # the first call watches
    return profile(model, (x,), real=True).kept


def test_cheap_keeps_the_layers_results_to_the_byte():
    x = torch.randn(10, 16)
    # An input and a result of a for each block. What b and beside give is not asked for: it leaves the block, and the
    # recomputation ends before.
    assert kept_by([Checkpoint(policy="cheap")], Net(Residual(), Residual()), x) == 4 * 2 * (10 * 16 + 10 * 64)
    assert kept_by([Checkpoint()], Net(Residual(), Residual()), x) == 4 * 2 * 10 * 16


def test_layers_are_not_computed_again():
    model = Net(Residual(), Residual())
    memopt.apply(model, [Checkpoint(policy="cheap")])
    for _ in range(3):
        assert counted(model, "addmm") == (6, 6)
        assert counted(model, "native_layer_norm") == (4, 8)


def test_recomputation_ends_with_what_it_has_to_make():
    """b and beside give what nobody saved; beside's input is the block's."""
    model = Net(Residual(), Residual())
    memopt.apply(model, [Checkpoint()])
    counted(model)
    assert counted(model, "addmm") == (6, 8)


def test_a_function_decides():
    seen = []

    def policy(op, *args, **kwargs):
        seen.append((op, args[0].shape))
        return op is torch.ops.aten.silu.default

    model = Net(Residual())
    memopt.apply(model, [Checkpoint(policy=policy)])
    assert counted(model, "silu") == (2, 2)
    assert counted(model, "native_layer_norm") == (2, 4)
    assert (torch.ops.aten.silu.default, (10, 64)) in seen


def test_bad_policies():
    for bad in ("chep", 3, None):
        with pytest.raises(memopt.InputError, match="none of full, cheap, skips, nor a function of an operation"):
            Checkpoint(policy=bad)
    with pytest.raises(memopt.InputError, match="granularity 'tiny' is not one of block, layer, nested"):
        Checkpoint(granularity="tiny")
    with pytest.raises(memopt.InputError, match="recomputes larger blocks, granularity 'layer' smaller ones"):
        Checkpoint(policy="skips", granularity="layer")
    model = Net(Residual())
    memopt.apply(model, [Checkpoint(policy=lambda op, *args, **kwargs: None)])
    with pytest.raises(memopt.InputError, match=r"the policy must answer True or False for aten\..*, not None"):
        model(torch.randn(2, 16))


def test_by_name():
    model = Net(Residual())
    handle = memopt.apply(model, [{"checkpoint": {"policy": "cheap", "granularity": "nested"}}])
    assert handle.passes == (Checkpoint(policy="cheap", granularity="nested"),)


def test_the_table_names_operators_of_torch():
    names = [name for family in policies.FAMILIES.values() for name in family.split()]
    assert len(names) == len(set(names))
    assert {"convolution", "mm", "addmm", "_scaled_dot_product_flash_attention_for_cpu"} <= set(names)
    assert all(kept <= policies.FAMILIES.keys() for kept in policies.POLICIES.values())


def gradients(model, x, seed=1, **how):
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(x).square().sum()
    out.backward(**how)
    return [p.grad.clone() for p in model.parameters()]


def both(make, x, passes, steps=3):
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    memopt.apply(model, passes)
    for step in range(steps):
        assert all(map(torch.equal, gradients(twin, x, step), gradients(model, x, step)))
        assert all(map(torch.equal, twin.buffers(), model.buffers()))
    return model


class Attends(nn.Module):
    """Attention that draws random numbers, then dropout that must draw the same as in forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.BatchNorm1d(16)

    def forward(self, x):
        q, k, v = self.a(x)[:, None].chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)[:, 0]
        return self.b(F.dropout(self.norm(h), 0.5)) + F.dropout(x, 0.3)


@pytest.mark.parametrize("policy", ["cheap", lambda op, *args, **kwargs: True], ids=["cheap", "everything"])
def test_random_numbers_after_an_operation_that_was_not_done_again(policy):
    both(lambda: Net(Attends(), Attends()), torch.randn(10, 16), [Checkpoint(policy=policy)])


def test_a_kept_result_that_draws_is_handed_out_with_the_state_it_left():
    """By hand: the dropout that follows a kept one."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.b(F.dropout(self.a(F.dropout(self.a(x), 0.5)), 0.5).sin())

    def first(op, *args, **kwargs):
        return op._schema.name in ("aten::native_dropout", "aten::bernoulli_", "aten::addmm", "aten::rand_like")

    both(lambda: Net(Twice()), torch.randn(10, 16), [Checkpoint(policy=first)])


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(torch.relu_(self.a(x)))


def test_kept_results_changed_in_place_are_computed_again():
    model = both(lambda: Net(InPlace(), InPlace()), torch.randn(10, 16), [Checkpoint(policy="cheap")])
    assert counted(model, "addmm") == (4, 6)


def test_a_result_that_leaves_the_block_and_is_changed_by_the_caller():
    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            h = self.a(x)
            return h, self.b((h + 1).sin())

    class Changes(Net):
        def forward(self, x):
            h, y = self.blocks[0](x)
            return y + h.mul_(2)

    both(lambda: Changes(Leaves()), torch.randn(10, 16), [Checkpoint(policy="cheap")])


def test_another_course_than_forwards_is_computed():
    """A block that finds something made by the last one: its recomputation makes one product less."""

    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x, cache):
            if "square" not in cache:
                cache["square"] = (self.weight() @ self.weight()).detach()
            return self.a(torch.tanh(x @ cache["square"]) @ self.weight()).sin()

        def weight(self):
            return self.a.weight.detach()

    class Shares(Net):
        def forward(self, x):
            self.cache = Cache()
            for block in self.blocks:
                x = block(x, self.cache)
            return x

    class Cache:  # no container that a recomputation gets anew
        def __init__(self):
            self.held = {}

        def __contains__(self, name):
            return name in self.held

        def __setitem__(self, name, value):
            self.held[name] = value

        def __getitem__(self, name):
            return self.held[name]

    both(lambda: Shares(Caches(), Caches()), torch.randn(16, 16), [Checkpoint(policy="cheap")])


@pytest.mark.parametrize("name", WAYS)
def test_backward_twice(name):
    model, x = Net(Residual(), Attends()).eval(), torch.randn(4, 16)
    memopt.apply(model, [WAYS[name]])
    for step in range(2):
        torch.manual_seed(step)
        out = model(x).square().sum()
        first = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(out, list(model.parameters()))))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.backward()


@pytest.mark.parametrize("name", WAYS)
def test_double_backward(name):
    model, x = Net(Residual(), Residual()), torch.randn(3, 16, requires_grad=True)

    def penalty():
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), list(model.parameters()), allow_unused=True)

    plain = penalty()
    memopt.apply(model, [WAYS[name]])
    for _ in range(2):
        for a, b in zip(plain, penalty(), strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", ["cheap", "cheap_nested"])
def test_shared_blocks_under_autocast(name):
    """Autocast casts a shared weight once in forward, and again in each recomputation."""
    block = Residual()
    model, x = Net(block, Residual(), block), torch.randn(4, 16)
    memopt.apply(model, [AMP()])
    plain = [gradients(model, x) for _ in range(2)]
    memopt.apply(model, [WAYS[name]])
    for expected in plain:
        assert all(map(torch.equal, expected, gradients(model, x)))


def test_weights_changed_between_forward_and_backward_raise():
    model, x = Net(Residual()), torch.randn(4, 16, requires_grad=True)
    memopt.apply(model, [Checkpoint(policy="cheap")])
    for _ in range(2):
        out = model(x).sum()
        with torch.no_grad():
            model.blocks[0].b.weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward()


@pytest.mark.parametrize("name", ["cheap", "cheap_nested"])
def test_exceptions_leave_the_model_usable_and_nothing_behind(name):
    class Fails(Residual):
        fail = False

        def forward(self, x):
            h = super().forward(x)
            if self.fail:
                raise ValueError("on purpose")
            return h.sin().exp()

    model, x = Net(Fails(), Fails()), torch.randn(4, 16)
    plain = gradients(model, x)
    memopt.apply(model, [WAYS[name]])
    for _ in range(3):
        model.blocks[1].fail = True
        with pytest.raises(ValueError, match="on purpose"):
            model(x)
        model.blocks[1].fail = False
        out = model(x)
        model.blocks[0].fail = True  # in recomputation, which has to make what sin gets
        with pytest.raises(ValueError, match="on purpose"):
            out.sum().backward()
        model.blocks[0].fail = False
        del out
        assert all(map(torch.equal, plain, gradients(model, x)))


def test_what_is_kept_goes_with_the_graph():
    model, x, made = Net(Residual(), Residual()), torch.randn(4, 16), []
    memopt.apply(model, [Checkpoint(policy="cheap")])
    model(x).sum().backward()
    model.blocks[1].a.register_forward_hook(lambda *args: made.append(StorageWeakRef(args[2].untyped_storage())))
    gc.disable()  # without the garbage collector's help
    try:
        out = model(x)
        assert [ref.expired() for ref in made] == [False]
        del out  # backward never runs
        assert [ref.expired() for ref in made] == [True]
        model(x).sum().backward()
        assert len(made) == 3
        assert all(ref.expired() for ref in made)
    finally:
        gc.enable()


class UNet(nn.Module):
    """Two blocks down, two up; each of those up gets a skip connection beside what comes from below."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([Residual(), Residual()])
        self.up = nn.ModuleList([Residual(32), Residual(80)])
        self.first, self.last = nn.Linear(16, 16), nn.Linear(80, 1)

    def forward(self, x):
        x = self.first(x)
        skips = [x]
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = skips.pop()
        x = self.up[0](torch.cat([x, skips.pop()], dim=-1))
        x = torch.cat([x, x.sin()], dim=-1)
        return self.last(self.up[1](torch.cat([x, skips.pop()], dim=1)))


def test_a_concatenation_with_a_skip_connection_is_kept_in_parts():
    model, x = UNet(), torch.randn(10, 16)
    twin = copy.deepcopy(model)
    memopt.apply(model, [Checkpoint()])
    for _ in range(3):
        assert all(map(torch.equal, gradients(twin, x), gradients(model, x)))
    held = saved_bytes(model, lambda m: m(x).sum())
    # first's input; the inputs of the blocks down; beside the skips, what each up got from below; last's input. The
    # outputs of the last block down and of the first skip are inputs of blocks already, or parts that are kept.
    below = 10 * 16 + 10 * 64
    assert held == 4 * (10 * 16 + 2 * 10 * 16 + below + 10 * 80 + 10 * 32)  # x.sin() saves x


def test_layers_found():
    unet = ZOO["hae_v2"].build()
    blocks = find_blocks(unet)
    assert find_layers(unet.get_submodule(blocks[0]), blocks[0]) == [f"{blocks[0]}.0", f"{blocks[0]}.1"]
    layers = {name: find_layers(unet.get_submodule(name), name) for name in blocks}
    assert all(path.startswith(f"{name}.") for name, found in layers.items() for path in found)
    assert any(len(found) >= 2 for found in layers.values())
    dit = ZOO["dit"].build()
    assert find_layers(dit.transformer_blocks[0], "transformer_blocks.0") == [
        f"transformer_blocks.0.{name}" for name in ("norm1", "attn1", "ff")
    ]
    assert find_layers(Residual(), "x") == []


def test_skips_takes_levels_whole():
    unet = ZOO["unet2d"].build()
    levels = find_blocks(unet, whole=True)
    assert "down_blocks.0" in levels
    assert not any(name.startswith("down_blocks.0.") for name in levels)
    handle = memopt.apply(unet, [Checkpoint(policy="skips", granularity="nested")])
    paths = [claim.path for claim in handle.report().rows[0].claims]
    assert {"down_blocks.0", "down_blocks.0.resnets.0"} <= set(paths)


def test_every_layer_found_is_run_as_a_module():
    for case in CASES:
        model = case.build()
        called, names = set(), []
        for whole in (False, True):
            for name in find_blocks(model, whole=whole):
                names += [name, *find_layers(model.get_submodule(name), name)]
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name, called=called: called.add(name))
        run(model, case)
        missed = set(names) - called
        assert all(name.startswith("blocks.1") for name in missed) if case.name == "data_dependent" else not missed


def peaks(case, way):
    model = case.build()
    args, kwargs = case.inputs()
    return profile(model, (args, kwargs), passes=[way])


def test_granularities_order_what_is_kept_and_what_is_live():
    case = ZOO["hae_v2"]
    full, layer = peaks(case, Checkpoint()), peaks(case, WAYS["layer"])
    cheap = peaks(case, WAYS["cheap"])
    plain = profile(case.build(), case.inputs())
    assert full.kept < layer.kept < plain.kept
    assert full.kept < cheap.kept < plain.kept


@pytest.mark.parametrize("name", ["cheap", "nested"])
def test_offloaded_inputs(name):
    model, x = UNet(), torch.randn(10, 16)
    plain = gradients(model, x)
    memopt.apply(model, [WAYS[name], OffloadActivations(min_bytes=1)])
    for _ in range(3):
        assert all(map(torch.equal, plain, gradients(model, x)))


def test_hae_with_the_outer_product():
    case = ZOO["hae_v2"]
    model = case.build()
    memopt.apply(model, [OuterProduct()])
    expected = [run(model, case, seed) for seed in range(2)]
    for name in ("cheap", "nested", "cheap_nested"):
        model = case.build()
        memopt.apply(model, [OuterProduct(), WAYS[name]])
        for seed, (loss, grads, _) in enumerate(expected):
            found = run(model, case, seed)
            assert torch.equal(loss, found[0])
            assert all(torch.equal(grads[key], found[1][key]) for key in grads if grads[key] is not None)


@pytest.mark.parametrize("name", ["cheap", "nested", "everything"])
def test_compiles_without_graph_breaks(name):
    model, x = Net(Residual(), Residual()), torch.randn(5, 16)
    plain = gradients(model, x)
    memopt.apply(model, [WAYS[name]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(x).square().sum().backward()
    for a, b in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
