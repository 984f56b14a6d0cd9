"""``memopt run``: a recipe's tasks, found, told about, and carried out with the weights of a run."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from memopt import InputError, TaskConfig, tasks
from memopt.cli import main
from memopt.recipe import configure, load_recipe
from tests.test_cli import fails
from tests.training_jobs import ROOT, TINY

TASKED = ROOT / "tests" / "recipes" / "tasked"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 12 steps, whose checkpoints are those of steps 8 and 12."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main(["train", str(TASKED), "--out", str(out), "--set", "width=24", "--data", str(ROOT)]) == 0
    return out


@pytest.fixture
def run(trained, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(trained, tmp_path / "run")


def go(*arguments):
    assert main(["run", str(TASKED), *map(str, arguments)]) == 0


def test_the_tasks_of_a_recipe_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    go()
    text = capsys.readouterr().out
    assert text.startswith("measure  Errors of the model by scale [of its input]\n")
    for line in (
        r"option +default +",
        r"--batch-size SIZE +5 +Samples per call of the model, whatever the number of processes",
        r'--passes A,B +"" +memopt passes, by name: channels_last,amp:dtype=bf16',
        r"--scales A,B +1\.0,2\.5 +What the input is multiplied by: 100% or more",
        r"--limit LIMIT +16",
        r"--absolute true\|false +true +Of absolute errors",
        r"--form short\|long +short",
    ):
        assert re.search(rf"^  {line}\s*$", text, re.MULTILINE), (line, text)
    assert "show  What a task is given" in text
    go("--preset", "wide")
    assert re.search(r"--limit LIMIT +32", capsys.readouterr().out)
    assert main(["run", str(TINY)]) == 0
    assert capsys.readouterr().out == "recipe tiny has no tasks\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["usage: memopt run [-h] DIR [TASK] [options]", "examples:\n  memopt run examples/hae_v2\n"]),
        ([TASKED, "--help"], ["List the tasks of recipe tasked (measure, show)"]),
        ([TASKED, "measure", "--help"], ["100% or more (default: 1.0,2.5)", "--checkpoint PATH", "--limit LIMIT"]),
        ([TASKED, "measure", "--preset", "wide", "--help"], ["(default: 32)"]),
    ],
)
def test_help(capsys, monkeypatch, arguments, expected):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        main(["run", *map(str, arguments)])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part in expected:
        assert part in text


def test_a_task_is_carried_out(trained, tmp_path, capsys):
    go("measure", "--checkpoint", trained, "--out", tmp_path / "out" / "deep")
    text = capsys.readouterr().out
    assert re.search(r"tasked measure: 1,616 parameters on \w+, weights of step 12 from .*/ema.safetensors;", text)
    assert "measuring 48/48 points\n" in text
    assert "[errors] [" in text
    errors = json.loads((tmp_path / "out" / "deep" / "errors.json").read_text())
    model = load_recipe(TASKED).model(SimpleNamespace(width=24, dropout=0.0)).eval()
    model.load_state_dict(load_file(trained / "ema.safetensors"))
    x = load_recipe(TASKED).dataset(SimpleNamespace(samples=64), None, None).x[:24]
    with torch.no_grad():
        assert errors == pytest.approx([(model(x * s) - x).abs().sum().item() for s in (1.0, 2.5)], rel=1e-5)


def test_options_are_converted(trained, tmp_path):
    more = ["--scales", "0.5,1,2", "--limit", "none", "--absolute", "false", "--form", "long", "--batch-size", "7"]
    go("measure", "--checkpoint", trained, "--out", tmp_path, *more, "--seed", "3")
    assert len(json.loads((tmp_path / "errors.json").read_text())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesure"], "recipe tasked has no task 'mesure'; tasks: measure, show"),
        (["measure", "--scales", "wide"], r"task measure: scales\.0: .*given: 'wide'"),
        (["measure", "--absolute", "maybe"], r"task measure: absolute: .*boolean.*given: 'maybe'"),
        (["measure", "--form", "round"], r"task measure: form: .*'short' or 'long'"),
        (["measure", "--batch-size", "0"], "task measure: batch_size must be at least 1"),
        (["measure", "--seed", "-1"], "task measure: seed must not be negative"),
        (["measure", "--passes", "amp,,"], "has no name at one side of a comma"),
        (["measure", "--passes", "chekpoint"], "unknown pass 'chekpoint'. Did you mean 'checkpoint'"),
        (["measure", "--set", "widht=3"], "recipe tasked has no option 'widht'. Did you mean 'width'"),
        (["measure", "--set", "width=32"], "holds the weights of another model: .*inp.weight is"),
        (["measure", "--preset", "small"], "holds the weights of another model: .*Use the preset it was trained with"),
        (["measure", "--preset", "big"], "recipe tasked has no preset 'big'; presets: small, wide"),
        (["measure", "--frobnicate"], "memopt run .*tasked measure: error: unrecognized arguments: --frobnicate"),
        (["--steps", "3", "measure"], "unrecognized arguments: --steps 3 measure"),
        (["measure", "--out", __file__], "cannot write the output folder .*Choose another --out"),
    ],
)
def test_bad_arguments(trained, capsys, arguments, message):
    checkpoint = ["--checkpoint", trained] if arguments[0] == "measure" else []
    text = fails(capsys, "run", TASKED, *arguments, *checkpoint)
    assert re.search(message, text), text
    assert not (trained / "measure" / "errors.json").exists()


def test_a_folder_is_needed(capsys):
    assert "the following arguments are required: DIR\n" in fails(capsys, "run")


def test_a_recipe_without_tasks(capsys):
    assert "recipe tiny has no task 'measure'; tasks: none" in fails(capsys, "run", TINY, "measure")


def given(folder):
    """What the task `show` was given."""
    return SimpleNamespace(**json.loads((folder / "given.json").read_text()))


def file_of(run, name="ema", step=None):
    return (run if step is None else run / "checkpoints" / f"step_{step:08d}") / f"{name}.safetensors"


def drop(run, *names):
    for name in names:
        file_of(run, name).unlink()


def spoil(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


FORMS = {
    "a run": (lambda run: run, "ema", None, 12),
    "a run without an average": (lambda run: drop(run, "ema") or run, "model", None, 12),
    "an interrupted run": (lambda run: drop(run, "ema", "model") or run, "ema", 12, 12),
    "an interrupted run with a broken checkpoint": (
        lambda run: drop(run, "ema", "model") or spoil(file_of(run, step=12)) or run,
        "ema",
        8,
        8,
    ),
    "a checkpoint": (lambda run: file_of(run, step=8).parent, "ema", 8, 8),
    "a file of a run": (lambda run: file_of(run, "model"), "model", None, 12),
    "a file of a checkpoint": (lambda run: file_of(run, "model", 8), "model", 8, 8),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_a_run(run, capsys, form):
    named, name, folder, step = FORMS[form]
    go("show", "--checkpoint", named(run))
    seen, file = given(run / "show"), file_of(run, name, folder)
    assert seen.weights == [str(file), hashlib.sha256(file.read_bytes()).hexdigest(), str(run), step]
    assert seen.first == load_file(file)["inp.weight"][0, 0].item()
    assert (seen.width, seen.data, seen.training, seen.grad) == (24, str(ROOT), False, True)
    text = capsys.readouterr().out
    assert "warning: [b]nothing is measured\n" in text
    assert ("is broken (ema.safetensors was altered" in text) == ("broken" in form)


def test_weights_that_belong_to_no_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone = tmp_path / "alone.safetensors"
    shutil.copy(file_of(run), alone)
    go("show", "--checkpoint", alone, "--set", "width=24")
    seen = given(tmp_path / "runs" / "tasked-show")
    assert seen.weights[2:] == ["None", None]
    assert seen.data == "None"
    shutil.copytree(run / "checkpoints" / "step_00000008", tmp_path / "kept")
    go("show", "--checkpoint", "kept", "--preset", "wide", "--set", "width=24", "--out", "out")
    assert given(tmp_path / "out").weights[2:] == ["None", 8]


def test_the_default_is_the_run_of_the_preset_with_its_settings(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "tasked-wide")
    go("show", "--preset", "wide", "--data", "other")
    seen = given(tmp_path / "runs" / "tasked-wide" / "show")
    assert (seen.width, seen.data) == (24, "other")
    recipe = load_recipe(TASKED)
    with pytest.raises(InputError, match=r"runs/tasked-small has no weights; train first: memopt train DIR --preset P"):
        tasks.run_task(recipe, recipe.tasks["show"], configure(recipe, None, {}), TaskConfig())


def nan(run):
    weights = load_file(file_of(run))
    weights["out.bias"][0] = float("nan")
    save_file(weights, file_of(run))


BAD = {
    "nothing": (lambda run: shutil.rmtree(run), "run has no weights; train first: memopt train DIR"),
    "no checkpoint yet": (
        lambda run: drop(run, "ema", "model") or shutil.rmtree(run / "checkpoints"),
        "run has no weights; train first: .* or give --checkpoint",
    ),
    "no safetensors": (lambda run: file_of(run).write_text("weights"), "ema.safetensors is no whole safetensors file"),
    "cut off": (lambda run: file_of(run).write_bytes(file_of(run).read_bytes()[:-5]), "is no whole safetensors file"),
    "not finite": (nan, r"ema.safetensors holds weights that are not finite \(out.bias, 1 in all\); give an earlier"),
    "of another recipe": (
        lambda run: (run / "config.json").write_text('{"recipe": "x", "config": {}}'),
        "is a run of recipe 'x', not of 'tasked'",
    ),
    "settings unreadable": (lambda run: (run / "config.json").write_text("{"), "config.json cannot be read .* move it"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_weights(run, capsys, bad):
    harm, message = BAD[bad]
    harm(run)
    text = fails(capsys, "run", TASKED, "show", "--checkpoint", run)
    assert re.search(message, text), text
    assert not (run / "show").exists()


@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_broken_checkpoint(run, capsys, name):
    folder = file_of(run, step=8).parent
    spoil(folder / "ema.safetensors")
    text = fails(capsys, "run", TASKED, "show", "--checkpoint", folder / name)
    assert "step_00000008 is broken (ema.safetensors was altered: its checksum differs); give another" in text


def test_passes_are_applied(trained, tmp_path, capsys):
    go("show", "--checkpoint", trained, "--out", tmp_path, "--passes", "inference_mode,amp:dtype=fp16")
    assert sorted(given(tmp_path).passes) == ["amp", "inference_mode"]
    assert "amp(dtype='fp16')" in capsys.readouterr().out


def test_the_seed_determines_what_is_random(trained, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go("show", "--checkpoint", trained, "--out", tmp_path / name, "--seed", seed)
    a, b, c = (given(tmp_path / name).random for name in "abc")
    assert a == b != c


def test_two_processes_measure_what_one_does(trained, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "memopt.cli"]
    more = ["run", str(TASKED), "measure", "--checkpoint", str(trained), "--out"]
    done = subprocess.run([*command, *more, str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tasked measure: ") == done.stdout.count("[errors] ") == 1
    assert ", 2 processes, " in done.stdout
    assert main([*more, str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "errors.json").read_text()) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_two_jobs_cannot_share_a_folder(trained, tmp_path, capsys):
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(60)"
    )
    arguments = ["run", str(TASKED), "show", "--checkpoint", str(trained), "--out", str(tmp_path)]
    lock = str(tmp_path / ".lock")
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert "another run is writing into" in fails(capsys, *arguments)
        other.kill()
    assert main(arguments) == 0


def job(console):
    fields = ("recipe", "config", "options", "model", "handle", "weights", "accelerator", "data", "cache", "out")
    return tasks.Job(**dict.fromkeys(fields), console=console)


def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(monkeypatch):
    now = 0.0
    monkeypatch.setattr(tasks, "time", SimpleNamespace(monotonic=lambda: now))
    lines = Console(file=io.StringIO(), force_terminal=False)
    with job(lines).track("translating", 620, "slices") as advance:
        for now in (4.0, 8.0, 12.0, 16.0):  # noqa: B007 (time goes on)
            advance(120)
        advance(140)
    assert lines.file.getvalue() == "translating 360/620 slices\ntranslating 620/620 slices\n"
    bar = Console(file=io.StringIO(), force_terminal=True, width=80)
    with job(bar).track("translating", 620) as advance:
        advance(620)
    assert "620/620" in bar.file.getvalue()
    assert "\x1b[" in bar.file.getvalue()


CODE = """
from dataclasses import dataclass
from memopt import Task, TaskConfig
from memopt.recipe import load_recipe

@dataclass(frozen=True, kw_only=True)
class Options(TaskConfig):
    out: str = ""

class Broken(Task):
    name, summary = "broken", ""
    def options(self, config):
        return {options}
    def run(self, job):
        raise AssertionError

def recipe():
    made = load_recipe({tiny!r})
    made.tasks = {{"broken": Broken()}}
    return made
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("Options()", "task broken: --out is an option of every task; give the field another name"),
        ("1 / 0", r"task broken: options\(...\) failed: ZeroDivisionError: .*recipe.py:13"),
        ("None", r"task broken: options\(...\) returned a NoneType, not a memopt.TaskConfig"),
    ],
)
def test_a_task_that_is_none(tmp_path, capsys, options, message):
    (tmp_path / "recipe.py").write_text(CODE.format(options=options, tiny=str(TINY)))
    text = fails(capsys, "run", tmp_path, "broken")
    assert re.search(message, text), text
