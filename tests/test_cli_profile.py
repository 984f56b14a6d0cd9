"""``memopt profile`` and ``memopt max-batch``: what they print and write, and how they fail."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import memopt
from memopt.cli import main
from memopt.errors import DoesNotFit, InputError
from memopt.estimate import at_batch, profile_recipe
from memopt.memory import MemoryReport, limit, max_batch
from memopt.memory.ledger import Ledger
from memopt.recipe import load_recipe
from memopt.training import Trainer
from tests.test_cli import HAE, brats, fails
from tests.training_jobs import ROOT, TINY

NET = "tests.nets:Net"
SMALL = ["--set", "model_channels=32", "image_size=16", "channel_mult=1,1", "attention_resolutions=2"]
"""A small HAE."""


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def report(capsys, tmp_path, *arguments):
    run(capsys, "profile", *arguments, "--json", tmp_path / "report.json")
    return MemoryReport.load(tmp_path / "report.json")


@pytest.fixture
def tiny():
    return load_recipe(TINY)


@pytest.fixture
def hae():
    return load_recipe(HAE)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_the_quickstart_is_profiled_without_its_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["--json", "r.json", "--plot", "r.png", "--html", "r.html"]
    text = run(capsys, "profile", HAE, "--device", "cpu", *files)
    assert text.startswith("HAEUNetModelV2: training step on cpu, computed on fake tensors; inputs: image=16x")
    for part in ("Peak ", "at the peak", "Kept for backward: ", "Largest tensors", "Skip connections", "wrote r.json"):
        assert part in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json", "r.png"]  # no data was prepared
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
    found = MemoryReport.load("r.json")
    assert found.passes == ("outer_product()",)
    assert found.peak == sum(found.peak_by_category.values()) > 80 << 20
    assert found.seconds < 30
    run(capsys, "profile", HAE, "--device", "cpu", "--passes", "", "--json", "plain.json")
    plain = MemoryReport.load("plain.json")
    assert plain.passes == ()
    assert plain.peak > found.peak
    assert plain.kept > found.kept


def test_the_keys_of_the_json_are_stable(tmp_path, capsys):
    run(capsys, "profile", TINY, "--device", "cpu", "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["schema"] == 1
    keys = "model train device real inputs passes rounding peak peak_point peak_phase peak_op peak_module \
        peak_by_category start_by_category kept off_device largest modules skips timeline assumptions seconds"
    assert {*keys.split(), "schema"} <= found.keys()
    assert found["peak_by_category"].keys() == set(memopt.memory.CATEGORIES)
    assert {"ops", "bytes", "total", "phases"} <= found["timeline"].keys()
    assert {"path", "type", "kept", "own", "parameters", "children"} <= found["modules"].keys()
    assert {"bytes", "shape", "dtype", "category", "op", "module", "phase"} <= found["largest"][0].keys()


def test_checkpoint_lowers_peak_and_kept_and_a_batch_scales(tmp_path, capsys):
    at = {
        size: report(capsys, tmp_path, HAE, "--device", "cpu", "--batch-size", size, *SMALL, "--infer")
        for size in (2, 4, 8)
    }
    assert at[4].peak - at[2].peak > 0
    assert at[8].peak - at[4].peak == 2 * (at[4].peak - at[2].peak)
    assert at[8].kept == at[8].start_by_category["optimizer_states"] == 0
    plain = report(capsys, tmp_path, HAE, "--device", "cpu", *SMALL)
    less = report(capsys, tmp_path, HAE, "--device", "cpu", *SMALL, "--passes", "checkpoint")
    assert less.peak < plain.peak
    assert less.kept < 0.7 * plain.kept
    assert less.passes == ("checkpoint()",)


def test_infer_counts_a_forward_only(tmp_path, capsys):
    found = report(capsys, tmp_path, TINY, "--device", "cpu", "--infer", "--set", "microbatch=2")
    assert [name for name, _, _ in found.timeline.phases] == ["forward"]
    assert found.kept == found.peak_by_category["gradients"] == found.peak_by_category["optimizer_states"] == 0


def test_the_moving_average_counts(tiny):
    base = dataclasses.replace(tiny.presets["small"], width=64)
    model = tiny.model(base)
    parameters = sum(p.nbytes for p in model.parameters())

    def profiled(device, **changes):
        return profile_recipe(tiny, dataclasses.replace(base, **changes), device=device)

    def states(found):
        return found.start_by_category["optimizer_states"]

    with_average, without = profiled("cpu"), profiled("cpu", ema_decay=None)
    counter = AveragedModel(model).n_averaged.nbytes
    assert states(with_average) - states(without) == parameters + counter
    assert with_average.peak - without.peak == parameters + counter
    # On the CPU the average shares the memory wherever it is said to live; a GPU is spared it.
    assert states(profiled("cpu", ema_device="cpu")) == states(with_average)
    assert states(profiled("cuda", ema_device="cpu")) == states(profiled("cuda", ema_decay=None))
    assert states(profiled("cuda")) - states(profiled("cuda", ema_decay=None)) >= parameters


def test_the_average_of_a_model_with_a_generator(tiny):
    class Noisy(type(tiny)):
        def model(self, config):
            model = super().model(config)
            model.generator = torch.Generator()
            return model

    peaks = {profile_recipe(recipe, tiny.presets["small"], device="cpu").peak for recipe in (Noisy(), tiny)}
    assert len(peaks) == 1


def test_a_microbatch_lowers_the_peak(tmp_path, capsys):
    whole = report(capsys, tmp_path, HAE, "--device", "cpu", *SMALL)
    parts = report(capsys, tmp_path, HAE, "--device", "cpu", *SMALL, "--microbatch", "3")
    assert parts.peak < whole.peak
    assert parts.kept < whole.kept / 4
    assert [name for name, _, _ in parts.timeline.phases] == ["forward", "backward"] * 6 + ["optimizer"]
    assert parts.inputs.endswith("; microbatches of 3")


@pytest.mark.parametrize(
    "changes",
    [{}, {"microbatch": 3}, {"grad_clip": 1.0}, {"ema_decay": None}, {"passes": ("checkpoint",)}],
    ids=str,
)
def test_a_profile_says_what_the_trainer_does(tiny, changes):
    """The trainer's own step on true tensors, under a plain ledger."""
    config = dataclasses.replace(tiny.presets["small"], width=64, **changes)
    trainer = Trainer(tiny, config, data=None, cache=None)
    batches = iter(trainer.loader(range(2)))
    trainer.train_step(next(batches))
    data = next(batches)
    with Ledger() as ledger:
        held = [*trainer.model.state_dict().values(), *data.values()]
        held += [t for state in trainer.optimizer.state.values() for t in state.values()]
        held += trainer.ema.state_dict().values() if trainer.ema is not None else []
        for tensor in held:
            if isinstance(tensor, torch.Tensor):
                ledger.see(tensor)
        trainer.train_step(data)
    for real in (False, True):
        found = profile_recipe(tiny, config, device="cpu", real=real)
        # The trainer lets go of the draws before the optimizer's step, and adds the losses up.
        assert abs(found.peak - ledger.peak) <= 8 * 8 * 4 + 8


def test_a_profile_leaves_nothing_behind(hae, tiny):
    """Neither in the generators nor, as fake tensors, in what a recipe keeps."""
    before = torch.get_rng_state()
    for real in (False, True):
        profile_recipe(tiny, tiny.presets["small"], device="cpu", real=real)
    config = dataclasses.replace(hae.presets["quickstart"], image_size=16, model_channels=32, batch_size=2)
    profile_recipe(hae, config, device="cpu", train=False)
    assert torch.equal(before, torch.get_rng_state())
    draws = hae.draw(config, 2, torch.Generator())
    batch = {"image": torch.zeros(2, 4, 16, 16), "label": torch.zeros(2, dtype=torch.int64), **draws}
    assert type(hae.loss(config, hae.model(config), batch)) is torch.Tensor


def test_the_example_is_like_the_data(tmp_path, hae):
    config = dataclasses.replace(hae.presets["quickstart"], image_size=16)
    dataset = hae.dataset(config, brats(tmp_path / "brats"), tmp_path / "cache")
    example = hae.example(config, None, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    true, made = (next(iter(DataLoader(source, batch_size=3))) for source in (dataset, [example] * 3))
    assert {k: (v.shape, v.dtype) for k, v in true.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}


def test_recipes_that_break_their_word(tiny):
    class Wrong(type(tiny)):
        how = ""

        def loss(self, config, model, batch):
            loss = super().loss(config, model, batch)
            return {"vector": loss.expand(2), "number": 1.5, "constant": torch.zeros(())}.get(self.how, loss)

        def draw(self, config, n, generator):
            draws = super().draw(config, n, generator)
            return {"noise": torch.zeros(8)} if self.how == "draw" else draws

        def example(self, config, data, cache):
            return [1] if self.how == "example" else super().example(config, data, cache)

    messages = {
        "vector": r"recipe tiny: loss\(...\) must return one number.* it returned a tensor of shape \[2\]",
        "number": r"it returned a float",
        "constant": r"the loss must be one number that depends on the parameters",
        "draw": r"recipe tiny: 'noise' has not one row for each sample: for two samples it is 8 float32",
        "example": r"recipe tiny: example\(...\) must give a dictionary, not a list",
    }
    recipe = Wrong()
    for recipe.how, message in messages.items():
        with pytest.raises(InputError, match=message):
            profile_recipe(recipe, tiny.presets["small"], device="cpu")


# --- factories -------------------------------------------------------------------------------------------------------


def test_a_factory_with_inputs_of_all_kinds(tmp_path, capsys):
    call = [
        "--input",
        "sample=3x5x16",
        "--input",
        "timestep=3:int64",
        "--input",
        "scale=0.5",
        "--input",
        "mode='double'",
    ]
    found = report(capsys, tmp_path, NET, *call, "--device", "cpu")
    assert (found.model, found.inputs) == ("Net", "sample=3x5x16 float32, timestep=3 int64, scale=0.5, mode=double")
    weights = found.start_by_category["parameters"]
    steps = 4 * 17  # AdamW counts the steps of each parameter
    assert found.start_by_category["optimizer_states"] == 2 * weights + steps
    assert report(capsys, tmp_path, NET, *call, "--optimizer", "none").start_by_category["optimizer_states"] == 0
    assert report(capsys, tmp_path, NET, *call, "--optimizer", "SGD").start_by_category["optimizer_states"] == 0
    real = report(capsys, tmp_path, NET, *call, "--device", "cpu", "--real")
    assert (real.real, real.peak, real.kept) == (True, found.peak, found.kept)
    scaled = report(capsys, tmp_path, NET, "--input", "Bx5x16", "--batch-size", "3", "--device", "cpu")
    assert scaled.inputs == "3x5x16 float32"
    less = report(capsys, tmp_path, NET, "--input", "300x5x16", "--passes", "checkpoint", "--device", "cpu")
    more = report(capsys, tmp_path, NET, "--input", "300x5x16", "--device", "cpu")
    assert (less.peak < more.peak, less.kept < more.kept) == (True, True)


def test_a_factory_beside_the_user(tmp_path):
    """In a process of its own: found in the current folder, and no traceback."""
    (tmp_path / "mine.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(8, 4)\n")
    command = [sys.executable, "-m", "memopt.cli", "profile", "mine:net", "--input", "2x8"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "import sys; sys.path.remove(''); from memopt.cli import main; sys.exit(main(sys.argv[1:]))"
    for start in (command[:3], [sys.executable, "-c", script]):  # -m puts the folder on the path, the command does not
        done = subprocess.run([*start, *command[3:]], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("Linear: training step on ")
        wrong = subprocess.run(
            [*start, *command[3:], "--passes", "nix"], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert wrong.stderr.startswith("memopt profile: error: unknown pass 'nix'")


def test_a_factory_that_reads_values_is_built_for_real(tmp_path, capsys):
    found = report(capsys, tmp_path, "tests.nets:reads_values_to_build", "--input", "2x8")
    assert found.start_by_category["parameters"] >= 4 * 72
    assert not found.real


def test_dotted_names(tmp_path, capsys):
    assert report(capsys, tmp_path, "tests.nets:Inner.Net", "--input", "2x1x16").model == "Net"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no recipe folder nowhere"),
        ([TINY, "--preset", "big"], "recipe tiny has no preset 'big'; presets: small, wide"),
        ([TINY, "--set", "widht=3"], "recipe tiny has no option 'widht'. Did you mean 'width'"),
        ([TINY, "--set", "width"], "--set takes key=value, not 'width'"),
        ([TINY, "--batch-size", "0"], "batch_size must be at least 1"),
        ([TINY, "--passes", "chekpoint"], "unknown pass 'chekpoint'. Did you mean 'checkpoint'"),
        ([TINY, "--passes", "checkpoint:blocks=x*"], "checkpoint: found nothing to do"),
        ([TINY, "--input", "2x3"], "--input belongs to MODULE:FACTORY"),
        ([TINY, "--optimizer", "sgd"], "--optimizer belongs to MODULE:FACTORY"),
        ([TINY, "--device", "tpu"], "invalid choice: 'tpu'"),
        ([TINY, "--json", "/nowhere/r.json"], "cannot write /nowhere/r.json: No such file"),
        ([TINY, "--plot", "/nowhere/r.png"], "cannot write /nowhere/r.png: No such file"),
        ([HAE, "--set", "image_size=18"], "image_size 18 is not divisible by 4"),
        (["tests.nets:Nix", "--input", "2x3"], "tests.nets:Nix: tests.nets has no 'Nix'"),
        (["tests.nix:Net", "--input", "2x3"], "there is no module 'tests.nix' in this folder or among the packages"),
        (["tests.nets:NOT_A_FACTORY", "--input", "2x3"], "is no function or class, but a int"),
        (["tests.nets:no_module", "--input", "2x3"], r"no_module\(\) must return a torch.nn.Module; it returned a str"),
        (["tests.nets:raises", "--input", "2x3"], r"raises\(\) failed: OSError: weights not found .*nets.py:\d+\)"),
        (["tests.nets:needs", "--input", "2x3"], r"needs\(\) failed: TypeError: .*missing 1 .*'width'.* wrap it"),
        (["tests.nets:no_parameters", "--input", "2x3"], "--optimizer adamw: optimizer got an empty parameter list"),
        ([NET], "say what the model is called with: --input NAME=SHAPE"),
        ([NET, "--input", "2x3", "--preset", "x"], "--preset belongs to a recipe folder"),
        ([NET, "--input", "2x3", "--set", "a=b"], "--set belongs to a recipe folder"),
        ([NET, "--input", "2x3", "--optimizer", "adan"], "--optimizer 'adan' is none of adadelta, .*, none"),
        ([NET, "--input", "2x3", "--optimizer", "lbfgs"], "--optimizer 'lbfgs' is none of"),
        (
            [NET, "--input", "2x3", "--batch-size", "two"],
            "--batch-size must be a whole number of at least 1 and of at most 16 digits, not 'two'",
        ),
        ([NET, "--input", "Bx1x16"], "--input has a B, .* give --batch-size"),
        ([NET, "--input", "sample=2x1x16", "--input", "sample=3"], "--input: sample is given twice"),
        ([NET, "--input", "sample=2x16x"], "'sample=2x16x' is none of the forms"),
        ([NET, "--input", "sample=2by16"], "'sample=2by16' is none of the forms"),
        ([NET, "--input", "sample=0x16"], "every size must be at least 1"),
        ([NET, "--input", "sample=2x16:flaot32"], "torch has no dtype 'flaot32'. Did you mean 'float32'"),
        ([NET, "--input", "sample=2x16:"], "torch has no dtype ''"),
        ([NET, "--input", "mode=double"], "none of the forms .* A text needs quotes: mode=\"'double'\""),
        ([NET, "--input", "sample=__import__('os')"], "is none of the forms"),
        ([NET, "--input", "smaple=2x1x16"], r"Net.forward\(sample, timestep=None, .*: .*argument"),
        ([NET, "--input", "sample=2x1x15"], "Net failed when it was called with sample=2x1x15 float32: .*nets.py"),
        ([NET, "--input", "sample=2x1x16", "--input", "timestep=2"], "Net failed when it was called with .*timestep=2"),
        (["tests.nets:Branches", "--input", "2x8"], "cannot be profiled on fake tensors: .*nets.py.* --real"),
    ],
)
def test_bad_profiles(capsys, arguments, message):
    text = fails(capsys, "profile", *arguments)
    assert "memopt profile: error: " in text
    assert re.search(message, text), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_real_profile_without_its_device(capsys):
    for target in ([TINY], [NET, "--input", "2x1x16"]):
        assert "there is no CUDA device here" in fails(capsys, "profile", *target, "--real", "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TINY], "the following arguments are required: --budget"),
        ([TINY, "--budget", "8 potatoes"], "--budget.* no unit 'potatoes' in '8 potatoes'"),
        ([TINY, "--budget", "plenty"], "--budget is a number of bytes or a text such as '8GiB'.*not 'plenty'"),
        ([TINY, "--budget", "0"], "--budget must be at least one byte"),
        ([TINY, "--budget", "1GiB", "--preset", "big"], "recipe tiny has no preset 'big'; presets: small, wide"),
        ([TINY, "--budget", "1GiB", "--batch-size", "3"], "unrecognized arguments: --batch-size"),
        ([NET, "--budget", "1GiB", "--input", "2x1x16"], "no --input depends on the batch size: write B for it"),
        ([NET, "--budget", "1GiB", "--input", "Bx1x15"], "Net failed when it was called with 1x1x15 float32"),
        ([TINY, "--budget", "9MiB", "--json", "/nowhere/x"], "cannot write /nowhere/x"),
    ],
)
def test_bad_searches(capsys, arguments, message):
    assert re.search(message, fails(capsys, "max-batch", *arguments))


def test_a_budget_too_small_for_one(capsys):
    text = fails(capsys, "max-batch", NET, "--input", "sample=Bx5000x16", "--device", "cpu", "--budget", "4MiB")
    assert re.search(
        r"a batch of 1 needs [\d.]+ MiB, more than the budget of 4.00 MiB: [\d.]+ MiB of activations, "
        r"[\d.]+ [KM]iB of \w+, .*\. With --passes it needs less: .*checkpoint: [\d.]+ MiB",
        text,
    ), text
    text = fails(capsys, "max-batch", "tests.nets:normed", "--input", "Bx8", "--budget", "200", "--optimizer", "sgd")
    assert "a batch of 2 needs" in text  # a batch norm takes no batch of one
    assert "With --passes it needs less: optimizer_in_backward: 884 B." in text


# --- the largest batch -----------------------------------------------------------------------------------------------


def brute(peaks, budget):
    return max(n for n, peak in peaks.items() if peak <= budget)


def test_max_batch_agrees_with_trying_all(tiny):
    config = dataclasses.replace(tiny.presets["small"], width=8)
    reports = {n: profile_recipe(tiny, at_batch(config, n), device="cpu") for n in range(1, 26)}
    peaks = {n: found.peak for n, found in reports.items()}
    assert list(peaks.values()) == sorted(peaks.values())
    for budget in sorted({peaks[1], peaks[1] + 1, *range(peaks[1], peaks[25], 997), peaks[9] - 1, peaks[9], peaks[24]}):
        fit = max_batch(reports.__getitem__, budget, most=25)
        assert fit.batch == brute(peaks, budget)
        assert (fit.peak, fit.beyond) == (peaks[fit.batch], peaks[fit.batch + 1])
        assert fit.peak <= fit.budget < fit.beyond
        assert fit.points == {n: peaks[n] for n in fit.points}


@pytest.mark.parametrize("passes", [[], ["checkpoint"]], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("budget", ["500KiB", "1MiB", "2500KiB"])
def test_the_answer_of_max_batch_fits_in_true_steps_and_one_more_does_not(budget, passes):
    def work(batch):
        blocks = [nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)) for _ in range(2)]
        model = nn.Sequential(*blocks)
        return model, torch.randn(batch, 32), torch.optim.AdamW(model.parameters())

    def peak(batch):
        model, x, optimizer = work(batch)
        return memopt.profile(model, x, optimizer=optimizer, passes=passes)

    def steps(batch):
        model, x, optimizer = work(batch)
        memopt.apply(model, passes)
        with limit(budget, model, optimizer, x):
            for _ in range(2):
                model(x).mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    found = max_batch(peak, budget)
    steps(found.batch)
    with pytest.raises(torch.OutOfMemoryError):
        steps(found.batch + 1)


def test_max_batch_of_a_model():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))

    def at(batch):
        return memopt.profile(model, torch.empty(batch, 8, device="meta"), rounding=512, device="cuda")

    fit = max_batch(at, "1MiB")
    assert at(fit.batch).peak <= 1 << 20 < at(fit.batch + 1).peak
    assert str(fit).startswith(f"batch {fit.batch}: peak ")
    assert len(fit.points) <= 8


@pytest.mark.parametrize(
    "peak_at",
    [
        lambda n: 1000 + 7 * n,
        lambda n: max(5000, 10 * n),  # flat at first: what the optimizer takes
        lambda n: max(5000 + n, 40 * n - 900),
        lambda n: 1000 + 512 * (n // 37 + 1),  # steps
        lambda n: 100 + n * n,
        lambda n: 100 + int(300 * n**0.5),
        lambda n: 100 + 10 * n + 400 * (n % 8 == 0),  # a kernel that takes more at some sizes
    ],
)
def test_few_profiles_whatever_the_form(peak_at):
    for budget in (5001, 6400, 7777, 9999, 20_000):
        asked = []

        def ask(n, asked=asked):
            asked.append(n)
            return peak_at(n)

        fit = max_batch(ask, budget)
        assert peak_at(fit.batch) <= budget < peak_at(fit.batch + 1) == fit.beyond
        assert len(asked) == len(set(asked)) == len(fit.points) <= 30
        assert fit.share == fit.peak / budget
    assert len(asked) <= 30


def test_an_affine_peak_needs_four_profiles():
    fit = max_batch(lambda n: 1_000_000 + 12_345 * n, "24MB")
    assert fit.batch == 1863
    assert sorted(fit.points) == [1, 16, 1863, 1864]


def test_a_search_ends():
    fit = max_batch(lambda n: 5, 10, most=1000)
    assert (fit.batch, fit.beyond) == (1000, None)
    assert "larger ones were not tried" in str(fit)
    with pytest.raises(DoesNotFit, match="a batch of 1 needs 11 B, more than the budget of 10 B"):
        max_batch(lambda n: 10 + n, 10)
    with pytest.raises(InputError, match="no unit 'potatoes'"):
        max_batch(lambda n: n, "8 potatoes")


def test_the_largest_batch_of_a_recipe(tmp_path, capsys):
    file = tmp_path / "fit.json"
    arguments = ["max-batch", TINY, "--set", "width=64", "--device", "cuda", "--budget", "2MiB"]
    text = run(capsys, *arguments, "--json", file)
    found = json.loads(file.read_text())
    assert found.keys() == {
        *("schema", "model", "train", "device", "passes", "budget", "batch", "peak", "beyond", "points", "failed"),
    }
    assert (found["schema"], found["train"], found["device"], found["budget"]) == (1, True, "cuda", 2 << 20)
    assert found["peak"] <= found["budget"] < found["beyond"]
    batch = found["batch"]
    assert re.search(rf"Largest batch: {batch}\n\n  batch {batch}: peak 2.00 MiB, [\d.]+% of the budget\n", text)
    assert re.search(rf"  batch {batch + 1}: peak 2.00 MiB, 100.\d% of the budget\n", text)
    assert len(found["points"]) <= 8
    at = report(capsys, tmp_path, TINY, "--set", "width=64", "--device", "cuda", "--batch-size", batch)
    assert at.peak == found["peak"]
    run(capsys, *arguments, "--passes", "checkpoint", "--json", file)
    assert json.loads(file.read_text())["batch"] > 1.1 * batch


def test_the_largest_batch_of_hae(capsys):
    text = run(capsys, "max-batch", HAE, *SMALL, "--device", "cuda", "--budget", "64MiB")
    batches = [int(n) for n in re.findall(r"  batch (\d+): peak", text)]
    assert batches == [batches[0], batches[0] + 1]


def test_the_largest_batch_of_a_factory(tmp_path, capsys):
    text = run(capsys, "max-batch", NET, "--input", "sample=Bx5x16", "--input", "timestep=B:int64", "--budget", "2MiB")
    batch = int(re.search(r"Largest batch: (\d+)", text)[1])
    sizes = ["--input", "sample=Bx5x16", "--input", "timestep=B:int64", "--batch-size"]
    assert report(capsys, tmp_path, NET, *sizes, batch).peak <= 2 << 20
    assert report(capsys, tmp_path, NET, *sizes, batch + 1).peak > 2 << 20
    assert "Largest batch: " in run(capsys, "max-batch", "tests.nets:normed", "--input", "Bx8", "--budget", "64KiB")


def test_help_has_worked_examples(capsys):
    for verb in ("profile", "max-batch"):
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        assert f"examples:\n  memopt {verb} " in capsys.readouterr().out
