"""What an ablation measures: every figure against a model whose answer is known."""

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import memopt
from memopt import Claim, MemoptError, Pass
from memopt.ablation import (
    Ablation,
    Row,
    _compare,
    _Result,
    ablate,
    applicable,
    go_together,
    provenance,
    rows_together,
    single_rows,
)
from memopt.ablation_table import _number, markdown
from memopt.estimate import profile_recipe, recipe_work
from memopt.memory.profiler import Work
from memopt.passes import AMP, Checkpoint, OffloadActivations, Optimizer8bit, SetToNone
from memopt.plots import pareto
from memopt.recipe import configure, load_recipe
from tests.nets import Net
from tests.training_jobs import TINY
from tests.zoo import differences, fingerprint


class Unregistered(Pass):
    """A pass for one test: not registered, because its name is set later."""

    stage = "wrap"
    exact = True

    def __str__(self):
        return type(self).__name__.lower()

    def plan(self, model, context):
        return [Claim("", "forward")]


Unregistered.name = "unregistered"


@dataclass(frozen=True, kw_only=True)
class Doubles(Unregistered):
    """Gradients of one parameter come out twice as large."""

    factor: float = 2.0

    def apply(self, claims, edit):
        edit.note("gradients grow")
        edit.hook(edit.model.blocks[0].up.weight.register_hook, lambda gradient: self.factor * gradient)


@dataclass(frozen=True, kw_only=True)
class Loses(Unregistered):
    """One parameter gets no gradient."""

    def apply(self, claims, edit):
        weight = edit.model.blocks[0].up.weight
        edit.wrap(
            edit.model.blocks[0].up, "forward", lambda m, inner, x: nn.functional.linear(x, weight.detach(), m.bias)
        )


@dataclass(frozen=True, kw_only=True)
class Idles(Unregistered):
    """The optimizer does nothing."""

    def apply(self, claims, edit):
        edit.wrap(edit.optimizers[0], "step", lambda optimizer, inner, *args, **kwargs: None)


@dataclass(frozen=True, kw_only=True)
class Forgets(Unregistered):
    """The optimizer does not keep its average of gradients."""

    def apply(self, claims, edit):
        def step(optimizer, inner, *args, **kwargs):
            inner(*args, **kwargs)
            for state in optimizer.state.values():
                state["exp_avg"].zero_()

        edit.wrap(edit.optimizers[0], "step", step)


@dataclass(frozen=True, kw_only=True)
class Fails(Unregistered):
    """Forward fails."""

    def apply(self, claims, edit):
        def forward(model, inner, *args, **kwargs):
            raise ValueError("no room\nmore of it")

        edit.wrap(edit.model, "forward", forward)


@dataclass(frozen=True, kw_only=True)
class Takes(Unregistered):
    """Gradients are gone after backward."""

    def apply(self, claims, edit):
        def drop(parameter):
            parameter.grad = None

        for parameter in edit.model.parameters():
            edit.hook(parameter.register_post_accumulate_grad_hook, drop)


def loss(model, sample):
    return model(sample).square().mean()


@pytest.fixture
def work():
    model = Net()
    nn.init.zeros_(model.blocks[1].down.weight)
    return Work(model, torch.randn(4, 12, 16), loss, torch.optim.AdamW(model.parameters(), lr=1e-3))


def profiling(work, train=True):
    def profile(passes):
        how = {"loss": lambda y: y.square().mean(), "optimizer": work.optimizer, "device": "cuda", "train": train}
        return memopt.profile(work.model, work.batch, passes=passes, **how)

    return profile


def measured(work, *passes, **how):
    how = {"train": True, "repeats": 0, **how}
    rows = ablate(list(passes), lambda chosen: go_together(work, chosen), profiling(work, how["train"]), work, **how)
    return Ablation(tuple(rows), provenance(), {})


def by_name(found):
    return {row.name: row for row in found.rows}


# --- rows ------------------------------------------------------------------------------------------------------------


def names(passes, refuse=()):
    def fits(chosen):
        return not any(set(pair) <= {str(p) for p in chosen} for pair in refuse)

    ones = single_rows(passes, train=True)
    for row in ones[1:]:
        row.problem = "" if fits(row.passes) else "refused"
    return [row.name for row in (*ones, *rows_together(ones[1:], fits))]


def test_rows_are_none_each_all_but_each_and_all():
    a, b, c = Checkpoint(), SetToNone(), AMP(dtype="fp16")
    amp = "amp(dtype='fp16')"
    assert names([a, b, c]) == [
        *("none", "checkpoint", "set_to_none", amp),
        *("all but checkpoint", "all but set_to_none", f"all but {amp}", "all"),
    ]
    assert names([a, b]) == ["none", "checkpoint", "set_to_none", "all"]  # all but one of two is the other
    assert names([a]) == ["none", "checkpoint"]


def test_a_pass_that_is_refused_beside_others_has_a_row_of_its_own():
    a, b, c = Checkpoint(), OffloadActivations(), SetToNone()
    pair = ("checkpoint()", "offload_activations()")
    alone = ["none", "checkpoint", "offload_activations", "set_to_none"]
    assert names([a, b, c], [pair]) == [*alone, "all", "all + offload_activations"]
    assert names([a, b], [pair]) == [*alone[:3], "checkpoint + offload_activations"]
    # What fits nowhere does not keep the others out, and needs no second row to say so.
    assert names([a, b, c], [("checkpoint()",)]) == [*alone, "all"]


def test_the_exact_passes_that_find_something_are_the_default(work):
    found, others = applicable(work, train=True)
    chosen = {p.name for p in found}
    assert {"checkpoint", "offload_activations", "set_to_none", "cache_cleanup"} <= chosen
    assert others["amp"] == "not exact; name it to have it"
    assert others["grad_accumulation"] == "another batch in each forward; name it to have it"
    assert others["outer_product"].startswith("finds nothing to do; it needs a product of each row")
    work.optimizer = None
    found, others = applicable(work, train=True)
    assert "set_to_none" not in {p.name for p in found}
    found, others = applicable(work, train=False)
    assert others["checkpoint"] == "for train only"


# --- errors ----------------------------------------------------------------------------------------------------------


def test_exact_passes_are_bitwise_and_others_are_not(work):
    found = measured(work, Checkpoint(), AMP())
    rows = by_name(found)
    for name in ("none", "checkpoint"):
        assert (rows[name].loss_error, rows[name].gradient_error, rows[name].bitwise) == (0, 0, True)
    for name in ("amp", "all"):
        assert not rows[name].bitwise
        assert 1e-6 < rows[name].loss_error < 0.05
        assert 1e-4 < rows[name].gradient_error < 0.2
        assert rows[name].exactness == "not exact"
    assert not any(map(found.breaks, found.rows))


def test_wrong_gradients_are_seen(work):
    found = measured(work, Doubles(), Loses(), Idles())
    rows = by_name(found)
    assert not rows["doubles"].bitwise
    assert rows["doubles"].gradient_error > 0.01
    assert rows["loses"].gradient_error == math.inf
    # The optimizer shows in the second step.
    assert 0 < rows["idles"].gradient_error < math.inf
    assert rows["idles"].loss_error > 0
    assert [found.breaks(row) for row in found.rows[:4]] == [False, True, True, True]


def test_what_becomes_of_an_optimizers_states_is_seen():
    """States of the first step show in the weights of the second, and these in the third."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
    work = Work(model, torch.randn(4, 64), loss, torch.optim.AdamW(model.parameters()))
    found = measured(work, Forgets())
    assert found.rows[1].gradient_error > 1e-3
    assert [found.breaks(row) for row in found.rows] == [False, True]
    pytest.importorskip("bitsandbytes")
    assert [row.bitwise for row in measured(work, Optimizer8bit()).rows] == [True, False]


def test_an_exact_pass_must_be_bitwise(work):
    found = measured(work, Doubles(factor=1 + 1e-6), SetToNone())
    row = found.rows[1]
    assert 0 < row.gradient_error < 1e-4
    assert [found.breaks(row) for row in found.rows] == [False, True, False, True]
    row.passes = (memopt.passes.OuterProduct(),)
    assert row.exactness == "exact to rounding"
    assert not found.breaks(row)
    text = markdown(found)
    assert "Not as exact as promised: all." in text


@pytest.mark.parametrize(("size", "told"), [(0.1, "errors say nothing"), (1e-6, "errors as small as those of the row")])
def test_a_model_that_varies_by_itself_accuses_no_pass(work, size, told):
    calls = itertools.count()
    work.forward = lambda model, sample: loss(model, sample) * (1 + size * next(calls))
    found = measured(work, SetToNone())
    assert not found.rows[0].bitwise
    assert not found.rows[1].bitwise
    assert not any(map(found.breaks, found.rows))
    assert told in markdown(found)
    if size < 1e-3:  # large errors still do
        assert found.breaks(measured(work, Doubles()).rows[1])


def test_passes_that_break_promises_are_shown_with_what_they_say(work):
    text = markdown(measured(work, Doubles(), SetToNone()))
    assert "Not as exact as promised: doubles, all.\n\ndoubles: gradients grow.\n" in text


def test_a_layer_of_zeros_hides_no_error(work):
    """A layer has no gradient while the one that reads it is zero."""
    nn.init.zeros_(work.model.blocks[0].down.weight)
    work.optimizer = torch.optim.SGD(work.model.parameters(), lr=0.0)
    work.forward(work.model, work.batch).backward()
    assert not work.model.blocks[0].up.weight.grad.any()
    assert by_name(measured(work, Doubles()))["doubles"].gradient_error > 0


def test_gradients_of_fp16_are_compared_without_their_scale(work):
    row = by_name(measured(work, AMP(dtype="fp16")))["amp(dtype='fp16')"]
    assert 0 < row.gradient_error < 0.02
    assert row.loss_error < 0.01


def test_gradients_that_overflow_are_told(work):
    work.forward = lambda model, sample: 1e6 * loss(model, sample)
    found = measured(work, AMP(dtype="fp16"))
    assert not math.isfinite(found.rows[1].gradient_error)
    assert "and the scaler skipped 3 of 3 checked steps." in markdown(found)


def test_frozen_parameters_stay_and_sparse_gradients_are_compared():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4, sparse=True)
            self.counts = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
            self.mask = nn.Parameter(torch.zeros(3), requires_grad=False)

        def forward(self, numbers):
            return self.embed(numbers)

    model = Sparse()
    work = Work(model, torch.tensor([1, 1, 2]), loss, torch.optim.SGD(model.parameters(), lr=0.1))
    rows = measured(work, SetToNone()).rows
    assert [(row.bitwise, row.gradient_error, row.problem) for row in rows] == [(True, 0, "")] * 2
    assert not model.mask.any()


def test_the_measure_of_errors():
    def result(loss, **gradients):
        return _Result(torch.tensor(loss), {name: torch.tensor(value) for name, value in gradients.items()})

    plain = [result(2.0, a=[1.0, -4.0], b=[0.5])]
    assert _compare(plain, plain) == (0, 0, True)
    assert _compare(plain, [result(3.0, a=[1.0, -4.0], b=[1.5])]) == (0.5, 0.25, False)
    assert _compare(plain, [result(2.0, a=[1.0, -4.0])]) == (0, math.inf, False)
    assert math.isnan(_compare(plain, [result(2.0, a=[math.nan, -4.0], b=[0.5])])[1])
    assert _compare([result(0.0)], [result(0.25)]) == (0.25, None, False)
    turned = _compare([result(1.0, a=[3 + 4j])], [result(1.0, a=[3 - 4j])])
    assert turned[1] == pytest.approx(8 / 5)
    endless = [result(1.0, a=[math.inf, 1.0])]
    assert _compare(endless, endless) == (0, 0, True)


# --- time and memory -------------------------------------------------------------------------------------------------


def test_every_row_is_timed_in_every_round(work):
    told = []
    found = measured(work, Checkpoint(), SetToNone(), repeats=3, progress=lambda *what: told.append(what))
    assert [len(row.seconds) for row in found.rows] == [3, 3, 3, 3]
    assert found.time_ratio(found.rows[0]) == 1
    assert all(found.time_ratio(row) == row.median / found.rows[0].median for row in found.rows)
    assert ("memory: none", 0, 3) in told
    assert ("errors: all", 0, 1) in told
    assert ("times, round 3 of 3: all", 3, 4) in told
    assert told[-1] == ("times, round 3 of 3", 4, 4)


def test_memory_is_that_of_a_profile(work):
    rows = by_name(measured(work, Checkpoint(), OffloadActivations(min_bytes=1), errors=False))
    profile = profiling(work)
    assert rows["none"].report.peak == profile([]).peak
    assert rows["checkpoint"].report.peak_by_category == profile(["checkpoint"]).peak_by_category
    assert rows["checkpoint"].report.kept < rows["none"].report.kept
    assert rows["none"].loss_error is rows["none"].median is None


def test_the_model_is_as_it_was(work):
    for parameter in work.model.parameters():  # those that are zero would be filled
        nn.init.normal_(parameter, std=0.1)
    before, random = fingerprint(work.model), torch.get_rng_state()
    values = {name: value.clone() for name, value in work.model.state_dict().items()}
    measured(work, Checkpoint(), SetToNone(), AMP(), repeats=1)
    assert differences(before, fingerprint(work.model)) == []
    assert all(torch.equal(values[name], value) for name, value in work.model.state_dict().items())
    assert all(not p._post_accumulate_grad_hooks and p.grad is None for p in work.model.parameters())
    assert not work.optimizer.state
    assert torch.equal(random, torch.get_rng_state())


def test_inference_has_errors_of_what_it_gives_and_no_gradients():
    work = Work(Net(), torch.randn(4, 12, 16), loss)
    rows = measured(work, AMP(), train=False, repeats=1).rows
    assert rows[0].bitwise
    assert 0 < rows[1].loss_error < 0.05
    assert all(row.gradient_error is None or row.gradient_error == 0 for row in rows)
    assert all(len(row.seconds) == 1 for row in rows)


def test_a_recipe_with_dropout_microbatches_and_clipping():
    tiny = load_recipe(TINY)
    config = configure(tiny, None, {"microbatch": 4, "grad_clip": 0.5, "width": 32})
    work = recipe_work(tiny, config, train=True, device="cpu", real=True)

    def profile(passes):
        return profile_recipe(tiny, config, passes=passes)

    rows = ablate([Checkpoint(), Takes()], lambda chosen: True, profile, work, train=True, repeats=1)
    rows = {row.name: row for row in rows}
    assert rows["checkpoint"].bitwise
    assert rows["takes"].problem.startswith("no gradients are left after backward, but this loop clips them")
    assert rows["takes"].report is not None
    assert rows["takes"].seconds == []
    assert len(rows["checkpoint"].seconds) == 1


# --- what fails ------------------------------------------------------------------------------------------------------


def test_a_row_that_fails_leaves_the_others(work):
    found = measured(work, SetToNone(), Fails(), Checkpoint(), repeats=1)
    rows = by_name(found)
    assert "ValueError: no room" in rows["fails"].problem
    assert "\n" not in rows["fails"].problem
    assert rows["fails"].seconds == []
    assert rows["set_to_none"].bitwise
    assert len(rows["set_to_none"].seconds) == 1
    # It does not take the row of all with it.
    assert [row.name for row in found.rows] == ["none", "set_to_none", "fails", "checkpoint", "all"]
    assert rows["all"].bitwise
    assert rows["all"].passes == (SetToNone(), Checkpoint())


def test_conflicts_and_passes_without_work_are_rows_with_the_reason(work):
    found = measured(work, Checkpoint(), Checkpoint(blocks="blocks.*"), memopt.passes.OuterProduct())
    rows = by_name(found)
    row = rows["checkpoint + checkpoint(blocks='blocks.*')"]
    assert row.kind == "refused"
    assert "checkpoint() and checkpoint(blocks='blocks.*')" in row.problem
    assert "found nothing to do" in rows["outer_product"].problem
    assert rows["outer_product"].report is row.report is None


def test_a_model_that_fails_by_itself_is_an_error():
    class Broken(Net):
        def forward(self, sample):
            raise ValueError("not me")

    model = Broken()
    work = Work(model, torch.randn(4, 12, 16), loss)
    with pytest.raises(MemoptError, match="not me"):
        measured(work, Checkpoint())


def test_a_model_that_fails_on_true_tensors_only_is_an_error_in_one_line(work):
    def forward(model, sample):
        if type(sample) is torch.Tensor:
            raise ValueError("not me")
        return loss(model, sample)

    work.forward = forward
    with pytest.raises(
        MemoptError, match=r"a step without passes failed: ValueError: not me \(.*test_ablation.py:\d+\)"
    ):
        measured(work, Checkpoint())


def test_a_machine_too_small_for_a_pass_alone_leaves_it_in_the_row_of_all():
    ones = single_rows([Checkpoint(), SetToNone()], train=True)[1:]
    ones[1].problem = "out of memory: CUDA out of memory"
    assert [row.name for row in rows_together(ones, lambda chosen: True)] == ["all"]


def test_passes_of_the_other_mode_say_so_and_none_comes_twice():
    rows = single_rows([Checkpoint(), AMP(), memopt.passes.InferenceMode()], train=False)
    assert [row.problem for row in rows] == ["", "for train only", "", ""]
    assert rows_together(rows[1:3], lambda chosen: True) == []
    with pytest.raises(MemoptError, match="checkpoint is given twice; a pass has one row"):
        single_rows([Checkpoint(), SetToNone(), Checkpoint()], train=True)


def test_small_figures_have_three_digits():
    values = [None, 0, 0.0, 12.34, 0.5, 0.0123456]
    assert [_number(value, ".1f") for value in values] == ["", "0", "0", "12.3", "0.500", "0.0123"]
    assert _number(1.5e-7, ".1e") == "1.5e-07"


# --- the front and its picture ---------------------------------------------------------------------------------------


def ablation(*points):
    rows = []
    for i, (peak, seconds) in enumerate(points):
        row = Row("none" if i == 0 else f"row {i}", "none" if i == 0 else "one", ())
        row.report, row.seconds = SimpleNamespace(peak=peak), [seconds]
        rows.append(row)
    return Ablation(tuple(rows), {"subject": "Net, training step on cuda; inputs: $x$", "steps_on": "cpu, batch 2"}, {})


def test_the_front_is_what_nothing_beats():
    found = ablation((100, 1.0), (50, 1.5), (50, 1.4), (80, 1.6), (20, 3.0), (100, 0.9), (20, 3.0))
    assert [row.name for row in found.front()] == ["row 2", "row 4", "row 5", "row 6"]


def test_the_picture_names_every_row_and_no_two_names_overlap(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.text import Text  # an annotation's own extent has its line in it

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, dpi, **k: (drawn.append(self), self.set_dpi(dpi), save(self, *a, **k))
    )
    names = {"none": "no passes", "one": "one pass", "all but one": "all passes but one", "all": "all passes"}
    names["refused"] = "refused"
    found = ablation(*[(10 << 20, 1 + 0.001 * i) for i in range(30)], (1 << 20, 9.0))
    for row, kind in zip(found.rows, names, strict=False):
        row.kind = kind
    found.rows[-1].passes = (AMP(),)
    pareto(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    texts = drawn[0].axes[0].texts
    assert sorted(t.get_text() for t in texts) == sorted(["none", *(f"row {i}" for i in range(1, 31))])
    boxes = sorted((Text.get_window_extent(t) for t in texts), key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 for a, b in itertools.pairwise(boxes))
    width, height = drawn[0].get_size_inches() * drawn[0].dpi
    legend = drawn[0].legends[0].get_window_extent()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.y1 <= height and box.x1 <= width for box in [*boxes, legend])
    entries = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert entries == ["Pareto front (names in bold)", *names.values(), "hollow: not exact"]
    assert drawn[0].axes[0].get_xlabel() == "time of a step (s) on cpu, batch 2"


def test_a_picture_that_cannot_be_drawn_leaves_nothing(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(figure, out, **how):
        (out if hasattr(out, "write") else out.open("wb")).write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        pareto(ablation((100, 1.0), (50, 1.5)), tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


def test_no_picture_without_points(tmp_path):
    with pytest.raises(MemoptError, match="no row has both memory and time"):
        pareto(Ablation((Row("none", "none", ()),), {}, {}), tmp_path / "p.png")
