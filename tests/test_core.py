"""apply, undo, the journal, conflicts, names and tables, entry points."""

import copy
import itertools
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import memopt
from memopt import AlreadyApplied, Claim, InputError, MemoptError, NothingToDo, Pass, PassConflict, UnknownPass
from memopt.passes import AMP, CacheCleanup, Checkpoint, SetToNone
from tests.zoo import differences, fingerprint


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


LOG: list[str] = []


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiplies outputs: a pass made for tests that uses every verb of Edit."""

    name: ClassVar[str] = "test_scale"
    stage: ClassVar = "rewrite"
    exact: ClassVar[bool] = False
    needs: ClassVar[str] = "a head"

    path: str = "head"
    factor: float = 2.0
    fail: bool = False

    def plan(self, model, context):
        return [Claim(self.path, "graph")] if self.path in dict(model.named_modules()) else []

    def apply(self, claims, edit):
        LOG.append(self.name)
        factor = self.factor
        module = edit.module(self.path)
        edit.wrap(module, "forward", lambda m, inner, *a, **k: inner(*a, **k) * factor)
        edit.set(module, "scaled_by", factor)
        edit.hook(module.register_forward_pre_hook, lambda m, args: None)
        edit.hook(module.register_forward_hook, lambda m, args, kwargs, out: None, with_kwargs=True)
        edit.at_phase_end("sampling", lambda: LOG.append("sampled"))
        edit.note(f"scaled {self.path}")
        if self.fail:
            raise KeyError("half way")


@dataclass(frozen=True, kw_only=True)
class Hooked(Pass):
    name: ClassVar[str] = "test_hooked"
    stage: ClassVar = "hook"
    exact: ClassVar[bool] = True

    def plan(self, model, context):
        return [Claim("blocks.0", "weights")]

    def apply(self, claims, edit):
        LOG.append(self.name)
        edit.hook(edit.model.register_forward_pre_hook, lambda m, args: None)


@pytest.fixture
def model():
    LOG.clear()
    return Model()


def test_apply_changes_in_place_and_undo_restores(model):
    before, x = fingerprint(model), torch.randn(2, 4)
    plain = model(x)
    handle = memopt.apply(model, [Scale(factor=3.0)])
    assert handle.model is model
    assert handle.active
    assert torch.equal(model(x), plain * 3)
    assert isinstance(model.head, nn.Linear)
    assert model.head.scaled_by == 3.0
    handle.undo()
    handle.undo()  # idempotent
    assert not handle.active
    assert differences(before, fingerprint(model)) == []
    assert torch.equal(model(x), plain)


def test_stages_order_application_whatever_the_user_lists(model):
    memopt.apply(model, [Checkpoint(), Hooked(), Scale()])
    assert LOG == ["test_scale", "test_hooked"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_undo_in_every_order(model, order):
    optimizer = torch.optim.AdamW(model.parameters())
    before = fingerprint(model)
    optimizer_class = type(optimizer)
    passes = [Scale(), Checkpoint(), AMP(), SetToNone()]
    handles = [memopt.apply(model, [p], optimizer=optimizer) for p in passes]
    left = set(range(4))
    for i in order:
        handles[i].undo()
        left.remove(i)
        # What is left still works, and nothing of the others is there.
        assert [h.active for h in handles] == [j in left for j in range(4)]
        assert hasattr(model.head, "scaled_by") == (0 in left)
        assert model(torch.randn(2, 4)).shape == (2, 2)
    assert differences(before, fingerprint(model)) == []
    assert type(optimizer) is optimizer_class


def test_an_exception_in_apply_rolls_everything_back(model):
    optimizer = torch.optim.AdamW(model.parameters())
    before = fingerprint(model)
    with pytest.raises(KeyError, match="half way"):
        memopt.apply(model, [Checkpoint(), SetToNone(), Scale(fail=True), AMP()], optimizer=optimizer)
    assert differences(before, fingerprint(model)) == []
    assert type(optimizer) is torch.optim.AdamW


def test_an_exception_in_a_second_apply_keeps_the_first(model):
    x = torch.randn(2, 4)
    plain = model(x)
    first = memopt.apply(model, [Scale()])
    with pytest.raises(KeyError):
        memopt.apply(model, [Scale(path="blocks.1", fail=True)])
    assert first.active
    assert torch.equal(model(x), plain * 2)
    assert not hasattr(model.blocks[1], "scaled_by")


def test_context_manager(model):
    before = fingerprint(model)
    with memopt.apply(model, ["checkpoint", Scale()]) as handle:
        assert len(handle.passes) == 2
    assert not handle.active
    with pytest.raises(ZeroDivisionError), memopt.apply(model, ["checkpoint", Scale()]):
        _ = 1 / 0
    assert differences(before, fingerprint(model)) == []


def test_an_empty_list_of_passes_is_an_empty_handle(model):
    before = fingerprint(model)
    handle = memopt.apply(model, [])
    assert str(handle.report()) == "no passes applied"
    assert handle.scaler is None
    with handle.phase("sampling"):
        pass
    handle.undo()
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize(
    ("passes", "error", "message"),
    [
        (["chekpoint"], UnknownPass, r"unknown pass 'chekpoint'. Did you mean 'checkpoint'\? There are: amp, "),
        ([{"amp": {"dtyp": "bf16"}}], InputError, "pass 'amp' has no option 'dtyp'. Did you mean 'dtype'"),
        ([{"amp": {"dtype": "int8"}}], InputError, "pass 'amp': dtype: .*'bf16' or 'fp16'.*given: 'int8'"),
        ([3], InputError, "as an object, a name or a table of options, not as 3"),
        ([SetToNone()], NothingToDo, r"set_to_none: found nothing to do. It needs an optimizer: memopt.apply"),
        ([Scale(path="tail")], NothingToDo, r"needs a head; Model has blocks \(ModuleList\), head \(Linear\)"),
        ([Checkpoint(blocks="layers.*")], NothingToDo, r"needs modules whose name matches 'layers.\*'"),
        ([AMP(), AMP()], AlreadyApplied, r"amp\(\) is already applied to this model"),
        (
            [AMP(), AMP(dtype="fp16")],
            PassConflict,
            r"amp\(\) and amp\(dtype='fp16'\) both change the precision of the whole",
        ),
        (
            [Scale(path="blocks.0"), Scale(path="blocks.0.a")],
            PassConflict,
            "both change the graph of blocks.0.a. Leave one out",
        ),
    ],
)
def test_bad_requests_change_nothing_and_say_why(model, passes, error, message):
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        memopt.apply(model, passes)
    assert differences(before, fingerprint(model)) == []
    assert LOG == []  # found before any pass was applied


def test_the_same_pass_twice_over_two_calls(model):
    memopt.apply(model, [AMP()])
    with pytest.raises(AlreadyApplied, match="Undo its handle first"):
        memopt.apply(model, ["amp"])


def test_disjoint_places_of_one_pass_are_no_conflict(model):
    memopt.apply(model, [Checkpoint(blocks="blocks.0"), Checkpoint(blocks="blocks.2")])


def test_missing_skip_goes_into_the_report(model):
    handle = memopt.apply(model, [SetToNone(), Scale()], missing="skip")
    text = str(handle.report())
    assert "skipped: found nothing to do. It needs an optimizer" in text
    assert "scaled head" in text


def test_wrong_kinds_of_arguments(model):
    with pytest.raises(InputError, match=r"needs a torch.nn.Module, not a list"):
        memopt.apply([model], ["amp"])
    with pytest.raises(InputError, match=r"must be a torch.optim.Optimizer, not a str"):
        memopt.apply(model, ["set_to_none"], optimizer="adam")
    with pytest.raises(InputError, match="say 'raise' or 'skip'"):
        memopt.apply(model, ["amp"], missing="ignore")
    with pytest.raises(InputError, match="unknown phase 'lunch'"), memopt.apply(model, []).phase("lunch"):
        pass


@pytest.mark.parametrize("passes", [None, Checkpoint, [{"amp": None}], [{"amp": "bf16"}], [{"amp": {1: 2}}]], ids=str)
def test_passes_in_the_wrong_form(model, passes):
    with pytest.raises(InputError, match=r"must be a list of objects, names or tables|a table of names and values"):
        memopt.apply(model, passes)


def test_an_old_handle_does_not_take_off_a_new_one(model):
    first = memopt.apply(model, ["checkpoint"])
    memopt.apply(model, ["amp"])
    first.undo()
    second = memopt.apply(model, ["checkpoint"])
    assert not first.active
    first.undo()
    assert second.active


def test_report_rows(model):
    handle = memopt.apply(model, [Checkpoint(), {"amp": {"dtype": "fp16"}}])
    checkpoint, amp = handle.report().rows
    assert (checkpoint.name, checkpoint.exact, amp.exact) == ("checkpoint", True, False)
    assert [c.path for c in checkpoint.claims] == ["blocks.0", "blocks.1", "blocks.2"]
    assert "activations: blocks.0, blocks.1, blocks.2" in str(handle.report())
    assert "amp(dtype='fp16')  [not exact]" in str(handle.report())


def test_phases_call_back_in_order_and_only_while_active(model):
    handle = memopt.apply(model, [Scale()])
    with handle.phase("sampling"):
        assert "sampled" not in LOG
    with handle.phase("evaluation"):
        pass
    assert LOG.count("sampled") == 1
    handle.undo()
    with handle.phase("sampling"):
        pass
    assert LOG.count("sampled") == 1


def test_state_of_a_pass_survives_others_coming_and_going(model):
    amp = memopt.apply(model, [AMP(dtype="fp16")])
    scaler = amp.scaler
    scaler.scale(torch.ones(()))
    scaler.update(new_scale=128.0)
    other = memopt.apply(model, [Checkpoint()])
    assert other.scaler is scaler
    other.undo()
    assert amp.scaler is scaler
    assert amp.scaler.get_scale() == 128.0
    amp.undo()
    assert amp.scaler is None


def test_a_copy_works_but_takes_no_passes(model):
    handle = memopt.apply(model, [Scale()])
    twin = copy.deepcopy(model)
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), model(x))
    handle.undo()
    assert torch.equal(twin(x), model(x) * 2)
    with pytest.raises(MemoptError, match="copy of one with passes applied"):
        memopt.apply(twin, ["amp"])


def test_a_module_held_by_two_roots_is_claimed_once(model):
    memopt.apply(model, [Scale()])
    with pytest.raises(PassConflict, match="passes were applied to that module on its own, or through another model"):
        memopt.apply(model.head, [AMP()])


def test_a_forward_replaced_on_the_instance_is_refused(model):
    model.head.forward = lambda x: x
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"test_scale cannot wrap Linear.forward: another library replaced it"):
        memopt.apply(model, [Hooked(), Scale()])
    assert differences(before, fingerprint(model)) == []


def test_undo_refuses_when_the_class_was_changed_since(model):
    handle = memopt.apply(model, [Scale()])
    ours = type(model.head)
    model.head.__class__ = type("Foreign", (ours,), {})
    with pytest.raises(MemoptError, match=r"class of a Linear was changed after memopt.apply \(now .*Foreign\)"):
        handle.undo()
    assert handle.active
    model.head.__class__ = ours
    handle.undo()
    assert type(model.head) is nn.Linear


def test_signature_and_names_are_kept(model):
    import inspect

    before = inspect.signature(model.forward)
    memopt.apply(model, [AMP(), Checkpoint()])
    assert inspect.signature(model.forward) == before
    assert type(model).__name__ == "Model"
    assert type(model).__module__ == __name__
    assert "Block" in repr(model)


def test_model_is_freed_with_its_passes():
    import gc
    import weakref

    model = Model()
    memopt.apply(model, [Checkpoint(), Scale()])
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None


def test_pass_names_are_unique():
    with pytest.raises(MemoptError, match=r"pass name 'amp' is taken by memopt.passes.amp.AMP"):

        class Other(Pass):
            name = "amp"


def test_third_party_passes_come_from_entry_points(model, tmp_path, monkeypatch):
    package = tmp_path / "acme_passes.py"
    package.write_text(
        "from dataclasses import dataclass\nfrom memopt import Pass, Claim\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Acme(Pass):\n"
        "    'Does nothing, well.'\n    name = 'acme'\n    stage = 'hook'\n    exact = True\n    level: int = 1\n"
        "    def plan(self, model, context):\n        return [Claim('', 'graph')]\n"
        "    def apply(self, claims, edit):\n        edit.note(f'level {self.level}')\n"
    )
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[memopt.passes]\nacme = acme_passes:Acme\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "acme" in memopt.available_passes()
    handle = memopt.apply(model, [{"acme": {"level": 7}}])
    assert handle.report().rows[0].notes == ("level 7",)
    (info / "entry_points.txt").write_text("[memopt.passes]\nbroken = acme_passes:dataclass\n")
    with pytest.raises(MemoptError, match=re.escape("(acme_passes:dataclass) must name a memopt.Pass subclass")):
        memopt.apply(model, ["whatever"])


def test_claims_overlap_by_place_and_aspect():
    a = Claim("blocks.1", "activations")
    assert a.overlaps(Claim("blocks.1.attn", "activations"))
    assert a.overlaps(Claim("", "activations"))
    assert not a.overlaps(Claim("blocks.10", "activations"))
    assert not a.overlaps(Claim("blocks.1", "weights"))


def test_cache_cleanup_counts(model):
    handle = memopt.apply(model, [CacheCleanup(after=("sampling", "checkpoint"))])
    for phase in ("sampling", "evaluation", "checkpoint"):
        with handle.phase(phase):
            pass
    assert handle.report().rows[0].counts == {"cleanups": 2}
    with pytest.raises(InputError, match="unknown phase 'step'"):
        CacheCleanup(after=("step",))


def test_a_model_that_was_changed_after_apply_can_still_be_undone():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
    amp, checkpoint = memopt.apply(model, ["amp"]), memopt.apply(model, ["checkpoint"])
    model.bfloat16()  # amp, planned again, finds nothing to do
    checkpoint.undo()
    assert not checkpoint.active
    assert "skipped: found nothing to do" in str(amp.report())
    amp.undo()
    assert type(model) is nn.Sequential


def test_passes_that_cannot_be_put_back_say_so():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
    amp, checkpoint = memopt.apply(model, ["amp"]), memopt.apply(model, ["checkpoint"])
    model.forward = model.forward  # as another library patches an instance
    with pytest.raises(MemoptError, match=r"no longer fit it either.*The model is now without passes"):
        checkpoint.undo()
    assert not amp.active
    assert type(model) is nn.Sequential
