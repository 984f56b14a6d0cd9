"""Profiles against independent witnesses: true tensors, torch's own MemTracker, and the allocator itself.

Where the allocator is the judge, the step runs plain, without any dispatch mode. Slower comparisons, brats128 among
them, are in bench/estimate.py.
"""

import functools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memopt
from memopt import MemoptError
from memopt.memory import CATEGORIES
from memopt.memory.allocator import allocator_peak
from tests.zoo import ZOO, differences, fingerprint, leaves, loss_of
from tests.zoo.scaled import SCALED
from tests.zoo.witness import Step

# torch says so under plain autocast too, where a norm in float32 meets half-precision input (flux).
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

HOW = {"adamw": (True, True), "no optimizer": (True, False), "inference": (False, False)}


def settings(case, how):
    """A model, its inputs and the arguments of a profile; an optimizer has its states, as in the midst of training."""
    train, optimized = HOW[how]
    model, inputs = case.build(), case.inputs()
    optimizer = torch.optim.AdamW(model.parameters()) if optimized else None
    if optimizer is not None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
    return model, inputs, {"train": train, "loss": loss_of, "optimizer": optimizer}


def states(optimizer):
    return [] if optimizer is None else list(leaves(list(optimizer.state.values())))


class Untouched:
    """Everything that a profile must leave as it is, bit for bit; the model has gradients, which are set aside."""

    def __init__(self, model, inputs, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
        self.model, self.optimizer = model, optimizer
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.tensors = [*leaves(inputs), *gradients, *states(optimizer)]
        self.values = [t.detach().clone() for t in self.tensors]
        self.print, self.rng, self.groups = fingerprint(model), torch.get_rng_state(), self._groups()

    def _groups(self):
        if self.optimizer is None:
            return None
        return [{**group, "params": [id(p) for p in group["params"]]} for group in self.optimizer.param_groups]

    def check(self, inputs):
        assert differences(self.print, fingerprint(self.model)) == []
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        now = [*leaves(inputs), *gradients, *states(self.optimizer)]
        assert [id(t) for t in now] == [id(t) for t in self.tensors]
        assert all(map(torch.equal, now, self.values))
        assert all(t.grad is None for t in leaves(inputs))
        assert torch.equal(torch.get_rng_state(), self.rng)
        assert self._groups() == self.groups


# Small operations differ: transformers looks into a mask only if it has values; and where an operation changes a view
# in place, autograd undoes the view by as_strided on true tensors, and by the inverse of the view on fake ones.
OTHER_OPERATIONS = {"gpt2", "inplace_input", "inplace_relu"}


def after_each_operation(report):
    """What there is when nothing more changes in an operation; several deaths in one may come in any order."""
    return dict(zip(report.timeline.ops, zip(*report.timeline.bytes.values(), strict=True), strict=True))


@functools.cache
def real_report(case, how):
    """The profile of a true step, which leaves no trace in the model."""
    model, inputs, arguments = settings(case, how)
    before = Untouched(model, inputs, arguments["optimizer"])
    report = memopt.profile(model, inputs, real=True, **arguments)
    before.check(inputs)
    return report


SMALL = list(ZOO)[list(ZOO).index("gpt2") + 1 :]
"""Our own models of a few layers, which are nasty enough to try every way on; a library's takes seconds."""


@pytest.mark.parametrize(
    ("case", "how"),
    [
        pytest.param(case, how, id=f"{case}-{how}")
        for case in ZOO.values()
        for how in HOW
        if how != "no optimizer" or case.name in SMALL
    ],
)
def test_fake_and_true_steps_count_the_same(case, how):
    real = real_report(case, how)
    columns = [real.timeline.bytes[name] for name in CATEGORIES]
    assert all(sum(point) == total for *point, total in zip(*columns, real.timeline.total, strict=True))
    assert min(map(min, columns)) == 0
    assert real.peak == max(real.timeline.total)
    model, inputs, arguments = settings(case, how)
    before = Untouched(model, inputs, arguments["optimizer"])
    if case.name == "data_dependent":
        with pytest.raises(MemoptError, match=r"nasty.py:\d+, in forward: .* needs the values of a tensor .*real=True"):
            memopt.profile(model, inputs, **arguments)
        before.check(inputs)
        return
    fake = memopt.profile(model, inputs, **arguments)
    before.check(inputs)
    assert (fake.real, real.real) == (False, True)
    for what in ("peak", "peak_by_category", "start_by_category", "kept", "peak_op", "peak_module"):
        assert getattr(fake, what) == getattr(real, what), what
    if case.name not in OTHER_OPERATIONS:
        assert after_each_operation(fake) == after_each_operation(real)


def test_fake_and_true_steps_count_the_same_at_batch_1():
    """The autoencoder's attention makes tensors of which only the stride of the batch, whose size is 1, says whether
    they are channels-last, and so whether the next norm copies them."""
    model, inputs, arguments = settings(SCALED["autoencoder_kl"], "no optimizer")
    fake, real = (memopt.profile(model, inputs, real=real, **arguments) for real in (False, True))
    assert fake.peak_by_category == real.peak_by_category
    assert after_each_operation(fake) == after_each_operation(real)


# MemTracker's hooks on modules want a graph of each input that needs a gradient, which the legacy checkpoint function
# does not give, and a gradient for each parameter. The last one takes another branch from one run to the next.
MEM_TRACKER_FAILS = ("guided_unet", "guided_unet_legacy", "frozen_stem", "data_dependent")


@pytest.mark.parametrize("case", [case for case in ZOO.values() if case.name not in MEM_TRACKER_FAILS], ids=str)
def test_mem_tracker_counts_the_same(case):
    """Byte for byte in all models but flux, where it counts 1920 bytes more; the allocator agrees with us."""
    model, inputs, arguments = settings(case, "adamw")
    peak = Step(model, inputs, **arguments).mem_tracker()
    assert real_report(case, "adamw").peak == pytest.approx(peak, rel=0.005)


BETWEEN = 256
"""Bytes: numbers that C++ turns into tensors on the way to an operator live outside of it, for a moment."""


@pytest.mark.parametrize("case", ZOO.values(), ids=str)
def test_the_allocator_gives_out_what_the_tracker_counts(case):
    model, inputs, arguments = settings(case, "adamw")
    report = real_report(case, "adamw")
    account = Step(model, inputs, **arguments).allocator()
    assert account.start == sum(report.start_by_category.values())
    assert abs(account.start + account.tensors - report.peak) <= BETWEEN


@pytest.mark.parametrize("name", ["hae_v2", "autoencoder_kl", "dit", "gpt2"])
def test_the_estimate_is_within_three_percent_of_the_allocator(name):
    model, inputs, arguments = settings(SCALED[name], "adamw")
    report = memopt.profile(model, inputs, **arguments)
    assert report.peak > 64 << 20
    account = Step(model, inputs, **arguments).allocator()
    assert report.peak == pytest.approx(account.peak, rel=0.03)
    assert report.peak == pytest.approx(account.start + account.tensors, abs=1024)


def test_scratch_is_named_after_its_operator():
    """Without oneDNN, a convolution unfolds its input into a matrix, which it frees again: 27 numbers for each of 2 x 8
    x 8 places here. Its backward does so as well. A product of matrices needs nothing."""
    conv, x = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 16, 16)
    columns, places = 2 * 27 * 8 * 8 * 4, 2 * 8 * 8 * 8 * 4

    def forward():
        F.linear(conv(x).flatten(1), torch.ones(4, 512))

    enabled = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags warns on machines without an Intel GPU
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.no_grad():
            forward()
            account = allocator_peak(forward, [conv.weight, x])
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert account.scratch == {"aten.convolution": columns}
    assert account.start == conv.weight.nbytes + x.nbytes
    assert (account.peak_op, account.growth, account.scratch_at_peak) == (
        "aten.convolution",
        columns + places,
        columns,
    )
    assert account.tensors == places + 4 * 512 * 4 + 2 * 4 * 4
    assert account.peak == account.start + account.growth


BRATS128 = """
import json, time
import torch
import memopt
from torch._subclasses.fake_tensor import FakeTensorMode
from memopt.recipe import load_recipe

torch.set_num_threads(1)
began = time.perf_counter()
recipe = load_recipe("examples/hae_v2")
with FakeTensorMode():
    model = recipe.model(recipe.presets["brats128"])
    x, t, y = torch.randn(14, 4, 128, 128), torch.randint(1000, (14,)), torch.randint(2, (14,))
report = memopt.profile(
    model,
    ((x, t), {"y": y, "null": torch.rand(14) < 0.1, "clf_free": True}),
    loss=lambda out: out.square().mean(),
    optimizer=torch.optim.AdamW(model.parameters()),
)
seconds = time.perf_counter() - began
# Not ru_maxrss, which a process inherits from the one that started it.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([report.peak, seconds, int(status["VmHWM"].split()[0])]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_that_fits_nowhere_here_is_profiled_in_little_time_and_memory(root):
    """brats128 at batch 14, in a process of its own, whose memory is read at its end."""
    done = subprocess.run([sys.executable, "-c", BRATS128], cwd=root, capture_output=True, text=True, check=True)
    peak, seconds, kilobytes = json.loads(done.stdout.splitlines()[-1])
    assert peak == pytest.approx(13.43 * 2**30, rel=0.01)
    assert seconds < 60
    assert kilobytes < 1.5 * 2**20
