"""Plans: inside their budgets on true tensors, exact, deterministic, never slower for more memory, readable as text."""

import copy
import itertools
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import memopt
from memopt import passes as P
from memopt.errors import DoesNotFit
from memopt.hardware import KNOWN, Hardware
from memopt.memory import limit
from memopt.planning import Plan, search
from memopt.planning.costs import LOOKS, BlockCosts, StepCosts
from memopt.planning.pareto import compare
from memopt.planning.solve import Program
from tests.nets import Block

SHARES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.35)


class Deep(nn.Module):
    """Blocks of several kinds, whose activations are most of a step's memory."""

    def __init__(self, width=32, count=16):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            Block(width) if i % 2 else nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())
            for i in range(count)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made(rows=2000, **how):
    torch.manual_seed(0)
    model = Deep(**how)
    return model, torch.randn(rows, 8), torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(output):
    return output.square().mean()


@pytest.fixture(scope="module")
def deep():
    model, x, optimizer = made()
    return model, x, optimizer, search(model, x, loss=loss_of, optimizer=optimizer, hardware="a100")


def gradients(model, x):
    loss = loss_of(model(x))
    loss.backward()
    found = [loss.detach()] + [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("share", SHARES)
def test_a_step_stays_inside_its_budget_and_exact(deep, share):
    model, x, optimizer, plans = deep
    budget = int(share * plans.plain().peak)
    plan = plans.plan(budget)
    assert plan.exact
    assert plan.peak <= budget
    real = memopt.profile(model, x, loss=loss_of, optimizer=optimizer, passes=plan.passes, real=True)
    assert real.peak <= budget
    assert abs(plan.peak / real.peak - 1) < 0.03
    before = gradients(model, x)
    with memopt.apply(model, plan, optimizer=optimizer):
        gradients(model, x)  # the first call learns, and takes more
        with limit(budget, model, optimizer, x):
            loss_of(model(x)).backward()
        model.zero_grad()
        for a, b in zip(before, gradients(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_more_memory_is_never_slower(deep):
    *_, plans = deep
    plain = plans.plain()
    found = [plans.plan(int(share * plain.peak)) for share in SHARES]
    times = [plan.seconds for plan in found]
    assert times == sorted(times)
    assert plans.plan(plain.peak).passes == ()
    assert plans.plan(plain.peak).seconds == plain.seconds <= times[0]


def test_the_same_again(deep):
    model, x, optimizer, plans = deep
    budget = plans.plain().peak // 2
    again = search(model, x, loss=loss_of, optimizer=optimizer, hardware="a100")
    assert again.plan(budget) == again.plan(budget)
    assert again.plan(budget).passes == plans.plan(budget).passes


def test_what_leaves_a_cpu_goes_to_files():
    model, x, optimizer = made(rows=20000)
    near = {"flops": 1e9, "narrow_flops": 1e9, "bandwidth": 1e9, "link": 1e12}  # to move is faster than to recompute
    plans = search(model, x, loss=loss_of, optimizer=optimizer, hardware=near)
    found = plans.plan(int(0.7 * plans.plain().peak)).passes
    assert {p.to for p in found if isinstance(p, P.OffloadActivations)} == {"disk"}
    gpu = search(model, x, loss=loss_of, optimizer=optimizer, hardware=near, device="cuda")
    found = gpu.plan(int(0.7 * gpu.plain().peak)).passes
    assert {p.to for p in found if isinstance(p, P.OffloadActivations)} == {"cpu"}


def test_states_that_are_away_come_back_by_pieces():
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(8)])  # 32 MiB, twice that of states, nearly no batch
    x, optimizer = torch.randn(8, 1024), torch.optim.AdamW(model.parameters())
    plans = search(model, x, loss=loss_of, optimizer=optimizer, hardware="a100", device="cuda")
    budget = int(0.7 * plans.plain().peak)  # 128 MiB for weights, gradients and states; 64 MiB without any states
    (shelved,) = (p for p in plans.plan(budget).passes if isinstance(p, P.OffloadOptimizer))
    assert shelved.at_once == "4MiB"


def test_what_was_given_stays_and_plain_is_without_it():
    model, x, optimizer = made()
    bare = memopt.profile(model, x, loss=loss_of, optimizer=optimizer).peak
    lean = memopt.profile(model, x, loss=loss_of, optimizer=optimizer, passes=["lean_ops"]).peak
    plans = search(model, x, loss=loss_of, optimizer=optimizer, hardware="a100", passes=["lean_ops"])
    plan = plans.plan((bare + lean) // 2)
    assert plan.passes == (P.LeanOps(),)
    assert (plan.plain_peak, plan.peak) == (bare, lean)
    assert plan.seconds > plan.plain_seconds
    assert " without passes is above the budget" in plan.reasons[0]
    assert " with lean_ops is within the budget" in plan.reasons[1]
    first, second, *_ = compare(plans)
    assert (first.name, first.peak) == ("no passes", bare)
    assert (second.name, second.peak) == ("lean_ops, as given", lean)


def test_blocks_are_treated_one_by_one(deep):
    *_, plans = deep
    plan = plans.plan(int(0.75 * plans.plain().peak))
    treated = [set(p.blocks) for p in plan.passes if isinstance(p, (P.Checkpoint, P.OffloadActivations)) and p.blocks]
    assert treated
    assert all(not a & b for a, b in itertools.combinations(treated, 2))
    assert set().union(*treated) < {f"blocks.{i}" for i in range(16)}


def test_on_slow_links_nothing_is_moved():
    model, x, optimizer = made()
    slow = {"flops": 1e12, "narrow_flops": 1e12, "bandwidth": 1e11, "link": 1e6}
    plan = memopt.plan(model, x, "12MiB", loss=loss_of, optimizer=optimizer, hardware=slow)
    assert plan.passes
    assert not any(isinstance(p, P.OffloadActivations) for p in plan.passes)


def test_what_python_does_for_a_pass_takes_time():
    model, x, optimizer = made()
    lasts = Hardware(name="Python alone", flops=1e30, narrow_flops=1e30, bandwidth=1e30, link=1e30, look=1.0)
    plans = search(model, x, loss=loss_of, optimizer=optimizer, hardware=lasts)
    two = P.Checkpoint(blocks=("blocks.1", "blocks.3"))

    def looks(*passes):
        return round(plans.look(passes).seconds)

    assert looks() == 0
    inside, everywhere = looks(two) // LOOKS["full"], looks(P.LeanOps()) // LOOKS["lean_ops"]
    assert looks(two) == inside * LOOKS["full"]
    assert 0 < inside < everywhere
    cheap = looks(P.Checkpoint(blocks=two.blocks, policy="cheap"))  # also at what it puts aside
    assert inside * LOOKS["cheap"] <= cheap < 2 * inside * LOOKS["cheap"]
    again = inside * LOOKS["lean_ops"]  # in the second forward of full checkpoints
    assert looks(P.LeanOps(), two) >= looks(P.LeanOps()) + looks(two) + again
    assert looks(P.Checkpoint()) == looks(P.Checkpoint(blocks=tuple(plans.blocks)))


def test_applied_by_name():
    model, x, optimizer = made()
    with memopt.apply(model, "auto", inputs=x, budget="12MiB", loss=loss_of, optimizer=optimizer, hardware="t4") as h:
        assert h.passes
    with pytest.raises(memopt.InputError, match=r"passes='auto' needs budget, as memopt\.plan does"):
        memopt.apply(model, "auto", inputs=x)
    with pytest.raises(memopt.InputError, match="budget: only with passes='auto'"):
        memopt.apply(model, [P.Checkpoint()], budget="12MiB")


def test_a_forward_fits_too():
    model, x, _ = made(rows=100)
    plain = memopt.profile(model, x, train=False)
    plan = memopt.plan(model, x, plain.peak - 1, train=False, hardware="a100")
    real = memopt.profile(model, x, train=False, passes=plan.passes, real=True)
    assert real.peak <= plan.peak < plain.peak


class TestDoesNotFit:
    def test_says_what_would(self):
        model, x, optimizer = made()
        with pytest.raises(DoesNotFit) as error:
            memopt.plan(model, x, "10KiB", loss=loss_of, optimizer=optimizer, hardware="a100")
        text = str(error.value)
        assert "no plan fits 10.00 KiB. The smallest budget that one fits is " in text
        assert "It is held by" in text
        assert "the largest tensors: " in text
        assert "Not exact, if allowed: amp lowers it to" in text
        assert text.endswith("a smaller batch or microbatch.")
        smallest = int(float(text.partition("one fits is ")[2].partition(" MiB")[0]) * 2**20) + 2**14
        assert memopt.plan(model, x, smallest, loss=loss_of, optimizer=optimizer, hardware="a100").peak <= smallest

    def test_what_is_not_exact_only_if_allowed(self):
        model, x, optimizer = made()
        plans = search(model, x, loss=loss_of, optimizer=optimizer, hardware="a100")
        floor = plans.smallest().peak
        with pytest.raises(DoesNotFit):
            plans.plan(int(0.85 * floor))
        allowed = search(model, x, loss=loss_of, optimizer=optimizer, hardware="a100", allow=("amp",))
        plan = allowed.plan(int(0.85 * floor))
        assert not plan.exact
        assert P.AMP() in plan.passes
        assert "changes: " in str(plan)
        assert allowed.plan(floor).exact  # where exact ones suffice

    @pytest.mark.parametrize("allow", ["lossy", ("exact", "checkpoint")])
    def test_unknown_leave(self, allow):
        with pytest.raises(memopt.InputError, match="a plan can be allowed exact, amp, optimizer_8bit"):
            memopt.plan(nn.Linear(2, 2), torch.randn(1, 2), "1GiB", allow=allow, hardware="a100")


class TestText:
    def test_there_and_back(self, deep, tmp_path):
        model, *_, plans = deep
        plan = plans.plan(plans.plain().peak // 2)
        plan.save(tmp_path / "plan.toml")
        assert Plan.load(tmp_path / "plan.toml") == plan
        with memopt.apply(model, Plan.load(tmp_path / "plan.toml"), optimizer=plans.work.optimizer) as handle:
            assert handle.passes == plan.passes

    def test_changed_by_hand(self, deep, tmp_path):
        *_, plans = deep
        file = tmp_path / "plan.toml"
        plans.plan(plans.plain().peak).save(file)
        file.write_text(file.read_text() + '\n[[passes]]\nname = "checkpoint"\nblocks = ["blocks.1", "blocks.[23]"]\n')
        assert Plan.load(file).passes == (P.Checkpoint(blocks=("blocks.1", "blocks.[23]")),)
        file.write_text(file.read_text().replace("checkpoint", "checkpiont"))
        with pytest.raises(
            memopt.InputError, match=r"plan\.toml: unknown pass 'checkpiont'. Did you mean 'checkpoint'"
        ):
            Plan.load(file)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("passes = [", "cannot be read as a plan"),
            ("schema = 1", "is no whole plan: KeyError: 'model'"),
            ("schema = 2", "has plan schema 2; this memopt reads schema 1"),
            ("", "is no whole plan: KeyError: 'schema'"),
        ],
    )
    def test_what_is_no_plan(self, tmp_path, text, message):
        (tmp_path / "plan.toml").write_text(text)
        with pytest.raises(memopt.InputError, match=message):
            Plan.load(tmp_path / "plan.toml")
        with pytest.raises(memopt.InputError, match="cannot be read as a plan"):
            Plan.load(tmp_path / "missing.toml")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: nn.Linear(8, 1), "it is a Linear, the plan is for a Deep"),
            (lambda m: Deep(count=15), "block blocks.15 is not there, in the plan it is a Block"),
            (lambda m: Deep(count=17), "it has a block blocks.16, of which the plan does not know"),
            (lambda m: Deep(width=16), r"it has [\d,]+ parameters, the plan is for [\d,]+"),
        ],
    )
    def test_another_model_is_refused(self, deep, change, message):
        model, *_, plans = deep
        plan = plans.plan(plans.plain().peak)
        other = change(model)
        with pytest.raises(memopt.InputError, match=f"this plan does not fit the model: {message}"):
            memopt.apply(other, plan)
        memopt.apply(copy.deepcopy(model), plan).undo()


def test_a_model_with_passes_is_planned_without(deep):
    model, x, _ = made(rows=10)
    with (
        memopt.apply(model, [P.Checkpoint()]),
        pytest.raises(memopt.InputError, match=r"the model has passes applied \(checkpoint\(\)\): undo them"),
    ):
        memopt.plan(model, x, "1GiB", hardware="a100")
    plan = memopt.plan(model, x, "1GiB", hardware="a100", passes=["checkpoint"])
    assert plan.passes == (P.Checkpoint(),)


def test_many_blocks_need_few_profiles():
    model, x, optimizer = made(rows=200, count=40)
    plans = search(model, x, loss=loss_of, optimizer=optimizer, hardware="a100")
    plain = plans.plain()
    plan = plans.plan(int(0.7 * plain.peak))
    assert plan.peak <= 0.7 * plain.peak
    assert plans.profiles <= 16


class Mixed(nn.Module):
    """What hypothesis makes of a list of layers."""

    def __init__(self, kinds, width):
        super().__init__()
        make = {
            "mlp": lambda: Block(width),
            "norm": lambda: nn.Sequential(nn.LayerNorm(width), nn.SiLU()),
            "linear": lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU()),
            "drop": lambda: nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5)),
            "batch": lambda: nn.Sequential(nn.BatchNorm1d(width), nn.GELU()),
        }
        self.blocks = nn.ModuleList(make[kind]() for kind in kinds)

    def forward(self, x):
        kept = []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return x + sum(kept[::2])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    kinds=st.lists(st.sampled_from(["mlp", "norm", "linear", "drop", "batch"]), min_size=1, max_size=4),
    width=st.sampled_from([4, 16]),
    rows=st.integers(2, 300),
    share=st.floats(0.3, 0.95),
)
def test_whatever_is_planned_is_inside_and_exact(kinds, width, rows, share):
    torch.manual_seed(1)
    model, x = Mixed(kinds, width), torch.randn(rows, width)
    if not any(True for _ in model.parameters()):
        return
    plans = search(model, x, hardware="a100")
    budget = int(share * plans.plain().peak)
    try:
        plan = plans.plan(budget)
    except DoesNotFit:
        return
    real = memopt.profile(model, x, passes=plan.passes, real=True)
    assert real.peak <= budget

    def run():
        torch.manual_seed(2)
        loss = model(x).square().mean()
        loss.backward()
        found = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        model.zero_grad()
        return found

    plain = run()
    with memopt.apply(model, plan):
        for a, b in zip(plain, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class TestProgram:
    @staticmethod
    def step(blocks, moments):
        return StepCosts(0, sum(b.seconds for b in blocks), tuple(blocks), moments, None)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_no_choice_is_faster(self, data):
        count = data.draw(st.integers(1, 4))
        sizes = st.integers(0, 100)
        names = ("keep", "cheap", "full")
        steps = {}
        for name in names:
            blocks = [
                BlockCosts(data.draw(sizes), data.draw(st.integers(1, 50)) + (0 if name == "keep" else 50))
                for _ in range(count)
            ]
            moments = {("backward", i, tuple(range(i))): data.draw(sizes) for i in range(count)}
            steps[name] = self.step(blocks, moments | {("optimizer", -1, ()): 10})
        budget = data.draw(st.integers(10, 300))

        def peak(choice):
            most = 10
            for i in range(count):
                kept = sum(steps[choice[j]].blocks[j].kept for j in range(i))
                most = max(most, steps[choice[i]].moments["backward", i, tuple(range(i))] + kept)
            return most

        fitting = [c for c in itertools.product(names, repeat=count) if peak(c) <= budget]
        best = min((sum(steps[n].blocks[i].seconds for i, n in enumerate(c)) for c in fitting), default=None)
        program = Program(steps)
        found = program.solve(budget)
        if best is None:
            assert found is None
            assert program.greedy(budget) is None
            return
        assert found.peak == peak(found.treatments) <= budget
        assert found.seconds <= best * 1.002
        greedy = program.greedy(budget)
        assert greedy is None or peak([names[o] for o in greedy]) <= budget

    def test_without_scipy_it_is_greedy(self, deep, monkeypatch):
        model, x, optimizer, _ = deep
        monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
        plans = search(model, x, loss=loss_of, optimizer=optimizer, hardware="a100")
        assert plans.plan(plans.plain().peak // 2).peak <= plans.plain().peak // 2


class TestHardware:
    def test_by_name_and_by_figures(self):
        assert KNOWN["h100"].narrow_flops > KNOWN["a100"].narrow_flops > KNOWN["t4"].narrow_flops
        with pytest.raises(memopt.InputError, match="unknown hardware 'abacus': choose one of a100"):
            memopt.plan(nn.Linear(2, 2), torch.randn(1, 2), "1GiB", hardware="abacus")
        with pytest.raises(memopt.InputError, match="hardware has no option 'speed'"):
            memopt.plan(nn.Linear(2, 2), torch.randn(1, 2), "1GiB", hardware={"speed": 1})
        with pytest.raises(memopt.InputError, match="link must be positive"):
            Hardware(name="cut off", flops=1, narrow_flops=1, bandwidth=1, link=0)
        with pytest.raises(memopt.InputError, match="look must not be negative"):
            Hardware(name="ahead", flops=1, narrow_flops=1, bandwidth=1, link=1, look=-1)

    def test_measured_once(self, tmp_path, monkeypatch):
        from memopt import hardware

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        first = hardware.hardware_for(None, "cpu")
        assert first.flops > 1e8
        assert first.bandwidth > 1e7
        assert not first.overlap
        assert 0 < first.launch < 1e-2
        assert 0 < first.look < 1e-3
        monkeypatch.setattr(hardware, "measure", None)
        assert hardware.hardware_for(None, "cpu") == first
        (tmp_path / "memopt" / "hardware.json").write_text("{")
        monkeypatch.setattr(hardware, "measure", lambda device, name: first)
        assert hardware.hardware_for(None, "cpu") == first  # measured anew

    def test_what_watches_is_not_measured(self):
        from memopt import hardware

        class Slow(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                time.sleep(0.01)
                return func(*args, **(kwargs or {}))

        with limit("64KiB"), Slow():
            assert hardware.measure("cpu", "this").launch < 5e-3

    def test_nowhere_to_write(self, tmp_path, monkeypatch):
        from memopt import hardware

        assert hardware.measure("cpu", "this").link > 1e6
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
        assert hardware.measure("cpu", "this").link == 1

    def test_copies_beside_the_computation_are_nearly_free(self):
        fast = KNOWN["a100"]
        assert fast.exposed(0, 1.0) == 0
        assert 0 < fast.exposed(int(fast.link / 2), 1.0) < 0.06
        assert fast.exposed(int(3 * fast.link), 1.0) == pytest.approx(2.0)


def test_the_work_of_operations():
    from memopt.memory.cost import Cost, cost_of

    a, b = torch.randn(3, 5), torch.randn(5, 7)
    aten = torch.ops.aten
    assert cost_of(aten.mm.default, (a, b), {}, a @ b) == Cost(2 * 3 * 5 * 7, 0, 4 * (15 + 35 + 21), 1)
    half = a.half(), b.half()
    assert cost_of(aten.mm.default, half, {}, half[0] @ half[1]).narrow == 2 * 3 * 5 * 7
    assert cost_of(aten.t.default, (a,), {}, a.t()) == Cost()
    wide = torch.randn(1, 5).expand(3, 5)
    assert cost_of(aten.add.Tensor, (a, wide), {}, a).bytes == 4 * (15 + 5 + 15)


def test_the_work_of_attention_on_a_cpu():
    from memopt.memory.cost import cost_of

    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, sums = forward(q, k, v)
    product = 2 * (2 * 3) * 5 * 7 * 8
    assert cost_of(forward, (q, k, v), {}, (out, sums)).flops == 2 * product
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    args = (out, q, k, v, out, sums, 0.0, False)
    assert cost_of(backward, args, {}, backward(*args)).flops == 5 * product  # the scores are made again
