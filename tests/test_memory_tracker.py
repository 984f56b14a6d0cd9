"""What counts, as what, when: steps small enough to count by hand."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import checkpoint

import memopt
from memopt.errors import InputError, MemoptError
from memopt.memory import CATEGORIES, MemoryReport, moved
from memopt.memory.ledger import Ledger, active
from memopt.memory.tracker import Tracker
from tests.zoo import ZOO, loss_of

F4 = 4  # bytes of a float32


def summed(report: MemoryReport) -> None:
    columns = [report.timeline.bytes[name] for name in CATEGORIES]
    assert all(sum(point) == total for *point, total in zip(*columns, report.timeline.total, strict=True))
    assert all(value >= 0 for column in columns for value in column)
    assert max(report.timeline.total) == report.peak == sum(report.peak_by_category.values())


def both(model: nn.Module, inputs: object, **how: object) -> MemoryReport:
    """The profile on fake tensors, after a look at the true one."""
    fake = memopt.profile(model, inputs, **how)
    real = memopt.profile(model, inputs, real=True, **how)
    for report in (fake, real):
        summed(report)
    assert fake.timeline == real.timeline
    assert fake.kept == real.kept
    assert fake.largest == real.largest
    return fake


class Two(nn.Module):
    """Two linear layers with an exp, which keeps its result, in between."""

    def __init__(self, n: int = 8):
        super().__init__()
        self.a, self.b = nn.Linear(n, 2 * n, bias=False), nn.Linear(2 * n, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).exp())


def test_a_step_counted_by_hand():
    report = both(Two(), torch.randn(3, 8), loss=lambda y: y.sum())
    weights = 2 * 8 * 16 * F4
    # At the end of forward: x (for a's weight), exp's result (for itself and for b's weight).
    assert report.kept == (3 * 8 + 3 * 16) * F4
    assert report.start_by_category == dict.fromkeys(CATEGORIES, 0) | {"parameters": weights, "temporaries": 3 * 8 * F4}
    # The end: nothing but weights, their gradients and the input.
    last = {name: column[-1] for name, column in report.timeline.bytes.items()}
    assert last == dict.fromkeys(CATEGORIES, 0) | {
        "parameters": weights,
        "gradients": weights,
        "temporaries": 3 * 8 * F4,
    }
    assert [name for name, *_ in report.timeline.phases] == ["forward", "backward"]
    tree = {node.path: node.kept for _, node in report.modules.walk()}
    assert tree == {"": 3 * 24 * F4, "a": 0, "b": 0}  # exp is the root's own
    assert report.modules.parameters == weights


def test_optimizer_states_count_before_the_first_step():
    model = Two()
    weights = 2 * 8 * 16 * F4
    optimizer = torch.optim.AdamW(model.parameters())
    report = both(model, torch.randn(3, 8), optimizer=optimizer)
    assert (
        report.start_by_category["optimizer_states"] == 2 * weights + 2 * F4
    )  # two moments, and a count for each weight
    assert not optimizer.state
    assert report.timeline.phases[-1][0] == "optimizer"
    plain = both(model, torch.randn(3, 8), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert plain.start_by_category["optimizer_states"] == 0
    assert both(model, torch.randn(3, 8), train=False, optimizer=optimizer).start_by_category["optimizer_states"] == 0


def test_inference_keeps_nothing():
    report = both(Two(), torch.randn(3, 8), train=False)
    assert report.kept == 0
    assert report.peak_by_category["activations"] == 0
    # b runs: the weights, the input, exp's result and b's own; a's result is gone
    assert report.peak == (2 * 8 * 16 + 3 * 8 + 2 * 3 * 16) * F4


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y.view(-1)[3:].reshape(3, -1).t()
        y += 1
        y.mul_(3).clamp_(min=0)
        return z.unsqueeze(0).expand(5, -1, -1)


def test_views_and_in_place_operations_are_one_storage():
    report = both(Views(), torch.randn(3, 7), train=False)
    assert report.peak == 2 * 21 * F4


class OwnSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tell):
        if tell:
            ctx.save_for_backward(x * 1)
        else:
            ctx.kept = x * 1
        return x * x

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0] if ctx.saved_tensors else ctx.kept
        return 2 * x * g, None


class Custom(nn.Module):
    def __init__(self, tell: bool):
        super().__init__()
        self.linear, self.tell = nn.Linear(8, 8, bias=False), tell

    def forward(self, x: Tensor) -> Tensor:
        return OwnSquare.apply(self.linear(x), self.tell)


@pytest.mark.parametrize("tell", [True, False], ids=["saved", "put aside"])
def test_custom_functions_keep_what_they_save_and_what_they_put_aside(tell):
    report = both(Custom(tell), torch.randn(3, 8))
    assert report.kept == 2 * 3 * 8 * F4  # the input, for the weight, and the copy


class Tower(nn.Module):
    """Blocks of linear and exp, each checkpointed if asked."""

    def __init__(self, depth: int, again: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Two() for _ in range(depth))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return x


def test_checkpointing_keeps_block_inputs_and_recomputes_the_rest():
    x = torch.randn(3, 8)
    plain, again = (both(Tower(4, flag), x) for flag in (False, True))
    assert plain.kept == 4 * 3 * (8 + 16) * F4
    assert again.kept == 4 * 3 * 8 * F4
    # In backward, one block at a time is there again, as activations.
    backward = next((first, end) for name, first, end in again.timeline.phases if name == "backward")
    activations = [
        kept
        for op, kept in zip(again.timeline.ops, again.timeline.bytes["activations"], strict=True)
        if backward[0] <= op < backward[1]
    ]
    assert max(activations) == again.kept + 3 * 16 * F4


def test_saved_tensor_hooks_of_others_count_what_they_keep():
    class Halved(Two):
        def forward(self, x: Tensor) -> Tensor:
            with saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
                return super().forward(x)

    report = both(Halved(), torch.randn(3, 8))
    weight = 8 * 16  # b's is halved as well
    assert report.kept == (3 * 8 + 2 * 3 * 16 + weight) * 2


def test_what_moves_off_the_device_counts_by_tier():
    class Offloaded(Two):
        def forward(self, x: Tensor) -> Tensor:
            def pack(tensor: Tensor) -> Tensor:
                copy = tensor.clone()
                moved(copy, "cpu")
                return copy

            with saved_tensors_hooks(pack, lambda t: t.clone()):
                return super().forward(x)

    report = both(Offloaded(), torch.randn(3, 8))
    assert report.kept == 0
    assert report.off_device == {"cpu": (3 * 8 + 2 * 3 * 16 + 8 * 16) * F4}


def test_an_emptied_storage_counts_nothing_and_counts_again_when_filled():
    with Ledger() as ledger:
        x = torch.zeros(100)
        assert ledger.total == 400
        x.untyped_storage().resize_(0)
        assert ledger.total == 0
        x.untyped_storage().resize_(400)
        assert ledger.total == 400
        y = x[10:]
        del x
        assert ledger.total == 400
        del y
        assert ledger.total == 0
    assert ledger.peak == 400


def test_rounding_counts_whole_blocks():
    with Ledger(rounding=512) as ledger:
        x, y, empty = torch.zeros(1), torch.zeros(129), torch.zeros(0)
        assert ledger.total == 512 + 1024
        del x, y, empty
    assert ledger.total == 0


def test_gradients_that_the_engine_adds_in_place_count_as_such():
    def loss() -> Tensor:
        h = torch.zeros(1000, requires_grad=True) * 1
        return torch.stack([(h * i).sum() for i in range(5)]).sum()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        loss().backward()
    assert sum(event.name == "aten::add_" for event in profiler.events()) == 4  # four sums, without a mode
    with Ledger() as ledger:
        value = loss()
        before = ledger.peak = ledger.total
        value.backward()
        # Beside what forward left: the sum so far and the next gradient (each 1000 floats), and some single numbers.
        assert 8000 <= ledger.peak - before < 8000 + 100
        del value
        assert ledger.total == 0


def test_a_weight_of_two_modules_counts_once():
    report = memopt.profile(ZOO["tied_weights"].build(), ZOO["tied_weights"].inputs(), loss=loss_of)
    model = ZOO["tied_weights"].build()
    assert report.start_by_category["parameters"] == sum(p.numel() * F4 for p in model.parameters())


def test_gradients_of_inputs_and_frozen_weights():
    model = Two()
    model.a.weight.requires_grad_(False)
    report = both(model, torch.randn(3, 8, requires_grad=True))
    last = {name: column[-1] for name, column in report.timeline.bytes.items()}
    assert last["gradients"] == (8 * 16 + 3 * 8) * F4


def test_operations_know_their_modules_also_in_backward():
    model = Two(64)
    with Tracker(model) as tracker:
        with tracker.phase("forward"):
            loss = model(torch.randn(3, 64)).sum()
        with tracker.phase("backward"):
            loss.backward()
    seen = list(zip(tracker.names, tracker.paths, strict=True))
    assert [path for name, path in seen if name == "aten.mm"] == ["a", "b", "b", "b", "a"]
    assert ("aten.exp", "") in seen


def test_skips_are_tensors_that_wait():
    case = ZOO["unet2d"]
    model = case.build()
    report = memopt.profile(model, case.inputs(), loss=loss_of, waits=16)
    made_in = {skip.module.split(".")[0] for skip in report.skips}
    assert "down_blocks" in made_in or "conv_in" in made_in
    first = next(skip for skip in report.skips if skip.module == "conv_in")
    assert first.shape == (2, 32, 6, 10) or first.shape[0] == 2
    assert first.used_by.startswith("up_blocks")
    assert first.waits >= 16
    assert first.born <= first.waits_from < first.waits_until
    assert memopt.profile(Two(), torch.randn(3, 8)).skips == ()


def test_the_profile_of_a_model_that_is_not_there():
    with torch.device("meta"):
        model = Two(512)
        x = torch.empty(3, 512)
    there = memopt.profile(Two(512), torch.randn(3, 512))
    assert memopt.profile(model, x).timeline == there.timeline
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model, x = Two(512), torch.empty(3, 512)
    assert memopt.profile(model, x).timeline == there.timeline


def test_passes_are_profiled_without_being_applied():
    model, x = Tower(4, again=False), torch.randn(3, 8)
    before = type(model.blocks[0])
    plain = memopt.profile(model, x)
    saved = memopt.profile(model, x, passes=["checkpoint"])
    assert saved.passes == ("checkpoint()",)
    assert type(model.blocks[0]) is before
    assert saved.kept < plain.kept
    with memopt.apply(model, ["checkpoint"]) as handle:
        assert memopt.profile(model, x).timeline == saved.timeline
        row = handle.report(x).rows[0]
        assert row.saving is not None
        assert row.saving.kept == (plain.kept, saved.kept)
        assert row.saving.peak == (plain.peak, saved.peak)
        assert f"kept for backward {plain.kept / 1024:.2f} KiB -> {saved.kept} B" in str(handle.report(x))
        assert handle.report().rows[0].saving is None
        assert handle.active
    assert memopt.profile(model, x).timeline == plain.timeline


def test_the_second_pass_saves_on_top_of_the_first():
    model, x = Tower(4, again=False), torch.randn(3, 8)
    handle = memopt.apply(model, ["checkpoint", "amp"])
    rows = handle.report(x).rows
    assert rows[0].saving.peak[1] == rows[1].saving.peak[0]
    assert rows[1].saving.kept[1] == memopt.profile(model, x).kept


def test_nothing_stays_after_an_error():
    enter = saved_tensors_hooks.__enter__
    resize = torch.UntypedStorage.resize_
    hooks = (len(nn_module._global_forward_pre_hooks), len(nn_module._global_forward_hooks))

    class Bad(Two):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("not today")

    for real in (False, True):
        with pytest.raises(InputError, match="not today"):
            memopt.profile(Bad(), torch.randn(3, 8), real=real)
    assert saved_tensors_hooks.__enter__ is enter
    assert torch.UntypedStorage.resize_ is resize
    assert hooks == (len(nn_module._global_forward_pre_hooks), len(nn_module._global_forward_hooks))
    assert active() == ()


def test_an_in_place_change_of_what_is_kept_is_still_an_error():
    model = Two()
    x = torch.randn(3, 8, requires_grad=True)
    with Tracker(model):
        y = x.exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_tracker_keeps_nothing_alive():
    model = Two()
    tracker = Tracker(model)
    with tracker:
        x = torch.randn(3, 8)
        ref = weakref.ref(x)
        loss = model(x).sum()
        loss.backward()
        del x, loss
        gc.collect()
        assert ref() is None


@pytest.mark.parametrize(
    ("inputs", "how", "message"),
    [
        ({"wrong": torch.zeros(3, 8)}, {}, r"Two.forward\(x: .*cannot be called like this: .*'x'|got an unexpected"),
        ((torch.zeros(3, 8), 1), {}, "too many positional arguments"),
        (
            torch.zeros(3, 9),
            {},
            r"Two failed when it was called with 3x9 float32: RuntimeError: .*\(.*test_memory_tracker",
        ),
        (torch.zeros(3, 8, dtype=torch.int64), {}, "Two failed when it was called with 3x8 int64"),
        (torch.zeros(3, 8), {"loss": lambda y: y}, r"the loss must be one number .* it is a tensor of shape \[3, 8\]"),
        (torch.zeros(3, 8), {"loss": lambda y: 1.0}, "it is a float"),
        (torch.zeros(3, 8), {"loss": lambda y: y.detach().sum()}, "does not depend on any parameter"),
        (torch.zeros(3, 8), {"loss": "mse"}, "loss must be a function of the model's output, not a str"),
        (torch.zeros(3, 8), {"device": "tpu"}, "a profile speaks of 'cpu' or 'cuda'"),
        (torch.zeros(3, 8), {"device": "cuda", "real": True}, r"runs where the model is \(cpu\), not on 'cuda'"),
        (torch.zeros(3, 8), {"rounding": -5}, "rounding is a number of bytes, at least 1, not -5"),
        (
            torch.zeros(3, 8),
            {"optimizer": torch.optim.SGD(Two().parameters())},
            "has none of the parameters of this Two",
        ),
        (torch.zeros(3, 8), {"optimizer": "adamw"}, "optimizer must be a torch.optim.Optimizer, not a str"),
    ],
)
def test_bad_input(inputs, how, message):
    with pytest.raises(InputError, match=message):
        memopt.profile(Two(), inputs, **how)


def test_a_model_that_needs_values_says_where():
    case = ZOO["data_dependent"]
    with pytest.raises(MemoptError, match=r"nasty.py:\d+, in forward: .* needs the values of a tensor .*real=True"):
        memopt.profile(case.build(), case.inputs(), loss=loss_of)
    report = memopt.profile(case.build(), case.inputs(), loss=loss_of, real=True)
    summed(report)
    assert report.real
    assert report.kept > 0


def test_a_model_that_cannot_be_copied_says_so():
    model = Two()
    model.lock = threading.Lock()
    with pytest.raises(MemoptError, match=r"Two cannot be copied onto fake tensors: TypeError: .*lock.* real=True"):
        memopt.profile(model, torch.randn(3, 8))
    assert memopt.profile(model, torch.randn(3, 8), real=True).kept > 0


def test_gradients_set_to_zero_live_through_the_next_step():
    class Zeroing(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = False) -> None:
            super().zero_grad(set_to_none=False)

    model, weights = Two(), 2 * 8 * 16 * F4
    report = both(model, torch.randn(3, 8), optimizer=Zeroing(model.parameters(), lr=0.1))
    assert report.start_by_category["gradients"] == weights
    assert all(p.grad is None for p in model.parameters())


def test_devices_and_passes_in_any_form():
    model, x = Tower(2, again=False), torch.randn(3, 8)
    for device in ("cpu", torch.device("cpu"), "cuda:0", torch.device("cuda")):
        assert memopt.profile(model, x, device=device).device == torch.device(device).type
    assert memopt.profile(model, x, passes="checkpoint").passes == ("checkpoint()",)
    assert memopt.profile(model, x, passes={"amp": {}}).passes == ("amp()",)


def test_a_profile_inside_no_grad_and_inference_mode():
    model, x = Two(), torch.randn(3, 8)
    plain = memopt.profile(model, x)
    for around in (torch.no_grad, torch.inference_mode):
        for real in (False, True):
            with around():
                assert memopt.profile(model, x, real=real).timeline == plain.timeline


def test_other_threads_are_not_counted():
    """Hooks on modules and saved tensors hold in all threads."""
    model, x = Two(), torch.randn(3, 8)
    alone = memopt.profile(model, x, real=True)
    stop = threading.Event()

    def work() -> None:
        other, y = Two(128), torch.randn(4, 128)
        while not stop.is_set():
            with saved_tensors_hooks(lambda t: t, lambda t: t):
                other(y).sum().backward()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert memopt.profile(model, x, real=True).timeline == alone.timeline
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_profiles_in_several_threads_leave_nothing_patched():
    enter = saved_tensors_hooks.__enter__
    peaks, x = [], torch.randn(3, 8)

    def work() -> None:
        for _ in range(5):
            peaks.append(memopt.profile(Two(), x).peak)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(peaks) == 15
    assert len(set(peaks)) == 1
    assert saved_tensors_hooks.__enter__ is enter
    assert active() == ()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_tensors_count_all_their_parts():
    with Ledger() as ledger:
        x = torch.eye(10).to_sparse()
        assert ledger.total == 10 * 2 * 8 + 10 * F4
        y = x.to_sparse_csr()
        assert ledger.total > 2 * (10 * 8 + 10 * F4)
        del x, y
    assert ledger.total == 0
    embedding = nn.Embedding(100, 8, sparse=True)
    report = memopt.profile(embedding, torch.tensor([1, 2, 3]), real=True)
    assert {name: column[-1] for name, column in report.timeline.bytes.items()}["gradients"] == 3 * 8 + 3 * 8 * F4
