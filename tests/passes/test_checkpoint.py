import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import memopt
from memopt.blocks import find_blocks
from memopt.passes import AMP, Checkpoint
from tests.zoo import ZOO, guided, loss_of, placed, run


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 64)
        self.b = nn.Linear(64, 16)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks or [Block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def saved_bytes(model, forward):
    """Bytes of distinct storages that autograd keeps for backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        loss = forward(model)
    total = sum(t.untyped_storage().nbytes() for t in seen.values())
    loss.backward()
    return total


def test_saved_bytes_are_exactly_the_block_inputs():
    x = torch.randn(10, 16)
    model = Net()
    # Each block keeps its input (10 x 16) for a, and tanh's output (10 x 64), which is b's input too.
    assert saved_bytes(model, lambda m: m(x).sum()) == 4 * 3 * (10 * 16 + 10 * 64)
    memopt.apply(model, [Checkpoint()])
    model(x).sum().backward()  # the first call watches for in-place changes
    assert saved_bytes(model, lambda m: m(x).sum()) == 4 * 3 * (10 * 16)


def test_each_block_runs_forward_twice_and_no_more():
    model, calls = Net(), []
    for block in model.blocks:
        block.a.register_forward_hook(lambda *_: calls.append(1))
    memopt.apply(model, [Checkpoint()])
    for _ in range(2):
        calls.clear()
        model(torch.randn(10, 16)).sum().backward()
        assert len(calls) == 6
    calls.clear()
    with torch.no_grad():
        model(torch.randn(10, 16))
    assert len(calls) == 3


EXPECTED_BLOCKS = {
    "hae_v2": (
        [f"input_blocks.{i}" for i in range(1, 4)]
        + [f"middle_block.{i}" for i in range(3)]
        + [f"output_blocks.{i}" for i in range(4)]
    ),
    "dit": [f"transformer_blocks.{i}" for i in range(3)],
    "gpt2": [f"transformer.h.{i}" for i in range(3)],
    "vit": [f"layers.{i}" for i in range(3)],
}


@pytest.mark.parametrize("name", EXPECTED_BLOCKS)
def test_blocks_found(name):
    assert find_blocks(ZOO[name].build()) == EXPECTED_BLOCKS[name]


def test_unet_levels_are_searched_not_taken_whole():
    found = find_blocks(ZOO["unet2d_condition"].build())
    assert "down_blocks.0" not in found
    assert "down_blocks.0.resnets.0" in found
    assert any(".transformer_blocks." in name for name in found)
    assert any(name.startswith("mid_block.") for name in found)
    assert not any(name.endswith((".to_out.0", ".ff.net.0")) for name in found)


@pytest.mark.parametrize("case", [c for c in ZOO.values() if c.blocks], ids=str)
def test_every_block_found_is_run_as_a_module(case):
    """A block that the model never calls would be wrapped in vain."""
    model = case.build()
    found = find_blocks(model)
    called = set()
    for name in found:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    run(model, case)
    assert set(found) - called <= ({"blocks.1"} if case.name == "data_dependent" else set())


@pytest.mark.parametrize("case", [c for c in ZOO.values() if c.blocks], ids=str)
def test_fewer_bytes_are_saved_on_every_model(case):
    model = case.build()
    if case.name.startswith("guided"):  # its own checkpoint function keeps tensors where no hook sees them
        pytest.skip("the plain model cannot be measured this way")

    def forward(model):
        args, kwargs = placed(case.inputs(), model)
        return loss_of(model(*args, **kwargs))

    plain = saved_bytes(model, forward)
    memopt.apply(model, [Checkpoint()])
    run(model, case)
    assert saved_bytes(model, forward) < plain


class Mutates(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x, sink=None):
        x.mul_(0.5)
        if sink is not None:
            sink.append(x.detach().clone())
        return self.a(x)


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x * 1)
    out.square().sum().backward()
    return [x.grad, *[p.grad.clone() for p in model.parameters()]]


def test_a_block_that_changes_its_input_is_exact_from_the_first_call_on():
    model, x = Net(Mutates(), Mutates()), torch.randn(4, 16)
    plain = gradients(model, x)
    memopt.apply(model, [Checkpoint()])
    for _ in range(3):
        assert all(map(torch.equal, plain, gradients(model, x)))


def test_backward_twice_through_a_block_that_changes_its_input():
    model, x = Net(Mutates()), torch.randn(4, 16)
    memopt.apply(model, [Checkpoint()])
    for _ in range(2):
        out = model(x * 1).square().sum()
        first = torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(out, list(model.parameters()))))


def test_lists_that_a_block_appends_to_are_the_callers_and_grow_once():
    class Collects(Net):
        def forward(self, x):
            self.seen = []
            for block in self.blocks:
                x = block(x, self.seen)
            return x

    model, x = Collects(Mutates(), Mutates()), torch.randn(4, 16)
    plain = gradients(model, x)
    memopt.apply(model, [Checkpoint()])
    for _ in range(2):
        assert all(map(torch.equal, plain, gradients(model, x)))
        assert len(model.seen) == 2


def test_an_input_changed_after_the_block_ran_is_an_error_not_a_wrong_gradient():
    class Later(Net):
        def forward(self, x):
            y = self.blocks[0](x)
            x.add_(1)
            return y

    model = Later(Block())
    memopt.apply(model, [Checkpoint()])
    for message in ("was changed in place after the block had run", "modified by an inplace operation"):
        with pytest.raises(RuntimeError, match=message):
            model(torch.randn(4, 16)).sum().backward()
        x = torch.randn(4, 16)
        with torch.no_grad():
            model.blocks[0](x)
        model.blocks[0](x).sum().backward()  # usable, and it has now learned


def test_an_input_that_shares_memory_with_another_is_refused():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x, y):
            x.mul_(2)
            return self.a(y)

    class Twice(Net):
        def forward(self, x):
            x = x * 1
            return self.blocks[0](x, x)

    model = Twice(Both())
    memopt.apply(model, [Checkpoint()])
    with pytest.raises(RuntimeError, match="changes an input in place that shares memory with another of its inputs"):
        model(torch.randn(4, 16))


class Drops(nn.Module):
    """Changes its input in train mode only; its keywords are names that a wrapper might use itself."""

    def __init__(self):
        super().__init__()
        self.d, self.a = nn.Dropout(0.5, inplace=True), nn.Linear(16, 16)

    def forward(self, x, inner=None, module=None):
        return self.a(self.d(x))


class Named(Net):
    def forward(self, x):
        return self.blocks[0](x * 1, inner=1, module=2)


def test_what_is_learned_holds_for_one_way_of_calling():
    model, x = Named(Drops()), torch.randn(4, 16)

    def grads():
        model.zero_grad()
        torch.manual_seed(2)
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = {mode: model.train(mode) and grads() for mode in (False, True)}
    memopt.apply(model, [Checkpoint()])
    for mode in (False, True, False, True):
        model.train(mode)
        assert all(map(torch.equal, plain[mode], grads()))


def test_the_mode_of_the_forward_holds_in_recomputation():
    model, x = Named(Drops()), torch.randn(4, 16)

    def grads():
        model.train().zero_grad()
        torch.manual_seed(2)
        loss = model(x).square().sum()
        model.eval()  # as a loop does that samples before it calls backward
        loss.backward()
        assert not any(m.training for m in model.modules())
        return [p.grad.clone() for p in model.parameters()]

    plain = grads()
    memopt.apply(model, [Checkpoint()])
    for _ in range(2):
        assert all(map(torch.equal, plain, grads()))


def test_functional_call():
    model, x = Net(), torch.randn(4, 16)
    other = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}

    def grads():
        out = torch.func.functional_call(model, other, (x,)).square().sum()
        return torch.autograd.grad(out, list(other.values()))

    plain = grads()
    memopt.apply(model, [Checkpoint()])
    for _ in range(2):
        assert all(map(torch.equal, plain, grads()))


def test_statistics_that_change_without_a_version():
    class Stats(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.register_buffer("mean", torch.zeros(16))
            self.register_buffer("var", torch.ones(16))

        def forward(self, x):
            return nn.functional.batch_norm(self.a(x), self.mean, self.var, training=True)

    def buffers(passes):
        torch.manual_seed(0)
        model = Net(Stats())
        memopt.apply(model, passes)
        for _ in range(2):
            model(torch.randn(4, 16)).square().sum().backward()
        return list(model.buffers())

    assert all(map(torch.equal, buffers([]), buffers([Checkpoint()])))


def test_double_backward():
    model, x = Net(), torch.randn(3, 16, requires_grad=True)

    def penalty():
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), list(model.parameters()), allow_unused=True)

    plain = penalty()
    memopt.apply(model, [Checkpoint()])
    for _ in range(2):
        for a, b in zip(plain, penalty(), strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_autocast_is_restored_in_recomputation():
    seen = []

    class Watches(Block):
        def forward(self, x):
            y = self.a(x)
            seen.append(y.dtype)
            return self.b(torch.tanh(y))

    model = Net(Watches())
    memopt.apply(model, [Checkpoint(), AMP()])
    for _ in range(2):
        model(torch.randn(3, 16)).sum().backward()
    assert seen == [torch.bfloat16] * 4


def test_gpt2_with_its_default_cache():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config).train()
    ids = torch.randint(50, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])

    def step():
        model.zero_grad()
        torch.manual_seed(1)
        out = model(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
        return [out.loss.detach(), *[p.grad.clone() for p in model.parameters()]], out.past_key_values

    plain, cache = step()
    assert cache.get_seq_length() == 9  # the default: the model fills a cache even in training
    memopt.apply(model, [Checkpoint()])
    for _ in range(2):
        found, cache = step()
        assert all(map(torch.equal, plain, found))
        assert cache.get_seq_length() == 9


def test_legacy_checkpointing_is_replaced_not_nested():
    calls = []
    original = guided.CheckpointFunction.apply
    model = guided.UNetModel(use_checkpoint=True, dropout=0.1)
    handle = memopt.apply(model, [Checkpoint()])
    assert "replaced the model's own checkpointing" in str(handle.report())
    assert not any(getattr(m, "use_checkpoint", False) for m in model.modules())
    guided.CheckpointFunction.apply = lambda *a: calls.append(1) or original(*a)
    try:
        x = torch.randn(2, 3, 8, 8)
        model(x, torch.tensor([1, 2]), y=torch.tensor([0, 1])).sum().backward()
        assert not calls
        handle.undo()
        assert any(getattr(m, "use_checkpoint", False) for m in model.modules())
        model(x, torch.tensor([1, 2]), y=torch.tensor([0, 1])).sum().backward()
        assert calls
    finally:
        del guided.CheckpointFunction.apply


def test_legacy_checkpointing_with_dropout_becomes_exact():
    """guided-diffusion's own function draws another dropout mask in its recomputation."""
    torch.manual_seed(0)
    reference = guided.UNetModel(use_checkpoint=False, dropout=0.5)
    legacy = guided.UNetModel(use_checkpoint=True, dropout=0.5)
    legacy.load_state_dict(reference.state_dict())
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])

    def grads(model):
        with torch.no_grad():
            for p in model.parameters():
                if not p.any():
                    p.normal_(std=0.05, generator=torch.Generator().manual_seed(p.numel()))
        model.zero_grad()
        torch.manual_seed(5)
        model(x, t, y=y).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    memopt.apply(reference, [Checkpoint()])  # replaces attention's own function as well
    true, wrong = grads(reference), grads(legacy)
    assert (true - wrong).norm() > 0.1 * true.norm()
    memopt.apply(legacy, [Checkpoint()])
    assert torch.equal(true, grads(legacy))


def test_hae_own_checkpointing_is_replaced():
    from examples.hae_v2.model import HAEUNetModelV2Conservative

    model = HAEUNetModelV2Conservative(16, 4, 32, 4, 1, (2,), channel_mult=(1, 2), num_classes=2, use_checkpoint=True)
    on = sum(getattr(m, "use_checkpoint", False) for m in model.modules())
    assert on > 5
    handle = memopt.apply(model, ["checkpoint"])
    assert f"{on} flags turned off, 0 forwards rewritten" in str(handle.report())
    handle.undo()
    assert sum(getattr(m, "use_checkpoint", False) for m in model.modules()) == on


def test_diffusers_own_checkpointing_is_replaced():
    model = ZOO["unet2d"].build()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    handle = memopt.apply(model, [Checkpoint()])
    assert not model.is_gradient_checkpointing
    handle.undo()
    assert model.is_gradient_checkpointing


def test_globs_take_the_outermost_matches():
    model = Net()
    handle = memopt.apply(model, [Checkpoint(blocks="blocks.*")])
    assert [c.path for c in handle.report().rows[0].claims] == ["blocks.0", "blocks.1", "blocks.2"]
    handle.undo()
    handle = memopt.apply(model, [Checkpoint(blocks="blocks.[02]")])
    assert [c.path for c in handle.report().rows[0].claims] == ["blocks.0", "blocks.2"]


def test_a_list_of_blocks_is_not_a_block():
    with pytest.raises(memopt.NothingToDo, match="modules whose name matches 'blocks'"):
        memopt.apply(Net(), [Checkpoint(blocks="blocks")])
    with pytest.raises(memopt.InputError, match="blocks must be 'auto', a glob or several, not"):
        Checkpoint(blocks=["blocks.0"])


def test_compiles_without_graph_breaks():
    model, x = Net(), torch.randn(5, 16)
    out = model(x)
    memopt.apply(model, [Checkpoint()])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(x)
    found.sum().backward()
    torch.testing.assert_close(out, found)
    assert all(p.grad is not None for p in model.parameters())


def test_exports():
    model, x = Net(), torch.randn(5, 16)
    memopt.apply(model, [Checkpoint()])
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x))
