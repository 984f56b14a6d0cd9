"""The census and the watch: planted leaks are named, clean training is left in peace."""

import functools
import gc
import json
import math
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from memopt.memory import leaks
from memopt.memory.leaks import NODES, SAVED, Kind, LeakWatch, Tally, census
from memopt.recipe import configure, load_recipe
from memopt.training import train
from tests.training_jobs import ROOT

MIB = 1 << 20


def go(out, **values):
    recipe = load_recipe(ROOT / "tests" / "recipes" / "leaking")
    train(recipe, configure(recipe, None, values), out=out)
    recipe.kept.clear()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def warnings_in(lines):
    return {line["step"]: line["warning"] for line in lines if "warning" in line}


@pytest.fixture
def every_check(monkeypatch):
    """A census at every logging step, whatever it costs here."""
    monkeypatch.setattr("memopt.training.LeakWatch", functools.partial(LeakWatch, share=math.inf))


@pytest.fixture(autouse=True)
def _no_garbage():
    gc.collect()


@pytest.fixture
def added():
    """What the census finds since the test began, by kind."""
    before = census()
    return lambda: census().since(before)


def test_ten_mib_per_step_are_reported_with_their_type(tmp_path, capsys):
    found = warnings_in(go(tmp_path / "run", leak="tensor"))
    step, text = next(iter(found.items()))
    assert step == 12  # the sixth look: growth at five checks in a row
    assert text.startswith("live tensor memory keeps growing: +10.0")
    assert "Growing: Tensor float32 [2560, 1024] on cpu (+10, 100.00 MiB)." in text
    assert f"warning: {text}" in capsys.readouterr().out


def test_a_leak_is_reported_again_when_it_has_doubled(tmp_path, every_check):
    assert list(warnings_in(go(tmp_path / "run", leak="tensor", steps=60))) == [12, 22, 42]


def test_a_kept_output_is_reported_as_held_by_its_graph(tmp_path):
    text = warnings_in(go(tmp_path / "run", leak="output"))[12]
    assert "Growing: saved for backward float32 [2048, 16]" in text
    assert "They are held by Tensor float32 [2048, 8] with the graph of AddmmBackward0 on cpu (+10)." in text
    assert "keep loss.item() or output.detach()" in text


def test_a_kept_loss_is_reported_though_backward_freed_what_it_saved(tmp_path):
    found = warnings_in(go(tmp_path / "run", leak="loss", steps=240, log_every=20))
    text = next(iter(found.values()))
    assert "Growing: autograd graph nodes (+" in text
    assert "held by Tensor float32 [] with the graph of MseLossBackward0" in text


def test_clean_steps_are_left_in_peace(tmp_path, every_check):
    lines = go(tmp_path / "run", steps=200, passes="checkpoint", microbatch=4)
    assert len(lines) == 200
    assert not warnings_in(lines)
    assert lines[-1].keys() == {
        *("step", "loss", "lr", "samples_per_second"),
        *("device_peak_bytes", "device_reserved_bytes", "process_bytes"),
    }


def test_a_cache_that_fills_up_and_stops_is_no_leak(tmp_path, every_check):
    assert not warnings_in(go(tmp_path / "run", leak="cache", log_every=3))


def watch_sizes(sizes, monkeypatch, watch=None, kind="Tensor"):
    """What a watch says of these live bytes after steps 10, 20, ..."""
    sizes = iter(sizes)
    now = Tally(0, 0)

    def fake():
        return leaks.Census({Kind(kind, "float32", (8,), "cpu"): now})

    monkeypatch.setattr(leaks, "census", fake)
    watch = watch or LeakWatch(share=math.inf)
    texts = []
    for i, size in enumerate(sizes, 1):
        now = Tally(i, size)
        texts.append(watch.check(10 * i))
    return [10 * i for i, text in enumerate(texts, 1) if text]


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        ([i * MIB for i in range(8)], [60]),
        ([i * MIB // 8 for i in range(20)], [90, 170]),  # slow: when it has come to 1 MiB, and to 2
        ([i * 1000 for i in range(2000)], []),  # tiny at every check
        ([64 * MIB - (64 * MIB >> i) for i in range(40)], []),  # slows down
        ([0, 100 * MIB, *([200 * MIB] * 40)], []),
        ([(i * 7919 % 101) * MIB for i in range(300)], []),  # batches of all sizes
        ([*([50 * MIB] * 20), *((50 + i) * MIB for i in range(8))], [260]),  # begins late
        ([i * MIB if i % 5 else 0 for i in range(100)], []),  # released in time
    ],
)
def test_what_counts_as_a_leak(sizes, steps, monkeypatch):
    assert watch_sizes(sizes, monkeypatch) == steps


def test_reference_cycles_are_no_leak():
    watch = LeakWatch(share=math.inf)
    gc.disable()
    try:
        for step in range(12):
            cycle = [torch.zeros(MIB)]
            cycle.append(cycle)
            assert watch.check(step) is None
    finally:
        gc.enable()


def test_nothing_is_said_while_garbage_cannot_be_collected(monkeypatch):
    """``gc.collect()`` returns at once when another thread is collecting; what grew may be garbage until it has run."""
    watch, kept = LeakWatch(share=math.inf), []
    with monkeypatch.context() as patch:
        patch.setattr(gc, "collect", lambda: 0)
        gc.disable()
        try:
            for step in range(12):
                kept.append(torch.zeros(MIB))
                assert watch.check(step) is None
        finally:
            gc.enable()
    kept.append(torch.zeros(MIB))
    assert "keeps growing: +4.00 MiB per step" in watch.check(12)


def test_leaks_of_varying_shapes_are_one_cause():
    watch, kept, said = LeakWatch(share=math.inf), [], []
    for step in range(20):
        kept.append(torch.zeros(MIB + step))
        said.append(watch.check(step))
    assert [step for step, text in enumerate(said) if text] == [5, 10]
    assert "Growing: Tensor float32 [1048581] and 4 other shapes on cpu (+5, 20.00 MiB)" in said[5]


def test_cost_is_limited(monkeypatch):
    seconds = [0.0]

    def slow():
        seconds[0] += 0.5
        return leaks.Census({})

    monkeypatch.setattr(leaks, "census", slow)
    watch = LeakWatch(share=0.01, free=3, clock=lambda: seconds[0])
    for step in range(10_000):
        seconds[0] += 1
        watch.check(step)
    assert 195 <= watch.taken <= 202
    assert watch.seconds <= 0.01 * seconds[0]


def test_views_of_one_storage_count_once(added):
    base = torch.zeros(1000, 10)
    views = [base[i] for i in range(10)] + [base.detach(), base.view(-1), nn.Parameter(base)]
    assert sum(change.bytes for change in added().values()) == 40_000
    del base
    assert sum(change.bytes for change in added().values()) == 40_000
    del views
    assert not added()


def test_it_keeps_nothing_alive():
    x = torch.zeros(1000, requires_grad=True)
    y = (x * 2).exp()
    seen = [weakref.ref(x), weakref.ref(y)]
    watch = LeakWatch(share=math.inf)
    kept = census()
    watch.check(1)
    gc.disable()  # and leaves no cycles
    try:
        del x, y
        assert [ref() for ref in seen] == [None] * 2
        assert kept.bytes
    finally:
        gc.enable()


def test_what_only_a_graph_holds_is_found(added):
    x = torch.zeros(1000, requires_grad=True)
    y = x.exp().exp().sin().sum()
    found = added()
    # exp saves its results, the first of which has no object in Python; sin saves the second
    assert found[Kind(SAVED, "float32", (1000,), "cpu")] == Tally(2, 8000)
    assert found[Kind("Tensor", "float32", (1000,), "cpu")] == Tally(1, 4000)
    assert found[Kind("Tensor", "float32", (), "cpu", "SumBackward0")].number == 1
    nodes = found[Kind(NODES)].number
    y.backward(retain_graph=True)
    assert added()[Kind(NODES)].number == nodes
    y.backward()
    assert Kind(SAVED, "float32", (1000,), "cpu") not in added()
    assert added()[Kind(NODES)].number == nodes


def test_custom_functions_and_lists_are_read(added):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.clone())
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.zeros(100, requires_grad=True)
    y = Twice.apply(x)
    z = x[torch.arange(7)]
    assert added()[Kind(SAVED, "float32", (100,), "cpu")].number == 1
    assert added()[Kind(SAVED, "int64", (7,), "cpu")].number == 1
    (y.sum() + z.sum()).backward()
    census()


def test_hooks_of_saved_tensors_are_not_called(added):
    def never(packed):
        raise AssertionError("unpacked")

    calls = []
    x = torch.zeros(500, requires_grad=True)
    y = checkpoint(lambda x: calls.append(1) or x.exp().sin(), x, use_reentrant=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: [t.half()], never):
        z = x.cos()
    found = added()
    assert calls == [1]
    assert found[Kind("Tensor", "float16", (500,), "cpu")].number == 1  # what was packed is Python's
    del y, z


def test_a_torch_that_does_not_tell_of_hooks_leaves_the_nodes():
    class Node:
        _raw_saved_self = object()

    assert leaks._saved(Node()) == []


def test_odd_objects_are_harmless(added):
    class Liar:
        @property
        def __class__(self):
            raise RuntimeError("asked")

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args, **kwargs):
            raise AssertionError("called")

    with FakeTensorMode():
        fake = torch.empty(10**6, device="cuda"), torch.zeros(5, requires_grad=True).exp()
    gone = weakref.proxy(torch.zeros(1))
    loud = torch.zeros(100).as_subclass(Loud)
    two = TwoTensor(torch.zeros(200), torch.zeros(200))
    sparse = torch.sparse_coo_tensor([[1, 2]], [1.0, 2.0], (30,), check_invariants=False)
    dense = torch.zeros(60).to_mkldnn() if torch.backends.mkldnn.is_available() else None
    others = [Liar(), gone, torch.empty(10**6, device="meta"), nn.LazyLinear(3), torch.zeros(0), fake]
    found = {kind: change for kind, change in added().items() if change.number > 0 and kind.type != NODES}
    assert found.pop(Kind("Loud", "float32", (100,), "cpu")) == Tally(1, 400)
    assert found.pop(Kind("Tensor", "float32", (200,), "cpu")) == Tally(2, 1600)
    assert found.pop(Kind("Tensor", "float32", (30,), "cpu")) == Tally(2, 24)  # indices and values
    if dense is not None:
        assert found.pop(Kind("Tensor", "float32", (60,), "cpu")) == Tally(1, 240)
    assert not found
    del others, loud, two, sparse
