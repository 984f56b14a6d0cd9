"""What a fake profile does with all that a copy of the model does not hold: closures, hooks, odd tensors, odd errors.

Each case that both kinds of step can run is held against the true step; nothing may change but the report.
"""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memopt
from memopt import InputError, MemoptError
from memopt.memory import fake

X = torch.randn(64, 32)


def mlp():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Tanh())


class State:
    """Values and gradients of tensors, which must be the same objects and values after a profile."""

    def __init__(self, *modules):
        self.tensors = [t for m in modules for t in itertools.chain(m.parameters(), m.buffers())]
        self.values = [t.detach().clone() for t in self.tensors]
        for tensor in self.tensors:
            tensor.grad = torch.full_like(tensor, 0.5) if tensor.requires_grad else None
        self.gradients = [t.grad for t in self.tensors]

    def check(self):
        assert all(type(t.detach()) is torch.Tensor for t in self.tensors)
        assert all(map(torch.equal, self.tensors, self.values))
        assert all(t.grad is g for t, g in zip(self.tensors, self.gradients, strict=True))
        assert all(torch.equal(g, torch.full_like(g, 0.5)) for g in self.gradients if g is not None)
        assert not any(t._backward_hooks or t._post_accumulate_grad_hooks for t in self.tensors)


def figures(report):
    return report.peak, report.kept, report.peak_by_category, report.start_by_category


def notes(report):
    """What a report says about copies, among its assumptions."""
    return [line for line in report.assumptions if "copy" in line]


def agree(model, inputs, *others, **how):
    """Profile a fake step and a true one, which count the same; the former leaves all as it is."""
    state = State(model, *others)
    report = memopt.profile(model, inputs, **how)
    state.check()
    for tensor in state.tensors:
        tensor.grad = None
    real = memopt.profile(model, inputs, real=True, **how)
    assert figures(report) == figures(real)
    return report


# --- what functions have closed over -------------------------------------------------------------------------------


@pytest.mark.parametrize("stepped", [False, True])
def test_a_loss_with_parameters_of_its_own(stepped):
    model, criterion = mlp(), nn.Linear(32, 1)
    parameters = [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.AdamW(parameters) if stepped else None
    report = agree(model, X, criterion, loss=lambda y: criterion(y).pow(2).mean(), optimizer=optimizer)
    assert notes(report) == []
    if stepped:
        states = sum(2 * p.nbytes + 4 for p in parameters)
        assert report.start_by_category["optimizer_states"] == states
    # Training goes on as if nothing had been.
    before = criterion.weight.detach().clone()
    optimizer = torch.optim.SGD(parameters, 0.1)
    optimizer.zero_grad()
    criterion(model(X)).pow(2).mean().backward()
    assert type(criterion.weight.grad) is torch.Tensor
    optimizer.step()
    assert not torch.equal(criterion.weight, before)


def test_a_loss_with_buffers_of_its_own():
    criterion = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    state, model = State(criterion), mlp()
    memopt.profile(model, X, loss=lambda y: criterion(y).pow(2).mean())
    state.check()
    assert criterion[1].num_batches_tracked == 0


def test_a_tensor_that_the_loss_writes_to():
    total, out, history = torch.ones(3), torch.zeros(32), torch.zeros(4, 32)

    def loss(y):
        total.add_(1)
        total[1:].mul_(2)
        total.data.zero_()
        torch.add(out, 1, out=out)
        history.mul_(0).add_(y[:4].detach())
        history.add_(y[:4]).detach_()
        last.add_(y.sum())
        return y.mean() + out.sum() + total.sum()

    last = torch.zeros(())
    agree(mlp(), X, loss=lambda y: y.mean() + total.sum())
    memopt.profile(mlp(), X, loss=loss)
    assert total.tolist() == [1, 1, 1]
    for tensor in (out, history, last):
        assert tensor.abs().sum() == 0
        assert tensor.grad_fn is None
        assert not tensor.requires_grad


def test_values_that_the_loss_reads():
    scale = torch.tensor(3.0)
    table = torch.arange(32.0)
    seen = []

    def loss(y):
        seen.append((scale.item(), table.numpy().sum()))
        return y.mean() * scale

    memopt.profile(mlp(), X, loss=loss)
    assert seen == [(3.0, 496.0)] * 2


def test_a_loss_that_fails_leaves_gradients_alone():
    criterion, model = nn.Linear(32, 1), mlp()
    state = State(model, criterion)

    def loss(y):
        made = criterion(y).mean()
        made.backward(retain_graph=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        memopt.profile(model, X, loss=loss)
    state.check()


def test_a_hook_that_calls_another_module():
    model, teacher = mlp(), nn.Linear(32, 32)
    model.register_forward_hook(lambda module, args, output: output + teacher(args[0]))
    assert notes(agree(model, X, teacher)) == []


def test_a_forward_replaced_on_the_instance():
    model = mlp()
    inner = model.forward
    model.forward = lambda x: inner(x) * 2
    (note,) = notes(agree(model, X, optimizer=torch.optim.AdamW(model.parameters())))
    assert "first aten.t:" in note or "first aten.addmm:" in note
    assert "passes do not act there" in note
    batchnorm = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
    old = batchnorm.forward
    batchnorm.forward = lambda x: old(x) * 2
    agree(batchnorm, X)
    assert batchnorm[1].num_batches_tracked == 0


def test_a_child_replaced_by_a_closure_over_its_sibling():
    model = mlp()
    first = model[0]
    model[1].forward = lambda x: F.relu(x) + first.weight.sum()
    assert len(notes(agree(model, X))) == 1


def test_a_loss_that_uses_the_model():
    model = mlp()
    state = State(model)
    report = memopt.profile(model, X, loss=lambda y: y.mean() + sum(p.pow(2).sum() for p in model.parameters()))
    state.check()
    assert "reach the model itself" in notes(report)[0]
    assert report.timeline.bytes["gradients"][-1] == sum(p.nbytes for p in model.parameters())


def test_a_model_on_fake_tensors_that_closes_over_itself():
    with fake.new_mode():
        model = mlp()
    inner = model.forward
    model.forward = lambda x: inner(x) * 2
    report = memopt.profile(model, X)
    assert all(p.grad is None for p in model.parameters())
    model = mlp()
    old = model.forward
    model.forward = lambda x: old(x) * 2
    assert figures(report) == figures(memopt.profile(model, X))


def test_what_no_twin_can_stand_for_is_refused():
    weight = torch.ones(32, requires_grad=True)
    computed = weight * 2
    with pytest.raises(MemoptError, match=r"aten\.mul.* was computed before.*closed over it.*real=True"):
        memopt.profile(mlp(), X, loss=lambda y: (y * computed).mean())
    assert weight.grad is None
    hooked = nn.Linear(32, 1)
    hooked.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(MemoptError, match="hooks on its gradient"):
        memopt.profile(mlp(), X, loss=lambda y: hooked(y).mean())
    away = nn.Linear(32, 1, device="meta")
    with pytest.raises(MemoptError, match="a tensor on meta that requires a gradient"):
        memopt.profile(mlp(), X, loss=lambda y: away(y).mean())


def test_hooks_on_parameters_are_told():
    model, seen = mlp(), []
    model[0].weight.register_hook(lambda g: seen.append(1))
    model[2].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    report = memopt.profile(model, X)
    assert (seen, report.device) == ([], "cpu")
    (note,) = notes(report)
    assert note.startswith("Hooks on 2 of the model's parameters")
    assert "real=True" in note
    assert note in " ".join(str(report).split())


# --- odd tensors -----------------------------------------------------------------------------------------------------


class Graph(nn.Module):
    def __init__(self, adjacency):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x):
        return torch.sparse.mm(self.adjacency, self.linear(x))


def test_sparse_tensors_keep_their_entries():
    adjacency = torch.eye(64).to_sparse()
    model = Graph(adjacency)
    report, real = memopt.profile(model, X), memopt.profile(model, X, real=True)
    assert figures(report) == figures(real)
    assert report.start_by_category["buffers"] == 64 * (2 * 8 + 4)
    linear = nn.Linear(32, 32)
    agree(linear, X, loss=lambda y: torch.sparse.mm(adjacency, y).mean())


def test_sparse_gradients_keep_their_entries():
    model = nn.Embedding(1000, 32, sparse=True)
    report = agree(model, torch.zeros(16, 4, dtype=torch.long), optimizer=torch.optim.SGD(model.parameters(), 0.1))
    assert report.peak_by_category["gradients"] == 64 * (8 + 32 * 4)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_other_sparse_layouts_are_refused():
    with pytest.raises(MemoptError, match=r"layout torch\.sparse_csr has no fake twin.*real=True"):
        memopt.profile(Graph(torch.eye(64).to_sparse_csr()), X)


class Scaled(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.weight.scale = {"of": [2.0, weight]}

    def forward(self, x):
        factor, weight = self.weight.scale["of"]
        assert weight is self.weight
        return x @ self.weight * factor


class OwnParameter(nn.Parameter):
    def __new__(cls, data, name):
        made = super().__new__(cls, data)
        made.name_of_it = name
        return made


class OwnTensor(torch.Tensor):
    pass


class Logged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda data: nn.Parameter(data), nn.Parameter),
        (lambda data: OwnParameter(data, "w"), OwnParameter),
        (lambda data: nn.Parameter(data.as_subclass(OwnTensor)), OwnTensor),
    ],
)
def test_attributes_and_classes_of_parameters(make, kind):
    class Checked(Scaled):
        def forward(self, x):
            assert isinstance(self.weight, kind)
            assert isinstance(self.weight, nn.Parameter)
            return super().forward(x)

    model = Checked(make(torch.randn(32, 32)))
    memopt.profile(model, X, optimizer=torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    assert type(model.weight.detach()) in (torch.Tensor, OwnTensor)
    report, real = memopt.profile(model, X), memopt.profile(model, X, real=True)
    assert (report.peak, report.kept) == (real.peak, real.kept)


def test_classes_with_operations_of_their_own_are_refused():
    model = Scaled(nn.Parameter(torch.randn(32, 32).as_subclass(Logged)))
    with pytest.raises(MemoptError, match=r"a Logged of layout torch\.strided has no fake twin.*real=True"):
        memopt.profile(model, X)


def test_parameters_without_a_shape_are_an_input_error():
    with pytest.raises(InputError, match=r"0\.weight of Sequential gets its shape when .*: call the model once"):
        memopt.profile(nn.Sequential(nn.LazyLinear(8)), X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"num_layers": 3}, {"num_layers": 2, "bidirectional": True, "batch_first": True}],
    ids=["plain", "bidirectional", "three layers", "all"],
)
def test_lstm_keeps_a_workspace(options, dtype):
    for steps, batch in ((1, 8), (3, 5), (80, 8)):
        shape = (batch, steps, 16) if options.get("batch_first") else (steps, batch, 16)
        agree(nn.LSTM(16, 32, **options).to(dtype), torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize(("steps", "batch", "hidden"), [(70, 33, 20), (9, 130, 48), (65, 3, 5), (130, 64, 7)])
def test_lstm_workspace_for_odd_numbers(steps, batch, hidden):
    model = nn.LSTM(16, hidden)
    agree(model, torch.randn(steps, batch, 16))
    memopt.profile(model, torch.randn(steps, batch, 16), train=False)


# --- odd optimizers --------------------------------------------------------------------------------------------------


class Halving(torch.optim.SGD):
    def __init__(self, parameters, lr):
        super().__init__(parameters, lr, momentum=0.9)
        self.factor = 0.5
        self.average = {"of": [torch.zeros(1000)]}
        self.own = next(iter(self.param_groups))["params"][0]

    def step(self, closure=None):
        assert self.own is self.param_groups[0]["params"][0]
        self.param_groups[0]["lr"] *= self.factor
        self.average["of"][0].add_(1)
        return super().step(closure)


def test_an_optimizer_with_attributes():
    model = mlp()
    optimizer = Halving(model.parameters(), 0.1)
    agree(model, X, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    memopt.profile(model, X, optimizer=optimizer)
    assert type(optimizer.average["of"][0]) is torch.Tensor


def test_an_optimizer_with_a_scheduler():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, 10)
    before = [dict(group) for group in optimizer.param_groups]
    agree(model, X, optimizer=optimizer)
    assert optimizer.param_groups == before
    assert not optimizer.state


def test_an_optimizer_that_steps_by_a_closure():
    model = mlp()
    with pytest.raises(InputError, match="a step of LBFGS calls a closure"):
        memopt.profile(model, X, optimizer=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam])
def test_capturable_optimizers_on_cuda(kind):
    model = mlp()
    count = len(list(model.parameters()))
    plain, capturable = (
        memopt.profile(model, X, device="cuda", optimizer=kind(model.parameters(), capturable=c)) for c in (False, True)
    )
    # The step counts are on the device.
    difference = capturable.start_by_category["optimizer_states"] - plain.start_by_category["optimizer_states"]
    assert difference == 512 * count


# --- errors ----------------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Calls a function in its forward."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(32, 32), function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y + torch.from_numpy(y.detach().numpy()),
        lambda y: torch.nested.nested_tensor([y.detach(), y.detach()[:3]], layout=torch.jagged).values() + y[0],
    ],
    ids=["numpy", "jagged"],
)
def test_what_only_fake_tensors_cannot_do(function):
    with pytest.raises(MemoptError, match=r"true tensors: real=True, or --real\.$"):
        memopt.profile(Calls(function), X)
    memopt.profile(Calls(function), X, real=True)


def test_failures_of_true_steps_do_not_advise_true_steps():
    with pytest.raises(InputError) as caught:
        memopt.profile(mlp(), torch.randn(3, 3), real=True)
    assert "real=True" not in str(caught.value)


@pytest.mark.parametrize("real", [False, True])
def test_torch_func_is_a_limit_of_the_profiler(real):
    model = Calls(lambda y: torch.func.grad(lambda z: z.pow(2).sum())(y))
    with pytest.raises(MemoptError, match=r"test_memory_fakes.py:\d+.*a limit of the profiler, not of the inputs") as e:
        memopt.profile(model, X, real=real)
    assert not isinstance(e.value, InputError)


@pytest.mark.parametrize("real", [False, True])
def test_a_loss_that_fails_is_not_the_models_failure(real):
    def loss(y):
        raise KeyError("label")

    with pytest.raises(InputError, match=r"^loss failed on the output of Sequential, 64x32 float32: KeyError: 'label'"):
        memopt.profile(mlp(), X, loss=loss, real=real)


def test_failures_after_forward_advise_true_steps():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no values")

    with pytest.raises(MemoptError, match=r"Calls failed in backward: ValueError: no values .*real=True"):
        memopt.profile(Calls(Failing.apply), X)
    with pytest.raises(ValueError, match=r"^no values$"):
        memopt.profile(Calls(Failing.apply), X, real=True)


def test_copies_of_plain_objects():
    model = mlp()
    twin = fake.copy_of({"a": [model, model]}, fake.new_mode(), model)
    assert twin["a"][0] is twin["a"][1]
    assert functools.reduce(lambda n, p: n + p.numel(), twin["a"][0].parameters(), 0) == sum(
        p.numel() for p in model.parameters()
    )


def test_positions_that_transformers_counts_itself_are_of_one_sequence():
    """Else attention gets a mask, and each layer a copy of it; positions that were given may be packed."""
    from transformers import GPT2Config, GPT2LMHeadModel, masking_utils

    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, loss_type="ForCausalLM",
    )  # fmt: skip
    model, before = GPT2LMHeadModel(config), masking_utils.find_packed_sequence_indices
    tokens = torch.randint(50, (2, 64))
    agree(model, {"input_ids": tokens, "labels": tokens})
    packed = torch.cat([torch.arange(40), torch.arange(24)]).expand(2, 64)
    agree(model, {"input_ids": tokens, "labels": tokens, "position_ids": packed})
    assert masking_utils.find_packed_sequence_indices is before
