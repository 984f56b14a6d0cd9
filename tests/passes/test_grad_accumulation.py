"""A batch in parts: any loss over it, exact to rounding; bytes of one part; everything that is not so is refused."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memopt
from memopt import InputError, NothingToDo, PassConflict
from memopt.passes import GradAccumulation
from tests.nets import Net
from tests.zoo import ZOO

BATCH = 6


def inputs(batch=BATCH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 5, 16, generator=generator).to(dtype)
    return x, torch.randint(10, (batch,), generator=generator)


def build(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def contrastive(y):
    """A loss that no sum over samples is."""
    z = F.normalize(y.mean(1), dim=-1)
    return F.cross_entropy(z @ z.mT / 0.1, torch.arange(len(z)))


LOSSES = {"contrastive": contrastive, "mean": lambda y: y.square().mean(), "deviation": lambda y: (y.std(0) * y).sum()}


def gradients(model, loss=contrastive, batch=BATCH, dtype=torch.float64):
    x, t = inputs(batch, dtype)
    x.requires_grad_()
    model.zero_grad()
    value = loss(model(x, t, scale=0.5))
    value.backward()
    return [value.detach(), x.grad, *(p.grad for p in model.parameters())]


def error(found, expected):
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "options", [{"parts": 2}, {"parts": 4}, {"parts": 99}, {"samples": 1}, {"samples": 4}], ids=str
)
def test_any_loss_over_the_batch_is_exact(options, loss):
    expected = gradients(build(), LOSSES[loss])
    model = build()
    handle = memopt.apply(model, [GradAccumulation(**options)])
    for _ in range(2):
        assert error(gradients(model, LOSSES[loss]), expected) < 1e-13
    handle.undo()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, LOSSES[loss]), expected, strict=True))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_rounding_is_as_small_as_the_models_own(parts):
    truth = gradients(build(), LOSSES["mean"])
    own = error([g.double() for g in gradients(build(torch.float32), LOSSES["mean"], dtype=torch.float32)], truth)
    model = build(torch.float32)
    memopt.apply(model, [GradAccumulation(parts=parts)])
    found = gradients(model, LOSSES["mean"], dtype=torch.float32)
    assert error([g.double() for g in found], truth) < 2 * own


@pytest.mark.parametrize(
    ("options", "batch", "sizes"),
    [
        ({"parts": 4}, 10, [3, 3, 2, 2]),
        ({"parts": 4}, 3, [1, 1, 1]),
        ({"parts": 1}, 3, [3]),
        ({"samples": 4}, 10, [4, 4, 2]),
        ({"samples": 4}, 3, [3]),
        ({"samples": 4}, 8, [4, 4]),
    ],
)
def test_parts_of_batches_of_any_size(options, batch, sizes):
    pass_ = GradAccumulation(**options)
    assert pass_.sizes(batch) == sizes
    model = build()
    handle = memopt.apply(model, [pass_])
    with torch.no_grad():
        model(*inputs(batch))  # the first call tries parts
        seen = []
        model.embed.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
        found = model(*inputs(batch))
    assert seen == sizes
    assert error([found], [build()(*inputs(batch))]) < 1e-14
    split = {"batches split": 2, "parts": 2 * len(sizes)}
    assert handle.report().rows[0].counts == (split if len(sizes) > 1 else {})


def test_each_part_but_the_last_runs_twice():
    model = build()
    memopt.apply(model, [GradAccumulation(samples=2)])
    gradients(model)  # the first call tries a part
    events = []
    model.blocks[0].register_forward_pre_hook(lambda m, args: events.append(float(args[0].detach().sum())))
    y = model(*inputs(), scale=0.5)
    forward = events.copy()
    assert len(forward) == 3
    contrastive(y).backward()
    assert events[3:] == [forward[1], forward[0]]  # the newest first


def test_one_gradient_per_parameter_and_backward():
    model = build()
    memopt.apply(model, [GradAccumulation(samples=1)])
    calls = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append(id(p)))
    gradients(model)
    assert sorted(calls) == sorted(map(id, model.parameters()))


class Chain(nn.Module):
    """Keeps one tensor of N x 64 for each of its layers."""

    def __init__(self, layers=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


@pytest.mark.parametrize("parts", [2, 4, 8, 16])
def test_what_is_kept_is_that_of_one_part(parts):
    n, layers = 1024, 8
    one = n * 64 * 4  # the input, each layer's result, the output
    plain = memopt.profile(Chain(), torch.empty(n, 64))
    found = memopt.profile(Chain(), torch.empty(n, 64), passes=[GradAccumulation(parts=parts)])
    assert plain.kept == (layers + 1) * one
    assert found.kept == layers * one // parts + one
    if parts >= 8:  # the peak is where outputs are joined: the last part, the other parts' outputs, all outputs
        weights = layers * 64 * 64 * 4
        assert found.peak == weights + one + layers * one // parts + (parts - 1) * one // parts + one
        assert found.peak_phase == "forward"


def test_peaks_fall_with_the_number_of_parts():
    peaks = [
        memopt.profile(Chain(16), torch.empty(512, 64), passes=[GradAccumulation(parts=parts)], device="cuda").peak
        for parts in (1, 2, 4, 8, 16)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)
    assert peaks[0] == memopt.profile(Chain(16), torch.empty(512, 64), device="cuda").peak


def test_without_gradients_only_the_outputs_stay():
    model = Chain(2)
    n, row = 64, 64 * 4
    plain = memopt.profile(model, torch.empty(n, 64), train=False)
    found = memopt.profile(model, torch.empty(n, 64), train=False, passes=[GradAccumulation(parts=4)])
    start = sum(plain.start_by_category.values())
    assert plain.peak == start + 3 * n * row
    assert found.peak == start + 2 * n * row  # outputs of all parts, and the joined one
    plain = memopt.profile(Wide(), torch.empty(n, 64), train=False)
    found = memopt.profile(Wide(), torch.empty(n, 64), train=False, passes=[GradAccumulation(parts=4)])
    start, inside, outside = sum(plain.start_by_category.values()), n * 4096 * 4, n * 4 * 4
    assert plain.peak == start + 2 * inside
    assert found.peak == start + 2 * inside // 4 + outside * 3 // 4


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 4096, bias=False), nn.Linear(4096, 4, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


# What is split, and what is not.


@dataclass
class Result:
    sample: Tensor
    more: dict[str, Any]


class Structured(nn.Module):
    """Arguments and results of all kinds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch, table, *extra, flag=True, **options):
        assert table.shape == (7, 4)
        assert flag
        x = batch["x"] * options["scale"] + table.sum() + extra[0][:, None] + options["inner"]["bias"]
        y = self.layer(x)
        return Result(y, {"pair": (y.sum(1), y[:, :2]), "steps": 3, "none": None, "text": "a"})


def structured(batch=5, **more):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 4, generator=generator)
    args = ({"x": x}, torch.ones(7, 4), torch.arange(float(batch)))
    return args, {"scale": torch.tensor(2.0), "inner": {"bias": torch.randn(1, 4, generator=generator)}, **more}


def test_nested_arguments_and_results():
    model = Structured()
    args, kwargs = structured()
    expected = model(*args, **kwargs)
    memopt.apply(model, [GradAccumulation(samples=2)])
    found = model(*args, **kwargs)
    assert type(found) is Result
    assert torch.allclose(found.sample, expected.sample, atol=1e-6)
    assert torch.allclose(found.more["pair"][0], expected.more["pair"][0], atol=1e-6)
    assert found.more["pair"][1].shape == (5, 2)
    assert [found.more[key] for key in ("steps", "none", "text")] == [3, None, "a"]


def test_a_length_that_is_the_batchs_by_chance_is_refused_or_known():
    model = Structured()
    expected = copy.deepcopy(model)
    handle = memopt.apply(model, [GradAccumulation()])
    args, kwargs = structured(4)
    with pytest.raises(InputError, match=r"cannot tell whether extra \[4\] belongs to the batch of 4, because batch"):
        model(*args, **kwargs)
    model(*structured(5)[0], **structured(5)[1])  # now it is known
    for batch in (4, 7):  # 7: the table's length
        args, kwargs = structured(batch)
        assert torch.allclose(model(*args, **kwargs).sample, expected(*args, **kwargs).sample, atol=1e-6)
    handle.undo()
    memopt.apply(model, [GradAccumulation(split=("batch", "extra"))])  # or said
    args, kwargs = structured(4)
    assert torch.allclose(model(*args, **kwargs).sample, expected(*args, **kwargs).sample, atol=1e-6)


def test_named_arguments_of_a_model_from_a_library():
    case = ZOO["monai_diffusion_unet"]
    model, plain = case.build().eval(), case.build().eval()
    args, kwargs = case.inputs()
    handle = memopt.apply(model, [GradAccumulation()])
    with pytest.raises(InputError, match=r"split=\('x', 'timesteps', 'context', 'class_labels'\)"):
        model(*args, **kwargs)
    handle.undo()
    memopt.apply(model, [GradAccumulation(split=("x", "timesteps", "context", "class_labels"))])
    assert error([model(*args, **kwargs)], [plain(*args, **kwargs)]) < 1e-5


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.layer, self.result = nn.Linear(4, 4), result

    def forward(self, x, ids=None):
        return self.result(self.layer(x))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda y: {"loss": y.sum(), "y": y}, r"the output loss of Returns has the shape \[\] for a part of 3 samples"),
        (lambda y: y.mT, r"the output of Returns has the shape \[4, 3\] for a part of 3 samples"),
        (lambda y: (y, float(y.detach().sum())), "the output 1 of Returns is a float, another one for each part"),
        (lambda y: [y, object()], "the output 1 of Returns is a object"),
        (lambda y: {f"part {float(y.detach().sum())}": y}, "outputs of another structure for each part"),
    ],
)
def test_outputs_that_cannot_be_joined(result, message):
    model = Returns(result)
    memopt.apply(model, [GradAccumulation()])
    for guard in (torch.enable_grad(), torch.no_grad()):
        with pytest.raises(InputError, match=message), guard:
            model(torch.randn(6, 4))


def test_a_batch_that_is_not_in_the_first_argument():
    class Swapped(nn.Linear):
        def forward(self, table, x):
            return super().forward(x) + table.sum()

    model = Swapped(4, 4)
    memopt.apply(model, [GradAccumulation()]).undo()
    memopt.apply(model, [GradAccumulation()])
    with pytest.raises(InputError, match=r"shape \[6, 4\] for a part of 2 samples, .* say GradAccumulation\(split="):
        model(torch.randn(3), torch.randn(6, 4))


@pytest.mark.parametrize("args", [(), (torch.tensor(1.0),), ("text", 3)])
def test_no_batch_at_all(args):
    class Takes(nn.Linear):
        def forward(self, *x):
            return self.weight

    model = Takes(4, 4)
    memopt.apply(model, [GradAccumulation()])
    with pytest.raises(InputError, match="no tensor with a batch dimension among the arguments of Takes"):
        model(*args)


# What is refused.


@pytest.mark.parametrize(
    ("norm", "refused"),
    [
        (lambda: nn.BatchNorm1d(4), True),
        (lambda: nn.SyncBatchNorm(4), True),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), True),
        (lambda: nn.InstanceNorm1d(4, track_running_stats=True), True),
        (lambda: nn.BatchNorm1d(4).eval(), False),
        (lambda: nn.InstanceNorm1d(4), False),
        (lambda: nn.GroupNorm(2, 4), False),
    ],
)
def test_statistics_of_the_batch_are_refused_by_name(norm, refused):
    model = nn.Sequential(nn.Linear(4, 4), norm())
    if not refused:
        memopt.apply(model, [GradAccumulation()])
        return
    with pytest.raises(InputError, match=rf"1 \({type(model[1]).__name__}\) of Sequential computes statistics"):
        memopt.apply(model, [GradAccumulation()])


def test_frozen_statistics_that_are_thawed_later():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    expected = copy.deepcopy(model)
    memopt.apply(model, [GradAccumulation()])
    x = torch.randn(6, 4)
    assert torch.allclose(model(x), expected(x), atol=1e-6)
    model.train()
    with pytest.raises(InputError, match="BatchNorm1d"):
        model(x)
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize(("name", "buffer"), [("running_stats", "blocks.0.count"), ("power_iteration", "blocks.0.u")])
@pytest.mark.parametrize("grad", [True, False])
def test_buffers_that_forward_changes_are_refused(name, buffer, grad):
    case = ZOO[name]
    model = case.build()
    memopt.apply(model, [GradAccumulation()])
    with pytest.raises(InputError, match=f"changes its buffer {buffer} in forward"), torch.set_grad_enabled(grad):
        model(*case.inputs()[0])


def test_an_argument_that_forward_changes_is_refused_where_it_would_matter():
    class Writes(nn.Linear):
        def forward(self, x):
            x.mul_(2)
            return super().forward(x)

    model, plain = Writes(4, 4), Writes(4, 4)
    plain.load_state_dict(model.state_dict())
    memopt.apply(model, [GradAccumulation()])
    with pytest.raises(InputError, match="Writes changes its argument x in place"):
        model(torch.randn(6, 4))
    x, y = torch.ones(6, 4), torch.ones(6, 4)
    with torch.no_grad():
        assert torch.allclose(model(x), plain(y))
    assert torch.equal(x, y)


def test_data_parallel_models_take_the_pass_inside():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(InputError, match="Apply the pass to the model inside, before it is wrapped"):
            memopt.apply(model, [GradAccumulation()])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": 0}, "parts must be at least 1, not 0"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"samples": 2, "parts": 3}, "give parts or samples, not both"),
        ({"split": ["image"]}, "forward of Net has no argument 'image'; it has sample, timestep, scale, mode"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(InputError) as found:
        memopt.apply(Net(), [{"grad_accumulation": options}])
    assert message in str(found.value)


def test_twice_and_nothing_to_do():
    model = build()
    memopt.apply(model, [GradAccumulation()])
    with pytest.raises(PassConflict, match="batch of the whole model"):
        memopt.apply(model, [GradAccumulation(parts=3)])
    with pytest.raises(NothingToDo, match="a model with parameters"):
        memopt.apply(nn.ReLU(), [GradAccumulation()])
