"""A profile of true steps leaves everything as it was, whatever tensors, optimizers and failures there are."""

import collections
import copy
import mmap
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import memopt
from memopt.errors import InputError
from memopt.memory import restore
from memopt.memory.restore import restored


def state_of(value):
    """Identities and bits of all tensors and containers in a value: equal if and only if nothing changed."""
    if isinstance(value, TwoTensor):
        return id(value), state_of(value.a), state_of(value.b), state_of(value.grad)
    if isinstance(value, torch.Tensor):
        about = (id(value), type(value), value.dtype, value.requires_grad, value.is_leaf)
        grad = state_of(value.grad) if value.is_leaf else None
        if value.layout is torch.sparse_coo:
            return about, grad, value._indices().tolist(), value._values().tolist()
        if value.is_nested:
            return about, grad, [part.tolist() for part in value.unbind()]
        storage = value.untyped_storage()
        scale = value.q_scale() if value.is_quantized else 1
        place = (storage._cdata, value.storage_offset(), value.shape, value.stride())
        return about, grad, place, scale, bytes(storage.tolist())
    if isinstance(value, nn.Module):
        kinds = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        plain = {k: (id(v), state_of(v)) for k, v in vars(value).items() if k not in kinds}
        return id(value), [(id(getattr(value, kind)), state_of(getattr(value, kind))) for kind in kinds], plain
    if isinstance(value, torch.optim.Optimizer):
        return [state_of(part) for part in (value.state, value.param_groups)], vars(value).keys()
    if isinstance(value, dict):
        return id(value), [(k if isinstance(k, str) else id(k), state_of(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, collections.deque)):
        return id(value), [state_of(v) for v in value]
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    return repr(value)


def check(model, inputs=None, *others, optimizer=None, error=None, **arguments):
    """Profile two true steps and compare everything before and after."""
    inputs = torch.randn(8, 4) if inputs is None else inputs
    watched = (model, inputs, optimizer, *others)
    before = state_of(watched), torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())
    if error is None:
        assert memopt.profile(model, inputs, optimizer=optimizer, real=True, **arguments).real
    else:
        with pytest.raises(error):
            memopt.profile(model, inputs, optimizer=optimizer, real=True, **arguments)
    after = state_of(watched), torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())
    assert before == after


def trained(model, inputs=None, make=torch.optim.AdamW):
    """An optimizer with states, and a model with gradients."""
    optimizer = make(model.parameters(), lr=0.1)
    inputs = torch.randn(8, 4) if inputs is None else inputs
    for _ in range(2):
        model(inputs).mean().backward()
        optimizer.step()
    return optimizer


class With(nn.Module):
    """A linear layer with further state, and a forward that does something with it."""

    def __init__(self, also=lambda self, x: x, **buffers):
        super().__init__()
        self.linear, self.also, self.calls = nn.Linear(4, 4), also, 0
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        self.calls += 1
        y = self.linear(x)
        with torch.no_grad():
            self.also(self, x)
        return y


def base(tensor):
    """The storage of a tensor as one tensor, through which expanded ones can be changed."""
    return torch.empty(0).set_(tensor.untyped_storage())


FLAT = torch.arange(12.0)
CHANGES = {
    "expanded": (lambda: {"b": torch.ones(1).expand(64)}, lambda m, x: base(m.b).add_(1)),
    "untouched expanded": (lambda: {"b": torch.ones(1).expand(64)}, lambda m, x: None),
    "overlapping": (lambda: {"b": torch.arange(9.0).unfold(0, 3, 1)}, lambda m, x: base(m.b).mul_(2)),
    "aliased": (lambda: (lambda t: {"b": t[2:], "c": t[:5]})(FLAT.clone()), lambda m, x: (m.b.add_(1), m.c.add_(1))),
    "nan": (lambda: {"b": torch.tensor([float("nan"), -0.0])}, lambda m, x: m.b.fill_(1)),
    "emptied": (lambda: {"b": FLAT.clone()}, lambda m, x: m.b.untyped_storage().resize_(0)),
    "filled": (
        lambda: (lambda t: (t.untyped_storage().resize_(0), {"b": t})[1])(FLAT.clone()),
        lambda m, x: (m.b.untyped_storage().resize_(48), m.b.fill_(3)),
    ),
    "resized": (lambda: {"b": FLAT.clone()}, lambda m, x: m.b.resize_(100).fill_(1)),
    "transposed": (lambda: {"b": FLAT.reshape(3, 4).clone()}, lambda m, x: m.b.t_()),
    "swapped data": (lambda: {}, lambda m, x: setattr(m.linear.weight, "data", torch.zeros(4, 4))),
    "cast": (lambda: {"b": FLAT.clone()}, lambda m, x: setattr(m.b, "data", m.b.double())),
    "frozen": (lambda: {}, lambda m, x: m.linear.bias.requires_grad_(False)),
    "in place with gradient": (lambda: {"b": torch.zeros(4)}, lambda m, x: join(m.b, m.linear.bias)),
    "sparse": (lambda: {"b": torch.eye(4).to_sparse()}, lambda m, x: m.b.mul_(2)),
    "sparse, other places": (
        lambda: {"b": torch.eye(4).to_sparse()},
        lambda m, x: m.b.add_(torch.ones(4, 4).to_sparse()),
    ),
    "quantized": (
        lambda: {"b": torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.quint8)},
        lambda m, x: m.b.copy_(torch.quantize_per_tensor(torch.ones(4), 0.25, 1, torch.quint8)),
    ),
    "nested": (lambda: {"b": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, lambda m, x: m.b.mul_(2)),
    "wrapper": (
        lambda: {"b": TwoTensor(torch.ones(1).expand(3), torch.zeros(1).expand(3))},
        lambda m, x: (base(m.b.a).add_(1), base(m.b.b).add_(2)),
    ),
    "wrapper, replaced inside": (
        lambda: {"b": TwoTensor(torch.ones(3), torch.zeros(3))},
        lambda m, x: (m.b.a.add_(1), setattr(m.b, "a", torch.zeros(3))),
    ),
    "added": (lambda: {}, lambda m, x: add(m)),
    "replaced": (
        lambda: {"b": torch.zeros(3), "c": torch.zeros(2)},
        lambda m, x: (m.b.add_(1), setattr(m, "b", m.b + 1), setattr(m, "linear", copy.deepcopy(m.linear))),
    ),
    "deleted": (
        lambda: {"b": torch.zeros(3), "c": torch.zeros(2)},
        lambda m, x: (m._buffers.pop("b", None), m._buffers.setdefault("d", torch.ones(1))),
    ),
    "none": (lambda: {"b": None}, lambda m, x: setattr(m, "b", torch.ones(2))),
    "modes": (lambda: {}, lambda m, x: m.linear.eval()),
    "random": (lambda: {}, lambda m, x: (torch.randn(2), random.random(), np.random.random())),
}


def join(buffer, weight):
    with torch.enable_grad():
        buffer.copy_(weight)


def add(module):
    if not hasattr(module, "cache"):
        module.register_buffer("cache", torch.ones(3))
        module.register_buffer("scratch", torch.ones(3), persistent=False)
        module.register_parameter("scale", nn.Parameter(torch.ones(3)))
        module.add_module("lazy", nn.Linear(2, 2))
        module.built = True
    assert module.built


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*quantize", "ignore:.*TypedStorage")
@pytest.mark.parametrize("failing", [None, ZeroDivisionError, KeyboardInterrupt], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_the_step_changes_is_put_back(change, failing):
    buffers, also = CHANGES[change]
    model = With(**buffers())
    optimizer = trained(model)
    model.also = also
    model.own = nn.ParameterList([torch.ones(2)])

    def loss(y):
        if failing is not None and model.calls == 4:  # in the second step: two were taken above
            raise failing
        return y.square().mean()

    # What forward or loss raise is explained, but for interruptions.
    check(model, optimizer=optimizer, loss=loss, error=InputError if failing is ZeroDivisionError else failing)


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_interrupted_anywhere(where, error):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise error

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            if where == "optimizer":
                raise error

    def also(model, x):
        if where == "forward":
            raise error

    model = nn.Sequential(With(), nn.BatchNorm1d(4), nn.Dropout(0.5))
    optimizer = Optimizer(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 4)).mean().backward()
    torch.optim.SGD.step(optimizer)
    model[0].also = also
    loss = (lambda y: Failing.apply(y).mean()) if where == "backward" else None
    expected = InputError if where == "forward" and error is MemoryError else error
    check(model, optimizer=optimizer, loss=loss, error=expected)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda: torch.randn(1, 4).expand(8, 4),
        lambda: torch.randn(8, 4, requires_grad=True),
        lambda: torch.arange(11.0).as_strided((8, 4), (1, 1)),
    ],
)
def test_inputs_of_all_kinds(inputs):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = trained(model)
    check(model, inputs(), optimizer=optimizer)
    check(model, inputs(), optimizer=optimizer, train=False)


def test_inference_tensors():
    with torch.inference_mode():
        inputs = torch.randn(8, 4)
    check(With(lambda model, x: base(x).add_(1)), inputs, train=False)


def test_inputs_changed_in_place():
    def also(model, x):
        base(x).add_(1)

    check(With(also), torch.randn(1, 4).expand(8, 4))


def test_inputs_in_read_only_memory(tmp_path):
    path = tmp_path / "inputs"
    path.write_bytes(np.ones((8, 4), dtype=np.float32).tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it is read-only
            inputs = torch.frombuffer(memory, dtype=torch.float32).reshape(8, 4)
        check(nn.Linear(4, 4), inputs)
        del inputs


def test_one_failing_restoration_keeps_no_other_from_its_work(monkeypatch):
    model = With(b=torch.zeros(3), c=torch.zeros(3), d=torch.zeros(3))
    optimizer = trained(model)
    generator = model.generator = torch.Generator()
    failing, write = [model.c.untyped_storage()._cdata, model.linear.bias.untyped_storage()._cdata], restore._write

    def broken(storage, value):
        if storage._cdata in failing:
            raise OSError(failing.index(storage._cdata))
        write(storage, value)

    def also(model, x):
        for buffer in list(model.buffers()):
            buffer.add_(1)
        model.register_buffer("more", torch.rand(2) + torch.rand(2, generator=generator))

    def loss(y):
        if model.calls == 4:
            raise KeyboardInterrupt
        return y.mean()

    model.also = also
    monkeypatch.setattr(restore, "_write", broken)
    others = (model.linear.weight, model.b, model.d, optimizer, generator)
    before = state_of(others), torch.get_rng_state().tolist(), list(model._buffers)
    bias = model.linear.bias.detach().clone()
    with pytest.raises(OSError, match="0") as raised:  # the first that is put back
        memopt.profile(model, torch.randn(8, 4, generator=torch.Generator()), optimizer=optimizer, loss=loss, real=True)
    assert isinstance(raised.value.__context__, KeyboardInterrupt)
    assert (model.c.tolist(), torch.equal(bias, model.linear.bias)) == ([2, 2, 2], False)
    with torch.no_grad():
        model.linear.bias.copy_(bias)  # which the optimizer's groups show
    assert (state_of(others), torch.get_rng_state().tolist(), list(model._buffers)) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(nn.Linear(4, 4)),
        lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))),
        lambda: torch.jit.trace(nn.Linear(4, 4), torch.randn(8, 4)),
    ],
)
def test_scripted_modules_are_refused_before_the_first_step(make):
    model = make()
    optimizer = trained(model)
    before = [state_of(p) for p in model.parameters()], state_of(optimizer)
    with pytest.raises(InputError, match=r"is scripted; profile it before torch\.jit\.script"):
        memopt.profile(model, torch.randn(8, 4), optimizer=optimizer, real=True)
    assert ([state_of(p) for p in model.parameters()], state_of(optimizer)) == before


def test_lazy_modules_are_refused():
    with pytest.raises(InputError, match=r"^0, a LazyLinear, is not initialized; call the model once"):
        memopt.profile(nn.Sequential(nn.LazyLinear(4)), torch.randn(8, 4), real=True)


def test_parameters_outside_of_the_model():
    model, criterion = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=0.1)
    criterion(model(torch.randn(8, 4))).mean().backward()
    loss = lambda y: criterion(y).mean()  # noqa: E731
    check(model, None, criterion, optimizer=optimizer, loss=loss)  # before the first step there are no states
    optimizer.step()
    check(model, None, criterion, optimizer=optimizer, loss=loss)


class History(torch.optim.Optimizer):
    """Has states of all kinds."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": torch.tensor(lr), "betas": [0.5, 0.9]})
        self.table, self.count, self.note = torch.zeros(3), 0, "new"

    @torch.no_grad()
    def step(self, closure=None):
        self.table.add_(1)
        self.count, self.note = self.count + 1, "used"
        for group in self.param_groups:
            group["lr"].mul_(0.5)
            group["betas"][0] *= 0.5
            group["steps"] = group.get("steps", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(h=[torch.zeros_like(p)], d={"a": torch.zeros_like(p)}, l=[], last=None)
                    state.update(q=collections.deque(maxlen=3), t=(torch.zeros(1), [0]), r={1, 2})
                state["h"][0].add_(p.grad)
                state["h"].append(torch.ones(2))
                state["d"]["a"].add_(1)
                state["d"]["b"] = state["d"].get("b", 0) + 1
                state["l"].append(len(state["l"]))
                state["q"].append(torch.ones(2))
                state["q"][0].add_(1)
                state["t"][0].add_(1)
                state["t"][1][0] += 1
                state["r"].add(len(state["l"]))
                state["last"] = p.grad
                p.add_(p.grad, alpha=-0.1)


@pytest.mark.parametrize("steps", [0, 2])
def test_nested_states_of_an_optimizer(steps):
    model = nn.Linear(4, 4)
    optimizer = trained(model, make=History) if steps else History(model.parameters(), 0.1)
    about = (optimizer.count, optimizer.note)
    check(model, None, optimizer.table, optimizer=optimizer)
    assert (optimizer.count, optimizer.note) == about


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RAdam])
def test_training_goes_on_as_without_a_profile(make):
    def train(profiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
        optimizer = make(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        losses = []
        for step in range(6):
            if profiled and step in (0, 1, 4):
                memopt.profile(model, torch.ones(8, 4), optimizer=optimizer, real=True)
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.item())
        return losses

    assert train(True) == train(False)


def test_optimizers_in_backward_put_the_parameters_back_but_leave_states():
    model = nn.Linear(4, 4)
    optimizers = {p: torch.optim.AdamW([p], lr=0.1) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    before = [p.detach().clone() for p in model.parameters()]
    memopt.profile(model, torch.randn(8, 4), real=True)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(len(o.state) == 1 for o in optimizers.values())  # documented


def test_extra_modules():
    model, average = nn.Linear(4, 4), nn.Linear(4, 4)
    before = state_of(modules := [model, average])
    with restored(model, None, (average,), ()):
        average.weight.data.zero_()
        average.register_buffer("more", torch.ones(3))
    assert state_of(modules) == before
