"""Exact passes where a model does not run alone: in two processes that average gradients, compiled, under autocast.

`test_contract.py` has every pass on every model, in one process. Here passes meet what the people who train put around
a model. All processes are started once and run all settings; what they found is looked at by a test for each.
"""

import contextlib
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import memopt
from memopt import InputError
from memopt.passes import (
    AMP,
    Checkpoint,
    GradAccumulation,
    LeanOps,
    OffloadActivations,
    OffloadOptimizer,
    OffloadSkips,
    OptimizerInBackward,
    SetToNone,
)
from tests.zoo import ZOO, leaves, loss_of, reseeded

WAYS = {
    "lean_ops": [LeanOps(min_bytes=1)],
    "full": [Checkpoint()],
    "cheap": [Checkpoint(policy="cheap")],
    "skips": [Checkpoint(policy="skips")],
    "layer": [Checkpoint(granularity="layer")],
    "nested": [Checkpoint(policy="cheap", granularity="nested")],
    "lean_ops_cheap": [LeanOps(min_bytes=1), Checkpoint(policy="cheap")],
    "offload_activations": [OffloadActivations(min_bytes=1)],
    "together": [
        LeanOps(min_bytes=1),
        Checkpoint(policy="cheap", granularity="nested"),
        OffloadActivations(to="disk", min_bytes=1),
        OffloadSkips(min_bytes=1, waits=2),
        OffloadOptimizer(min_bytes=1),
        SetToNone(),
    ],
}
FEW = ("lean_ops", "full", "nested", "lean_ops_cheap", "offload_activations")


class Half(nn.Module):
    """A layer of a block: norm, activation, dropout, convolution."""

    def __init__(self, width: int, out: int, batch: bool):
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if batch else nn.GroupNorm(2, width)
        self.drop, self.conv = nn.Dropout(0.2), nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.drop(F.silu(self.norm(x))))


class Block(nn.Module):
    """Two layers and a residual; takes a dict by keyword."""

    def __init__(self, width: int, out: int, batch: bool = False):
        super().__init__()
        self.first, self.second, self.skip = Half(width, out, batch), Half(out, out, False), nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor, *, options: dict) -> Tensor:
        return self.skip(x) + options["scale"] * self.second(self.first(x))


class Level(nn.Module):
    """Blocks at one resolution: what policy `skips` takes whole."""

    def __init__(self, *blocks: Block):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *, options: dict) -> Tensor:
        for block in self.blocks:
            x = block(x, options=options)
        return x


class Net(nn.Module):
    """A UNet with a frozen stem, a block that is shared, a branch that not all take, and one that nobody takes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()).requires_grad_(False)
        self.down = nn.ModuleList([Level(Block(4, 4, batch=True), Block(4, 8)), Level(Block(8, 8))])
        shared = Block(8, 8)
        self.middle = nn.ModuleList([shared, Block(8, 8, batch=True), shared])
        self.up = nn.ModuleList([Level(Block(16, 8)), Level(Block(16, 4, batch=True))])
        self.branches = nn.ModuleDict({"some": Block(4, 4), "none": Block(4, 4)})
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, batch: dict, *, options: dict) -> dict:
        x, skips = self.stem(batch["image"]), []
        for level in self.down:
            skips.append(level(x, options=options))
            x = F.avg_pool2d(skips[-1], 2)
        for block in self.middle:
            x = block(x, options=options)
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], dim=1), options=options)
        if options["branch"] in self.branches:
            x = self.branches[options["branch"]](x, options=options)
        return {"prediction": self.head(x), "aux": [(x.mean(dim=(2, 3)), None), {"count": len(skips)}]}


@dataclass(frozen=True)
class Setting:
    """What a model is and what is put around it."""

    build: Callable[[], nn.Module] = lambda: reseeded(5, Net)
    inputs: Callable[[int], tuple] = lambda rank: net_inputs(rank, "some" if rank else "")
    """Arguments by position and by keyword, of a process."""
    parallel: dict = field(default_factory=lambda: {"find_unused_parameters": True})
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """What forward runs in."""
    accumulate: int = 1
    """Backwards for each step; only the last one averages."""
    ways: tuple[str, ...] = FEW


def net_inputs(rank: int, branch: str) -> tuple:
    generator = torch.Generator().manual_seed(rank)
    image = torch.randn(4, 3, 8, 8, generator=generator, requires_grad=True)
    return ({"image": image},), {"options": {"scale": 0.5, "branch": branch}}


def of_zoo(name: str) -> Setting:
    """A model of the zoo; each process has other inputs."""

    def changed(value, rank):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (value.detach() * (1 + rank)).requires_grad_(value.requires_grad)
        if isinstance(value, dict):
            return {key: changed(item, rank) for key, item in value.items()}
        return type(value)(changed(item, rank) for item in value) if isinstance(value, (tuple, list)) else value

    return Setting(ZOO[name].build, lambda rank: changed(ZOO[name].inputs(), rank))


SETTINGS = {
    "unused branches": Setting(ways=tuple(WAYS)),
    "autocast": Setting(around=lambda: torch.autocast("cpu", torch.bfloat16), ways=tuple(WAYS)),
    "accumulation": Setting(accumulate=2),
    "bucket views": Setting(parallel={"find_unused_parameters": True, "gradient_as_bucket_view": True}),
    "static graph": Setting(inputs=lambda rank: net_inputs(rank, "some"), parallel={"static_graph": True}),
    **{name: of_zoo(name) for name in ("nested_io", "shared_called", "frozen_stem", "data_dependent", "tied_weights")},
    **{name: of_zoo(name) for name in ("generator_dropout", "running_stats", "inplace_input", "own_autocast")},
}
CASES = [(name, way) for name, setting in SETTINGS.items() for way in setting.ways]


def steps_of(model: nn.Module, run: nn.Module, setting: Setting, rank: int, optimizer: torch.optim.Optimizer) -> list:
    """What two training steps give: losses, gradients, buffers, states of generators, weights."""
    results = []
    for step in range(2):
        optimizer.zero_grad()
        found = {}
        for part in range(setting.accumulate):
            last = part == setting.accumulate - 1
            torch.manual_seed(100 * rank + 10 * step + part)
            args, kwargs = setting.inputs(rank)
            parallel = isinstance(run, DistributedDataParallel)
            with contextlib.nullcontext() if last or not parallel else run.no_sync():
                with setting.around():
                    loss = loss_of(run(*args, **kwargs))
                loss.backward()
            found[f"loss {part}"] = loss.detach()
            given = [leaf for leaf in leaves((args, kwargs)) if leaf.requires_grad]
            found |= {f"input {i} of {part}": leaf.grad for i, leaf in enumerate(given)}
        found |= {f"gradient of {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
        for path, module in model.named_modules():
            own = {n: v for n, v in vars(module).items() if isinstance(v, torch.Generator)}
            found |= {f"generator {path}.{n}": v.get_state() for n, v in own.items()}
        optimizer.step()
        found |= {f"weight {n}": p.detach().clone() for n, p in model.named_parameters()}
        results.append(found)
    return results


def differing(a: list, b: list) -> list[str]:
    """Where two such results are not equal, bit for bit."""
    return [
        f"step {i}: {name}"
        for i, (x, y) in enumerate(zip(a, b, strict=True))
        for name in x.keys() | y.keys()
        if (x[name] is None) != (y[name] is None) or (x[name] is not None and not torch.equal(x[name], y[name]))
    ]


def counted(model: nn.Module) -> list[str]:
    """Fills with the names of convolutions and linear layers as they run."""
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


def outcome(setting: Setting, passes: list, rank: int, parallel: bool = True) -> tuple[list, dict]:
    """What a model with passes gives in this process, and what shows that they did something."""
    model = setting.build()
    ran = counted(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    handle = memopt.apply(model, passes, optimizer=optimizer) if passes else None
    run = DistributedDataParallel(model, **setting.parallel) if parallel else model
    results = steps_of(model, run, setting, rank, optimizer)
    counts = {} if handle is None else {row.name: dict(row.counts) for row in handle.report().rows}
    return results, {"ran": len(ran), "counts": counts}


def quiet() -> nn.Module:
    """Without what depends on which samples are in a part of a batch."""
    model = reseeded(5, Net).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def quiet_inputs(rank: int) -> tuple:
    (batch,), options = net_inputs(rank, "some" if rank else "")
    return ({"image": batch["image"].detach().double().requires_grad_()},), options


def work(rank: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 2)
    limit = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    found: dict = {}
    for name, setting in SETTINGS.items():
        plain, evidence = outcome(setting, [], rank)
        alone, _ = outcome(setting, [], rank, parallel=False)
        found[name] = {"plain": plain, "ran": evidence["ran"], "alone": differing(plain, alone)}
        for way in setting.ways:
            try:
                results, evidence = outcome(setting, WAYS[way], rank)
            except Exception as error:
                raise RuntimeError(f"{name} with {way}") from error  # ends the other process, too
            found[name, way] = {"differs": differing(plain, results), **evidence}
    found["amp"] = differing(found["unused branches"]["plain"], outcome(Setting(), [AMP()], rank)[0])
    parts = Setting(quiet, quiet_inputs)
    found["parts"] = [outcome(parts, passes, rank)[0] for passes in ([], [GradAccumulation()])]
    model = Net()
    try:
        memopt.apply(model, [OptimizerInBackward()], optimizer=torch.optim.SGD(model.parameters(), 0.1))
    except InputError as error:
        found["refused"] = str(error)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.barrier()  # gloo may abort a process whose partner is gone
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes found."""
    folder = str(tmp_path_factory.mktemp("processes"))
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("name", "way"), CASES, ids=[f"{name}-{way}" for name, way in CASES])
def test_two_processes_are_bitwise_those_without_passes(processes, name, way):
    for found in processes:
        assert found[name, way]["differs"] == [], "\n".join(found[name, way]["differs"])
        ran, plain, counts = found[name, way]["ran"], found[name]["ran"], found[name, way]["counts"]
        if any(isinstance(p, Checkpoint) for p in WAYS[way]):
            assert ran > plain  # some of it ran again
        else:
            assert ran == plain
            assert all(counts[p.name] for p in WAYS[way]), counts


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_compared_is_what_two_processes_give(processes, name):
    """They average, are given other inputs, and leave out the same parameters."""
    first, second = (found[name]["plain"] for found in processes)
    shared = [key for key in first[0] if key.startswith("gradient") and first[0][key] is not None]
    assert len(shared) > 4
    assert all(torch.equal(first[0][key], second[0][key]) for key in shared)
    assert not torch.equal(first[0]["loss 0"], second[0]["loss 0"])
    for found in processes:
        assert {f"step 0: {key}" for key in shared} & set(found[name]["alone"])


def test_unused_parameters_of_one_process_and_of_all(processes):
    for found in processes:
        gradients = found["unused branches"]["plain"][0]
        assert gradients["gradient of branches.some.skip.weight"].any()
        assert gradients["gradient of branches.none.skip.weight"] is None
        assert gradients["gradient of stem.0.weight"] is None


def test_a_pass_that_is_not_exact_shows(processes):
    assert all("step 0: gradient of head.weight" in found["amp"] for found in processes)


def test_parts_of_batches_in_two_processes_agree_to_rounding(processes):
    for found in processes:
        for plain, parts in zip(*found["parts"], strict=True):
            assert plain.keys() == parts.keys()
            for key in plain:
                if key.startswith("gradient") and plain[key] is not None:
                    torch.testing.assert_close(parts[key], plain[key], rtol=1e-9, atol=1e-14)


def test_steps_in_backward_are_refused_in_two_processes(processes):
    for found in processes:
        assert "optimizer_in_backward: 2 processes train together" in found["refused"]


# torch.compile


def compiled(setting: Setting, passes: list, fullgraph: bool = True) -> list:
    """What two steps of a compiled model give."""
    torch.compiler.reset()
    model = setting.build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if passes:
        memopt.apply(model, passes, optimizer=optimizer)
    try:
        run = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
        return steps_of(model, run, setting, 0, optimizer)
    finally:
        torch.compiler.reset()


def eagerly(setting: Setting) -> list:
    model = setting.build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return steps_of(model, model, setting, 0, optimizer)


COMPILED = {
    "net": Setting(ways=("nested",)),
    "net under autocast": Setting(around=SETTINGS["autocast"].around, ways=("lean_ops_cheap",)),
    **{name: of_zoo(name) for name in ("nested_io", "shared_listed", "frozen_stem", "inplace_input", "batch_norm")},
}
UNTOUCHED: dict[str, list] = {}


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, setting in COMPILED.items() for way in setting.ways])
def test_compiled_models_are_bitwise_those_without_passes(name, way):
    setting = COMPILED[name]
    if name not in UNTOUCHED:
        UNTOUCHED[name] = compiled(setting, [])
    assert differing(UNTOUCHED[name], compiled(setting, WAYS[way])) == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in compile
@pytest.mark.parametrize("way", ["full", "nested", "lean_ops_cheap"])
@pytest.mark.parametrize("name", ["generator_dropout", "running_stats", "power_iteration", "data_dependent"])
def test_what_a_compiled_recomputation_would_not_find_again(name, way):
    """Generators, and buffers that forward writes and reads: such blocks are left to the model without a compiler."""
    setting = of_zoo(name)
    assert differing(eagerly(setting), compiled(setting, WAYS[way], fullgraph=False)) == []


@pytest.mark.parametrize("policy", ["full", "cheap"])
def test_buffers_that_forward_replaces_leave_their_memory_to_nobody(policy):
    """What gets the memory of a buffer would be taken for it, and be decided on otherwise when it is computed again."""
    setting = of_zoo("running_stats")
    plain, model = setting.build(), setting.build()
    memopt.apply(model, [LeanOps(min_bytes=1), Checkpoint(policy=policy)])
    for seed in range(10):
        gradients = []
        for each in (plain, model):
            torch.manual_seed(seed)
            each.zero_grad()
            loss_of(each(torch.randn(2, 9, 7))).backward()
            gradients.append([p.grad for p in each.parameters()])
        assert all(map(torch.equal, *gradients))
