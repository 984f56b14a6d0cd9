"""Parts of pipelines that are on the device only while they are used: the same bits, and exactly those bytes."""

import gc
import threading
import warnings

import pytest
import torch
from torch import nn

from memopt import AlreadyApplied, InputError, MemoptError
from memopt.memory.ledger import Ledger
from memopt.stage import stage

A, B, C = 4 * (10 * 20 + 20), 4 * (20 * 30 + 30), 4 * (30 * 40 + 40)  # bytes of the parts of a chain
X = {"a": torch.ones(1, 10), "b": torch.ones(1, 20), "c": torch.ones(1, 30)}


def chain():
    """Three parts that follow one another."""
    torch.manual_seed(0)
    return {"a": nn.Linear(10, 20), "b": nn.Linear(20, 30), "c": nn.Linear(30, 40)}


def trace_of(*roots):
    """All that undoing must bring back, and copies of the values."""
    modules = [m for root in roots for m in root.modules()]
    weights = [t for root in roots for t in (*root.parameters(), *root.buffers())]
    facts = [(type(m), list(vars(m))) for m in modules], [(id(t), t.stride(), str(t.device)) for t in weights]
    return facts, [t.detach().clone() for t in weights]


def assert_same_trace(found, expected):
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Resident:
    """Tells the bytes on the device, those of tensors that are to be ignored apart."""

    def __init__(self, ledger):
        self.ledger, self.ignored = ledger, []

    def ignore(self, *tensors):
        self.ignored += tensors

    def __call__(self):
        gc.collect()
        own = {id(record): record.bytes for tensor in self.ignored for record in self.ledger.see(tensor)}
        return self.ledger.total - sum(own.values())


@pytest.fixture
def resident():
    with Ledger() as ledger:
        count = Resident(ledger)
        count.ignore(*X.values())
        yield count


# --- what is where -----------------------------------------------------------------------------------------------


def test_only_the_part_that_was_used_last_is_on_the_device(resident):
    parts = chain()
    with stage(parts) as handle:
        assert resident() == 0
        for name, size in (("a", A), ("b", B), ("c", C), ("b", B)):
            parts[name](X[name])
            assert resident() == size
            assert (handle.report().resident, handle.report().resident_bytes) == ((name,), size)
        report = handle.report()
        assert report.bytes == {"a": A, "b": B, "c": C}
        assert report.loads == {"a": 1, "b": 2, "c": 1}
        assert (report.peak_bytes, report.moved_in, report.moved_out) == (C, A + 2 * B + C, 0)
        assert str(report).splitlines() == [
            "a: 880 B, loads: 1",
            "b: 2.46 KiB, loads: 2",
            "c: 4.84 KiB, loads: 1",
            "resident: b (2.46 KiB), at most 4.84 KiB; moved in: 10.62 KiB, out: 0 B",
        ]


def test_host_memory_holds_every_part_once():
    parts = chain()
    with Ledger() as ledger, stage(parts):
        for name in "abcab":
            parts[name](X[name])
        gc.collect()
        assert ledger.off_device == {"cpu": A + B + C}


@pytest.mark.parametrize("budget", [B + C, f"{B + C}B", float(A + B + C - 1)])
def test_the_least_recently_used_part_leaves_first(resident, budget):
    parts = chain()
    with stage(parts, budget=budget) as handle:
        seen = []
        for name in "abacbab":
            parts[name](X[name])
            seen.append(("".join(handle.report().resident), resident()))
        assert seen == [
            ("a", A),
            ("ab", A + B),
            ("ba", A + B),
            ("ac", A + C),
            ("cb", B + C),
            ("ba", A + B),
            ("ab", A + B),
        ]


def test_within_the_budget_all_stay(resident):
    parts = chain()
    with stage(parts, budget=A + B + C) as handle:
        for name in "abcabc":
            parts[name](X[name])
        assert resident() == A + B + C
        assert set(handle.report().loads.values()) == {1}


def test_use_holds_a_part(resident):
    parts = chain()
    with stage(parts) as handle:
        with handle.use("a") as part:
            parts["b"](X["b"])
            assert part is parts["a"]
            assert resident() == A + B
        parts["c"](X["c"])
        assert resident() == C
        with pytest.raises(InputError, match="there is no part 'd'; the parts are a, b, c"), handle.use("d"):
            pass
    with handle.use("a") as part:  # after the end, everything is
        assert part is parts["a"]
        assert handle.report().resident == ()


class Caller(nn.Module):
    """Calls another part in the middle of itself."""

    def __init__(self, other):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 10))
        self.other = [other]  # not a submodule

    def forward(self, x):
        return self.other[0](x @ self.weight.T) @ self.weight.new_ones(30, 1) + self.weight.sum()


def test_a_part_that_calls_another_stays(resident):
    parts = chain()
    caller = Caller(parts["b"])
    expected = caller(X["a"])
    seen = []
    with stage({"caller": caller, "b": parts["b"], "c": parts["c"]}, budget=C) as handle:
        hook = parts["b"].register_forward_hook(lambda *_: seen.append(handle.report().resident_bytes))
        parts["c"](X["c"])
        assert torch.equal(caller(X["a"]), expected)
        hook.remove()
        assert seen == [800 + B]
        assert handle.report().resident == ("b", "caller")


def test_shared_weights_count_once(resident):
    first, second = nn.Linear(10, 20), nn.Linear(20, 10)
    first.weight.data = second.weight.data.T  # two tensors of one storage
    shared = nn.Linear(10, 10)
    one, two = nn.Sequential(shared, first), nn.Sequential(second, shared)
    x, y = X["a"], X["b"]
    expected = one(x), two(y)
    resident.ignore(*expected)
    both, alone = 4 * (200 + 100 + 10), 4 * (200 + 100 + 10 + 10)
    with stage({"one": one, "two": two, "again": two}, budget=1320) as handle:
        assert torch.equal(one(x), expected[0])
        assert torch.equal(shared(x), nn.functional.linear(x, shared.weight, shared.bias))
        assert handle.report().bytes == {"one": both + 80, "two": alone, "again": alone}
    with stage({"one": one, "two": two}, budget="2KB") as handle:
        assert torch.equal(one(x), expected[0])
        assert torch.equal(two(y), expected[1])
        assert resident() == handle.report().resident_bytes == both + 80 + 40
        first.weight.fill_(2)
        assert (second.weight == 2).all()
        one(x), two(y)
    assert (second.weight == 2).all()
    first.weight.fill_(3)
    assert (second.weight == 3).all()


# --- the same bits -----------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """Weights that methods use without a call of a module: of the part's own, of a submodule's."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3))
        self.inner = nn.ModuleList([nn.Embedding(5, 3)])
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def look_up(self, i):
        self.steps += 1
        return self.table[i] + self.inner[0].weight[i]

    def replace(self):
        self.steps = self.steps + 100


def test_methods_that_read_weights_themselves_and_buffers_that_change(resident):
    book, parts = Codebook(), chain()
    expected = book.table[2] + book.inner[0].weight[2]
    resident.ignore(expected)
    with stage({**parts, "book": book}) as handle:
        for i in range(3):
            found = book.look_up(2)
            assert torch.equal(found, expected)
            del found
            assert resident() == 2 * 5 * 3 * 4 + 8
            parts["a"](X["a"])
            assert resident() == A
            assert handle.report().moved_out == 8 * (i + 1)  # the counter, and nothing else
        assert book.steps == 3
        book.replace()
        parts["a"](X["a"])
        assert book.look_up(2).shape == (3,)
        assert resident() == 128
    assert book.steps == 104
    assert book.steps.device.type == "cpu"


def test_written_weights_are_kept_wherever_they_were_written_to():
    parts = chain()
    optimizer = torch.optim.SGD(parts["a"].parameters(), lr=1.0)
    weight = parts["a"].weight
    expected = weight.clone() + 1
    with stage(parts) as handle:
        parts["a"](X["a"])
        weight.add_(1)  # on the device
        parts["b"](X["b"])
        assert torch.equal(weight, expected)
        assert handle.report().moved_out == 800
        parts["a"].load_state_dict({k: v + 1 for k, v in parts["a"].state_dict().items()})  # on the host
        parts["a"](X["a"])
        assert torch.equal(weight, expected + 1)
        parts["a"].to(torch.float64)
        assert parts["a"](X["a"].double()).dtype == torch.float64
        parts["b"](X["b"])
        assert parts["a"].weight is weight is optimizer.param_groups[0]["params"][0]
        parts["b"].weight = nn.Parameter(torch.zeros(30, 20))
        parts["c"](X["c"])
        assert torch.equal(parts["b"](X["b"])[0], parts["b"].bias)
    assert torch.equal(weight, (expected + 1).double())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_that_come_in_inference_mode_stay_ordinary_and_keep_their_layout(layout):
    conv, other, x = nn.Conv2d(3, 8, 3).to(memory_format=layout), nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8)
    expected, strides = conv(x), conv.weight.stride()
    with stage({"conv": conv, "other": other}):
        for _ in range(2):
            with torch.inference_mode():
                assert torch.equal(conv(x), expected)
                other(x)
        assert conv.weight.stride() == strides
    with torch.enable_grad():
        conv(x).sum().backward()
    assert conv.weight.grad is not None


# --- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_through_a_part_are_refused():
    parts, x = chain(), X["a"].clone()
    message = r"part 'a' of the stage was used with gradients \(in a Linear\).*torch.no_grad\(\).*block_swap"
    with stage(parts) as handle, torch.enable_grad():
        with pytest.raises(InputError, match=message):
            parts["a"](x)
        parts["a"].requires_grad_(False)
        with pytest.raises(InputError, match=message):
            parts["a"](x.requires_grad_())
        with pytest.raises(InputError, match=message):
            parts["a"].forward(x)
        frozen = parts["a"](x.detach())
        assert not frozen.requires_grad
        with torch.no_grad():
            parts["b"](X["b"])
        assert handle.report().resident == ("b",)
        head = nn.Linear(20, 1)  # training what follows a frozen part
        head(frozen).sum().backward()
        assert head.weight.grad is not None


# --- errors and interruptions ------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.linear, self.error = nn.Linear(10, 10), error

    def forward(self, x):
        if self.linear(x).isfinite().all() and self.error is not None:
            raise self.error
        return self.linear(x)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_an_interrupted_part_leaves_and_comes_as_any_other(resident, error):
    failing, parts = Failing(error), chain()
    expected = failing.linear(X["a"])
    resident.ignore(expected)
    with stage({**parts, "failing": failing}) as handle:
        with pytest.raises(type(error)):
            failing(X["a"])
        parts["a"](X["a"])
        assert (handle.report().resident, resident()) == (("a",), A)
        failing.error = None
        assert torch.equal(failing(X["a"]), expected)


@pytest.mark.parametrize("at", range(1, 11))
def test_an_interrupted_move_is_finished_by_the_next(resident, monkeypatch, at):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(10, 20, bias=False), nn.Linear(20, 10, bias=False)
            self.two.weight.data = self.one.weight.data.T

        def forward(self, x):
            return self.two(self.one(x))

    tied, parts = Tied(), {"a": chain()["a"]}
    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return storage_offset(*args)

    storage_offset = torch.Tensor.storage_offset  # asked for each tensor that moves, after those before it have moved
    before, expected = trace_of(tied, *parts.values()), tied(X["a"])
    resident.ignore(*before[1], expected)
    handle = None
    monkeypatch.setattr(torch.Tensor, "storage_offset", interrupted)
    try:
        handle = stage({"tied": tied, **parts})
        tied(X["a"])
        tied.one.weight.add_(0)
        parts["a"](X["a"])
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail("was not interrupted")
    monkeypatch.undo()
    if handle is not None:
        assert torch.equal(tied(X["a"]), expected)
        assert resident() == 800
        parts["a"](X["a"])
        assert resident() == A
        handle.undo()
    assert_same_trace(trace_of(tied, *parts.values()), before)
    tied.one.weight.fill_(5)
    assert (tied.two.weight == 5).all()


def test_no_memory_on_the_device(resident, monkeypatch):
    parts = chain()
    expected = parts["b"](X["b"])
    resident.ignore(expected)
    with stage(parts) as handle:
        parts["a"](X["a"])
        new_empty = torch.Tensor.new_empty

        def refuse(tensor, size, **how):
            if size == 2400:  # the weight of b
                raise torch.OutOfMemoryError("none left")
            return new_empty(tensor, size, **how)

        monkeypatch.setattr(torch.Tensor, "new_empty", refuse)
        with pytest.raises(torch.OutOfMemoryError):
            parts["b"](X["b"])
        monkeypatch.undo()
        assert handle.report().resident == ()
        assert torch.equal(parts["b"](X["b"]), expected)
        assert resident() == B


def test_threads():
    parts = chain()
    expected = {name: part(X[name]) for name, part in parts.items()}
    wrong = []

    def work(name):
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(parts[name](X[name]), expected[name]):
                    wrong.append(name)

    with stage(parts) as handle:
        threads = [threading.Thread(target=work, args=(name,)) for name in "abcabc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(handle.report().resident) >= 1
    assert not wrong


def test_bad_input_changes_nothing():
    parts = chain()
    linear, nested = parts["a"], nn.Sequential(parts["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of this function
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    meta, hooked = nn.Linear(2, 2, device="meta"), nn.Linear(2, 2)
    hooked._hf_hook = object()
    with torch.inference_mode():
        strange = nn.Linear(2, 2)
    before = trace_of(*parts.values(), nested, hooked)
    wrong = [
        ({}, {}, "stage needs at least one part; there is no module in this dict"),
        (3, {}, "stage needs a mapping of names to modules, or a pipeline with such components, not a int"),
        ({"a": linear, "b": 3}, {}, "part 'b' is a int, not a torch.nn.Module"),
        ({"a": linear, "b": nested}, {}, r"part 'b' contains part 'a' \(as 0\): leave one of them out"),
        ({"a": meta}, {}, "weight of part 'a', a Parameter on meta, cannot be moved as plain memory"),
        ({"a": strange}, {}, "weight of part 'a', a Parameter on cpu made in inference mode, cannot be moved"),
        ({"a": hooked}, {}, "part 'a' is moved by accelerate: remove its hooks first"),
        ({"a": scripted}, {}, "part 'a' is a scripted module"),
        (parts, {"device": "mars"}, "device 'mars': parts run on 'cpu' or a CUDA device"),
        (parts, {"device": "meta"}, "device 'meta': parts run on 'cpu' or a CUDA device"),
        (parts, {"device": "cuda:99"}, "device 'cuda:99': this machine has [0-9]+ CUDA devices"),
        (parts, {"budget": "8 parsecs"}, "budget is a number of bytes.*there is no unit 'parsecs'"),
        (parts, {"budget": C - 1}, f"part 'c' alone takes {C:,} bytes, more than the budget of {C - 1:,}"),
    ]
    for given, how, message in wrong:
        with pytest.raises(InputError, match=message):
            stage(given, **how)
    with stage(parts), pytest.raises(AlreadyApplied, match="part 'a' is staged already"):
        stage({"a": linear})
    assert_same_trace(trace_of(*parts.values(), nested, hooked), before)


def test_undo_is_refused_while_a_part_is_in_use_and_twice_is_once():
    parts = chain()
    before = trace_of(*parts.values())
    handle = stage(parts)
    with handle.use("b"), pytest.raises(MemoptError, match="cannot undo the stage while its part 'b' is in use"):
        handle.undo()
    parts["a"](X["a"])
    handle.undo()
    parts["a"].weight.add_(1)
    handle.undo()
    before[1][0].add_(1)
    assert_same_trace(trace_of(*parts.values()), before)


def test_nothing_grows():
    parts = chain()
    handle = stage(parts, budget=B + C)
    optimizer = torch.optim.SGD(parts["a"].parameters(), lr=0.1)

    def use(times):
        for _ in range(times):
            for name in "abcb":
                parts[name](X[name])
            parts["a"].weight.grad = torch.ones(20, 10)
            optimizer.step()
            parts["b"].bias = nn.Parameter(torch.zeros(30))
        gc.collect()
        count = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return count, handle._pool.pinned_bytes, handle._pool.spare_bytes, len(handle._homes)

    first = use(3)
    assert use(30) == first
    for _ in range(3):
        handle.undo()
        handle = stage(parts, budget=B + C)
        assert use(3) == first
