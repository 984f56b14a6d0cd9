"""What a user, or code of theirs, can get wrong on the command line: an error that says what, never a traceback."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from memopt.cli import main
from memopt.errors import InputError, MemoptError, blaming
from memopt.memory import max_batch
from tests.test_cli import fails
from tests.training_jobs import ROOT, TINY

NET = "tests.nets:Net"
CALL = [NET, "--input", "2x1x16", "--device", "cpu"]

MODULE = """
import sys
import torch
from torch import nn


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(10, 8))

    def forward(self, x):
        return x + self.rows[torch.arange(10)][: len(x)].view_as(x)


def leaves():
    sys.exit(7)


def misses():
    import surely_not_installed


def huge():
    return nn.Linear(4 << 30, 4 << 30)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a module of the user's, as the current one."""
    (tmp_path / "user_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("user_")]:
        del sys.modules[name]


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--plot", "--html"])
def test_files_that_cannot_be_written_are_known_before_the_work(tmp_path, capsys, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("memopt.cli.subject.of", lambda options: pytest.fail("the work began"))
    os.mkfifo("pipe")
    for file in (".", "none/x", "pipe", tmp_path):
        assert re.search(r"memopt profile: error: cannot write \S+: ", fails(capsys, "profile", TINY, option, file))
    assert os.listdir() == ["pipe"]
    if option == "--json":
        assert "cannot write .: " in fails(capsys, "max-batch", TINY, "--budget", "1MiB", option, ".")


def test_a_file_for_two_things(tmp_path, capsys):
    (tmp_path / "link").symlink_to("x")
    text = fails(capsys, "profile", TINY, "--json", tmp_path / "x", "--html", tmp_path / "link")
    assert "--json and --html name the same file" in text
    assert os.listdir(tmp_path) == ["link"]


def test_links_are_followed_and_what_was_there_survives(tmp_path, capsys, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "r.json").write_text("before")
    (tmp_path / "r.json").symlink_to("real/r.json")
    command = ["profile", *CALL, "--json", str(tmp_path / "r.json")]
    with monkeypatch.context() as patch:

        def full(path, data):
            path.touch()
            raise OSError(28, "No space left on device")

        patch.setattr("pathlib.Path.write_bytes", full)
        assert "cannot write " in (text := fails(capsys, *command))
        assert "No space left on device" in text
    assert (tmp_path / "r.json").read_text() == "before"
    assert main(command) == 0
    assert (tmp_path / "r.json").is_symlink()
    assert json.loads((tmp_path / "real" / "r.json").read_text())["model"] == "Net"
    assert os.listdir(tmp_path / "real") == ["r.json"]


# --- recipes and factories that fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def recipe(:", r"recipe.py cannot be imported: SyntaxError: .* \(.*recipe.py:1\)"),
        ("x = 1\n1 / 0", r"recipe.py cannot be imported: ZeroDivisionError: .* \(.*recipe.py:2\)"),
        (
            "def recipe():\n    raise KeyError('a')",
            r"recipe\(\) in .*recipe.py failed: KeyError: 'a' \(.*recipe.py:2\)",
        ),
        ("import sys\nsys.exit(3)", r"recipe.py cannot be imported: SystemExit: 3"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "profile"])
def test_a_recipe_that_fails(tmp_path, capsys, verb, content, message):
    (tmp_path / "recipe.py").write_text(content)
    text = fails(capsys, verb, tmp_path)
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "width=-1"], r"recipe tiny: model\(...\) failed: RuntimeError: .*negative.* \(.*tiny/net.py:\d+\)"),
        (["--set", "dropout=2"], r"recipe tiny: model\(...\) failed: ValueError: dropout .* \(.*tiny/net.py:\d+\)"),
        (["--set", "width=3000000000"], r"recipe tiny: model\(...\) failed: RuntimeError: .*overflow"),
    ],
)
def test_a_recipe_whose_model_cannot_be_built(tmp_path, capsys, arguments, message):
    for more in (["profile"], ["max-batch", "--budget", "1GiB"]):
        text = fails(capsys, more[0], TINY, *more[1:], *arguments)
        assert re.search(message, text), text
    if "overflow" not in message:
        assert re.search(message, fails(capsys, "train", TINY, "--out", tmp_path / "run", *arguments))


def test_a_recipe_whose_other_parts_fail(capsys):
    text = fails(capsys, "profile", TINY, "--set", "samples=-3")
    assert re.search(r"recipe tiny: example\(...\) failed: RuntimeError: .*recipe.py:\d+", text)


def test_factories_that_fail(mine, capsys):
    assert re.search(r"user_nets:leaves\(\) failed: SystemExit: 7 \(.*user_nets.py:\d+\)", fails_at("leaves", capsys))
    assert re.search(r"user_nets:huge\(\) failed: RuntimeError: .*overflow", fails_at("huge", capsys))


def fails_at(name, capsys):
    return fails(capsys, "profile", f"user_nets:{name}", "--input", "2x8")


def test_a_missing_package_is_advised_on_where_memopt_knows_it(mine, capsys):
    (mine / "user_more.py").write_text("import surely_not_installed")
    (mine / "recipe.py").write_text("import surely_not_installed")
    needed = "the Python package 'surely_not_installed' is needed and not installed"
    for target in ("user_nets:misses", "user_more:x"):
        text = fails(capsys, "profile", target, "--input", "2x8")
        assert needed in text
        assert "memopt[" not in text
    assert f"{needed}. The recipes in memopt's examples have extras" in fails(capsys, "profile", ".")


def test_blaming_passes_on_what_is_memopts_own():
    with pytest.raises(MemoptError, match=r"^mine$"), blaming("it failed"):
        raise MemoptError("mine")
    told = r"^it failed: ValueError: x \(.*test_cli_errors.py:\d+\); so\.$"
    with pytest.raises(InputError, match=told), blaming("it failed", "; so."):
        raise ValueError("x")
    with pytest.raises(KeyboardInterrupt), blaming("it failed"):
        raise KeyboardInterrupt


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NET, "--input", "9999999999999999x8"], "a tensor of 9999999999999999x8 has more than"),
        ([NET, "--input", "99999999999999999999999x8"], "'99999999999999999999999x8': a size is too large"),
        ([NET, "--input", f"{'9' * 5000}:int64"], "a size is too large"),
        ([NET, "--input", "Bx1x16", "--batch-size", "1000000000000000"], "1000000000000000x1x16 has more than"),
        ([NET, "--input", "Bx1x16", "--batch-size", "9" * 5000], "--batch-size must be a whole number .* not '999"),
        ([TINY, "--batch-size", "1000000000000"], "a batch of 1,000,000,000,000 is larger than a profile takes"),
        ([TINY, "--batch-size", "9" * 30], "is larger than a profile takes"),
        ([NET, "--input", "2x8:quint8"], "'2x8:quint8': torch makes no plain tensors of dtype 'quint8'"),
        ([*CALL, "--batch-size", "3"], "no --input depends on the batch size: write B for it"),
        ([*CALL, "--optimizer", ""], "--optimizer '' is none of adadelta"),
        ([*CALL, "--preset", ""], "--preset belongs to a recipe folder"),
        ([*CALL, "--passes", ","], "--passes ',' has no name at one side of a comma"),
        ([TINY, "--passes", ","], "--passes ',' has no name at one side of a comma"),
        ([TINY, "--passes", "checkpoint,"], "--passes 'checkpoint,' has no name at one side of a comma"),
        ([TINY, "--preset", ""], "recipe tiny has no preset ''; presets: small, wide"),
        ([TINY, "--optimizer", ""], "--optimizer belongs to MODULE:FACTORY"),
        ([""], "an empty name is neither a recipe folder nor MODULE:FACTORY"),
        (["~surely_nobody/x"], "no recipe folder ~surely_nobody/x"),
        (["x" * 300], "File name too long"),
    ],
)
def test_odd_arguments(capsys, arguments, message):
    text = fails(capsys, "profile", *arguments)
    assert re.search(message, text), text[:1000]


def test_no_passes_can_be_said(capsys):
    assert main(["profile", *CALL, "--passes", ""]) == 0
    assert "passes: none" in capsys.readouterr().out


def test_a_real_input_larger_than_memory(capsys):
    text = fails(capsys, "profile", NET, "--input", "10000000000000x16", "--real", "--device", "cpu")
    assert "--input: a tensor of 10000000000000x16 cannot be made: " in text


def test_a_fake_input_larger_than_memory(capsys):
    assert main(["profile", NET, "--input", "10000000000x1x16", "--device", "cpu", "--infer"]) == 0
    assert "TiB" in capsys.readouterr().out


def test_a_terminal_that_shows_ascii_only():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "memopt.cli", "profile", *CALL]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout


def test_torch_does_not_log_what_the_error_says():
    """In a process of its own: torch writes to a stream that it took when it was imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "memopt.cli", "profile", NET, "--input", "2x1x15"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("memopt profile: error: Net failed when it was called with 2x1x15 float32: ")
    assert done.stderr.count("\n") == 1
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


# --- the largest batch -----------------------------------------------------------------------------------------------


def test_a_search_does_not_advise_what_it_refuses(capsys):
    text = fails(capsys, "max-batch", "tests.nets:Branches", "--input", "Bx8", "--budget", "1GiB")
    assert "needs the values of a tensor" in text
    assert "max-batch works on fake tensors alone; profile single batch sizes on true ones with memopt profile" in text
    assert "real=True" not in text


def test_larger_batches_that_fail_end_the_search(mine, capsys):
    command = ["max-batch", "user_nets:Table", "--input", "Bx8", "--budget", "1GiB", "--device", "cpu"]
    assert main([*command, "--json", "fit.json"]) == 0
    text = capsys.readouterr().out
    assert "Largest batch: 10\n" in text
    assert re.search(r"  batch 11 cannot be profiled, and so ended the search: InputError: Table failed", text)
    found = json.loads((mine / "fit.json").read_text())
    assert (found["batch"], found["beyond"]) == (10, None)
    assert found["failed"].startswith("InputError: Table failed when it was called with 11x8")


def test_max_batch_with_a_function_that_fails():
    def peak(batch):
        if batch > 37:
            raise RuntimeError("too many")
        return batch

    fit = max_batch(peak, 1000)
    assert (fit.batch, fit.beyond, fit.failed) == (37, None, "RuntimeError: too many")
    assert str(fit).endswith("; batch 38 failed: RuntimeError: too many")
    assert max_batch(peak, 20).failed is None
    with pytest.raises(RuntimeError, match="too many"):
        max_batch(lambda n: peak(n + 37), 1000)


def test_a_real_model_is_not_built_after_an_overflow():
    from memopt.estimate import fake_model

    calls = []

    def make():
        calls.append(1)
        return nn.Linear(4 << 30, 4 << 30)

    with pytest.raises(RuntimeError, match="overflow"):
        fake_model(make)
    assert len(calls) == 1
    assert torch.is_tensor(fake_model(lambda: nn.Linear(2, 2)).weight)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_last_column_of_the_peak_keeps_a_width(tmp_path):
    assert main(["profile", *CALL, "--html", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert ".says { min-width: 170px; }" in text
    assert '<div class="says">the weights of the model</div>' in text
