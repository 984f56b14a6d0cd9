"""Release: intermediates that local names hold die after their last use, and nothing else changes."""

import copy
import weakref

import pytest
import torch
from torch import nn

import memopt
from memopt import NothingToDo
from memopt.passes import AMP, Checkpoint, FusedAttention, OuterProduct
from memopt.passes.release import Release
from tests.zoo import ZOO, differences, fingerprint, leaves, loss_of, placed, run

# torch says so under plain autocast too, where a norm in float32 meets half-precision input (flux).
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

NOTHING = {
    *("tied_weights", "shared_called", "shared_listed", "batch_norm", "running_stats", "inplace_input", "inplace_relu"),
    *("data_dependent", "frozen_stem", "single_linear", "tuple_blocks", "own_autocast"),
}
APPLIES = [case for case in ZOO.values() if case.name not in NOTHING]


class Held(nn.Module):
    """Its names hold [4, 10], [4, 20], [4, 30] and [4, 40] of what it computes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(i, i + 10) for i in (10, 20, 30, 40))

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        return self.d(c)


class Rebinding(Held):
    def forward(self, x):
        x = self.a(x)
        x = self.b(x)
        x = self.c(x)
        return self.d(x)


class ByMethod(Held):
    """Forward has nothing to release, and gives the only reference to what it calls."""

    def forward(self, x):
        return self._rest(self.a(x))

    def _rest(self, x):
        x = self.b(x)
        x = self.c(x)
        return self.d(x)


class Arguments(Held):
    def forward(self, x):
        return self._rest(self.a(x))

    def _rest(self, a):
        b = self.b(a)
        c = self.c(b)
        return self.d(c)


class NoGrad(Held):
    @torch.no_grad()
    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        return self.d(c)


X = torch.zeros(4, 10)
FLOAT, ROWS = 4, 4
FIXED = FLOAT * (10 * ROWS + sum(i * (i + 10) + i + 10 for i in (10, 20, 30, 40)))  # the input, weights and biases


def activations(model, train=False, **how):
    """The most that a forward holds beside weights and its input, in floats per row."""
    return (memopt.profile(model, X, train=train, **how).peak - FIXED) / FLOAT / ROWS


# What a call produces, with what its input is and what names hold.


def test_by_hand():
    assert activations(Held()) == 20 + 30 + 40 + 50
    assert activations(Held(), passes=[Release()]) == 40 + 50
    assert activations(Held(), real=True, passes=[Release()]) == 40 + 50
    assert activations(NoGrad()) == 20 + 30 + 40 + 50
    assert activations(NoGrad(), passes=[Release()]) == 40 + 50
    assert activations(Rebinding()) == 40 + 50


def test_training_keeps_what_autograd_keeps():
    plain = memopt.profile(Held(), X)
    assert memopt.profile(Held(), X, passes=[Release()]).peak == plain.peak


@pytest.mark.parametrize(
    "model", [Rebinding(), ByMethod(), nn.TransformerEncoderLayer(8, 2, batch_first=True)], ids=str
)
def test_nothing_where_python_frees_by_itself_or_the_code_is_torchs(model):
    with pytest.raises(NothingToDo, match=r"release: found nothing to do. It needs modules whose forward"):
        memopt.apply(model, ["release"])


def test_methods_that_forward_calls():
    model = Arguments()
    plain = activations(model)
    handle = memopt.apply(model, [Release()])
    assert handle.report().rows[0].notes == ("local names released after their last use: 2 in 1 modules",)
    assert plain == 20 + 30 + 40 + 50
    assert activations(model) == 40 + 50
    handle.undo()
    assert activations(model) == plain


def test_a_patched_instance_is_left_alone():
    model = nn.Sequential(Held(), Held(), torch.nn.utils.skip_init(nn.Linear, 2, 2))
    model[1].forward = model[1].forward
    handle = memopt.apply(model, [Release()])
    assert [claim.path for claim in handle.report().rows[0].claims] == ["0"]


# The zoo.


def without_gradients(model, case, seed=0):
    args, kwargs = placed(case.inputs(), model)
    torch.manual_seed(seed)
    with torch.no_grad():
        return [t.clone() for t in leaves(model(*args, **kwargs))]


def assert_same_step(a, b):
    assert torch.equal(a[0], b[0])
    for one, other in zip(a[1:], b[1:], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert (one[name] is None) == (other[name] is None), name
            assert one[name] is None or torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("case", [ZOO[name] for name in sorted(NOTHING)], ids=str)
def test_models_that_bind_their_names_again_have_nothing_to_release(case):
    with pytest.raises(NothingToDo):
        memopt.apply(case.build(), [Release()])


@pytest.mark.parametrize("case", APPLIES, ids=str)
def test_bit_for_bit(case):
    plain, model = case.build(), case.build()
    before = fingerprint(model)
    handle = memopt.apply(model, [Release()])
    assert differences(before, fingerprint(model))
    for mode in (True, False):
        expected, found = (without_gradients(m.train(mode), case) for m in (plain, model))
        assert len(expected) == len(found) > 0
        assert all(map(torch.equal, expected, found))
        assert_same_step(run(plain, case), run(model, case))
    handle.undo()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in plain.modules()]


SAVES = {"hae_v2", "unet2d", "unet2d_condition", "dit", "pixart", "sd3", "flux", "autoencoder_kl"}
SAVES |= {"monai_diffusion_unet", "vit", "gpt2", "power_iteration"}


@pytest.mark.parametrize("case", APPLIES, ids=str)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_never_more_and_often_less(case, train):
    model, inputs = case.build(), case.inputs()
    plain, less = (
        memopt.profile(model, inputs, train=train, loss=loss_of if train else None, passes=passes).peak
        for passes in ([], [Release()])
    )
    assert less <= plain
    if not train:
        assert (less < plain) == (case.name in SAVES)


# With others.


@pytest.mark.parametrize("name", ["hae_v2", "guided_unet"])
def test_either_order_of_rewrites(name):
    case, results, reports, peaks = ZOO[name], [], [], []
    first, second = OuterProduct(), FusedAttention()
    orders = [[first, second], [Release(), first, second], [first, second, Release()], [first, Release(), second]]
    for passes in orders:
        model = case.build()
        handle = memopt.apply(model, passes, missing="skip")
        results.append((run(model, case), without_gradients(model, case)))
        reports.append({row.name: row.counts for row in handle.report().rows if row.counts})
        peaks.append(memopt.profile(model, case.inputs(), train=False).peak)
        handle.undo()
        assert [type(m) for m in model.modules()] == [type(m) for m in case.build().modules()]
    for result, report in zip(results[1:], reports[1:], strict=True):
        assert report == reports[0] != {}
        assert_same_step(results[0][0], result[0])
        assert all(map(torch.equal, results[0][1], result[1]))
    assert peaks[1] == peaks[2] == peaks[3]
    assert (peaks[1] < peaks[0]) == (name == "hae_v2")


def test_what_passes_do_for_a_models_own_checkpoint_function_they_still_do():
    case = ZOO["guided_unet_legacy"]
    notes = []
    for passes in ([AMP(), Checkpoint()], [AMP(), Checkpoint(), Release()]):
        model = case.build()
        report = memopt.apply(model, passes).report()
        notes.append([row.notes for row in report.rows[:2]])
        assert run(model, case)[0].isfinite()
    assert notes[0] == notes[1]
    assert all(notes[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_without_a_break_and_copied():
    torch.manual_seed(1)
    model, x = Held(), torch.randn(4, 10)
    expected = model(x)
    handle = memopt.apply(model, [Release()])
    twin = copy.deepcopy(model)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    handle.undo()
    assert held_at_the_end(twin, x) == [False]
    assert held_at_the_end(model, x) == [True]
    assert torch.equal(twin(x), expected)


def held_at_the_end(model, x):
    """Whether the first layer's result is there when the last layer runs."""
    references, held = [], []
    model.a.register_forward_hook(lambda module, args, output: references.append(weakref.ref(output)))
    model.d.register_forward_pre_hook(lambda module, args: held.append(references[-1]() is not None))
    with torch.no_grad():
        model(x)
    return held
