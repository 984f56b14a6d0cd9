"""``memopt ablate``: what it prints and writes, and how it fails."""

import csv
import re

import pytest
import torch

import memopt
from memopt.cli.subject import _weighted
from memopt.memory import MemoryReport
from tests.test_cli import HAE, fails
from tests.test_cli_profile import NET, SMALL, report, run
from tests.training_jobs import TINY

INPUT = ["--input", "Bx12x16", "--batch-size", "4"]
CPU = ["--device", "cpu"]
SMALLER = [*SMALL, "num_res_blocks=1"]


MODELS = """
from torch import nn
from tests.nets import Block

def normalized():
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16, elementwise_affine=False))

def blocks():
    return nn.Sequential(Block(16), Block(16))

def softmax():
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 16), nn.Softmax(-1))
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The name of a module with some models, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "models_to_ablate.py").write_text(MODELS)
    return "models_to_ablate"


def table(file):
    with file.open(newline="") as lines:
        return {row["row"]: row for row in csv.DictReader(lines)}


def test_a_recipe_into_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    passes = "outer_product,checkpoint,amp:dtype=bf16"
    command = ["ablate", HAE, *SMALLER, "--batch-size", "4", "--passes", passes, "--repeats", "2", "--out", "found"]
    text = run(capsys, *command)
    names = ["none", "outer_product", "checkpoint", "amp", "all"]
    names += [f"all but {name}" for name in names[1:4]]
    rows = table(tmp_path / "found" / "ablation.csv")
    assert sorted(rows) == sorted(names)
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == [f"ablation.{s}" for s in ("csv", "md", "png")]

    # Memory is that of a profile for CUDA with these passes and nothing else.
    for name, given in {"none": "", "checkpoint": "checkpoint", "all": passes}.items():
        options = ["--device", "cuda", *SMALLER, "--batch-size", "4", "--passes", given]
        found = report(capsys, tmp_path, HAE, *options)
        assert int(rows[name]["peak_bytes"]) == found.peak
        for category, size in found.peak_by_category.items():
            assert int(rows[name][f"{category}_bytes"]) == size
    assert float(rows["none"]["peak_ratio"]) == float(rows["none"]["time_ratio"]) == 1
    assert [rows[n]["bitwise"] for n in ("none", "checkpoint", "outer_product", "amp")] == ["True"] * 2 + ["False"] * 2
    assert 0 < float(rows["outer_product"]["gradient_error"]) < 1e-3 < float(rows["amp"]["gradient_error"])
    assert rows["all"]["promised"] == "not exact"
    assert float(rows["all"]["time_ratio"]) > 0

    # What the figures depend on is in every row, and before the table.
    for row in rows.values():
        assert row["command"].startswith(f"memopt ablate {HAE} --set model_channels=32")
        assert row["memopt"] == memopt.__version__
        assert "image_size=16" in row["config"]
        assert "seed=0" in row["config"]
        assert re.match(r"\d{4}-\d\d-\d\dT", row["date"])
        assert "threads" in row["processor"]
        assert (row["steps"], row["steps_on"]) == ("times, 2 rounds and errors", "cpu, batch 4")
    page = (tmp_path / "found" / "ablation.md").read_text()
    assert f"$ {rows['all']['command']}\n" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in rows]
    assert "| activations |" in lines[0]
    assert (tmp_path / "found" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    for part in ("HAEUNetModelV2, training step on cuda", "Pareto front of memory", *names, "wrote found/ablation.csv"):
        assert part in text
    assert "Not as exact as promised" not in text


def test_a_model_of_a_function_with_what_applies_to_it(models, tmp_path, capsys):
    file = tmp_path / "t.csv"
    text = run(capsys, "ablate", f"{models}:blocks", *INPUT, "--no-time", "--out", file, "--out", tmp_path / "t.md")
    rows = table(file)
    assert {"checkpoint", "offload_activations", "set_to_none"} <= rows.keys()
    assert all(row["seconds_median"] == row["pareto"] == "" for row in rows.values())
    assert rows["checkpoint"]["bitwise"] == "True"
    assert "amp (not exact; name it to have it)" in text
    assert all("amp (not exact; name it to have it)" in row["left_out"] for row in rows.values())
    assert "time" not in (tmp_path / "t.md").read_text().split("| passes |")[1].partition("\n")[0]
    assert "input=['Bx12x16'], optimizer=AdamW, seed=0" in rows["none"]["config"]


def test_memory_alone(tmp_path, capsys):
    out = tmp_path / "a" / "b"
    run(capsys, "ablate", TINY, "--passes", "checkpoint", "--no-time", "--no-errors", "--out", out)
    rows = table(out / "ablation.csv")
    assert list(rows) == ["none", "checkpoint"]
    assert rows["checkpoint"]["bitwise"] == rows["checkpoint"]["loss_error"] == ""
    assert sorted(p.name for p in out.iterdir()) == ["ablation.csv", "ablation.md"]
    assert rows["none"]["steps"] == "none"
    (out / "ablation.png").write_bytes(b"old")
    text = run(capsys, "ablate", TINY, "--passes", "checkpoint", "--no-time", "--no-errors", "--out", out)
    assert f"{out / 'ablation.png'} is of an earlier run: there are no times to draw" in text
    assert "true steps: none;" in text


@pytest.mark.parametrize("name", ["normalized", "softmax"])
def test_models_whose_mean_is_constant_have_gradients_that_say_something(models, tmp_path, capsys, name):
    """The gradients of their mean are rounding, which bfloat16 changes by as much as they are."""
    options = ["--input", "Bx8", "--batch-size", "4", "--passes", "amp", "--no-time", "--out", "t.csv"]
    run(capsys, "ablate", f"{models}:{name}", *options)
    rows = table(tmp_path / "t.csv")
    assert 1e-4 < float(rows["amp"]["gradient_error"]) < 0.1
    assert "loss=the output's own, else the mean of the output times random weights" in rows["none"]["config"]


def test_an_outputs_own_loss_is_the_loss_and_equal_outputs_do_not_cancel():
    given = torch.tensor(3.0)
    assert _weighted({"loss": given, "logits": torch.randn(4)}) is given
    ones = torch.ones(100)
    assert _weighted((ones, -ones)).abs() > 0.01
    assert torch.equal(_weighted(ones), _weighted(ones))


def test_conflicts_and_nothing_to_do_are_rows_with_reasons(tmp_path, capsys):
    passes = "checkpoint,checkpoint:blocks=blocks.*,outer_product"
    text = run(capsys, "ablate", NET, *INPUT, "--passes", passes, "--no-time", "--out", tmp_path / "t.csv")
    rows = table(tmp_path / "t.csv")
    assert rows["checkpoint + checkpoint(blocks='blocks.*')"]["kind"] == "refused"
    assert "checkpoint(blocks='blocks.*')" in rows["checkpoint + checkpoint(blocks='blocks.*')"]["problem"]
    assert rows["outer_product"]["problem"].startswith("outer_product: found nothing to do")
    assert rows["outer_product"]["peak_bytes"] == ""
    assert "outer_product: outer_product: found" not in text
    assert "outer_product: found nothing to do" in text


def test_true_steps_measure_memory_too(tmp_path, capsys):
    run(capsys, "ablate", TINY, *CPU, "--real", "--passes", "checkpoint", "--no-time", "--out", tmp_path / "t.csv")
    run(capsys, "profile", TINY, *CPU, "--real", "--passes", "checkpoint", "--json", tmp_path / "r.json")
    rows = table(tmp_path / "t.csv")
    assert int(rows["checkpoint"]["peak_bytes"]) == MemoryReport.load(tmp_path / "r.json").peak
    assert "training step on cpu, measured on a true step" in rows["none"]["subject"]


def test_steps_of_another_batch_and_inference(tmp_path, capsys):
    file = tmp_path / "t.csv"
    options = ["--infer", "--steps-batch", "2", "--repeats", "1", "--passes", "amp", "--out", file]
    run(capsys, "ablate", NET, *INPUT, *options)
    rows = table(file)
    assert "inference on cuda" in rows["none"]["subject"]
    assert "4x12x16" in rows["none"]["subject"]
    assert rows["none"]["steps_on"] == "cpu, batch 2"
    assert float(rows["amp"]["loss_error"]) > 0


def test_a_narrow_terminal_has_no_categories(capsys, monkeypatch):
    from rich.console import Console

    from memopt import ablation_table
    from memopt.ablation import Ablation, provenance
    from tests.test_ablation import ablation

    found = Ablation(ablation((100, 1.0), (50, 1.5)).rows, provenance(), {})
    for row in found.rows:
        row.report.peak_by_category, row.report.off_device = {"activations": 10}, {}
    for width in (150, 80):
        ablation_table.print_table(found, Console(width=width))
    wide, narrow = capsys.readouterr().out.split("true steps")[1:]
    assert "activ." in wide
    assert "activ." not in narrow
    assert all(len(line) <= 80 for line in narrow.splitlines()[2:])
    for text in (wide, narrow):
        assert "0.50" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--passes", ""], "--passes names no pass; leave it out to ablate every exact pass that applies"),
        (["--passes", "chekpoint"], "unknown pass 'chekpoint'. Did you mean 'checkpoint'?"),
        (["--repeats", "0"], "--repeats must be a whole number of at least 1"),
        (["--steps-batch", "x"], "--steps-batch must be a whole number of at least 1"),
        (["--out", "table.txt"], "--out table.txt: a file ends in .md, .csv, .png; a folder has no ending"),
        (["--out", "p.png", "--no-time"], "--out p.png: the picture shows memory against time; leave out --no-time"),
        (["--out", "t.md", "--out", "t.md"], "--out names t.md twice"),
        (["--real", "--device", "cuda"], "there is no CUDA device here for a real profile; leave out real (--real)"),
        (["--passes", "checkpoint,amp,checkpoint"], "checkpoint is given twice; a pass has one row"),
        (["--preset", "huge", "--out", "new"], "huge"),
        (["--out", "/dev/null/new"], "--out /dev/null/new: cannot make the folder: Not a directory"),
        (["--out", "missing/t.md"], "cannot write missing/t.md: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in fails(capsys, "ablate", TINY, *options)
    assert list(tmp_path.iterdir()) == []


def test_steps_of_another_batch_need_an_input_that_has_it(capsys):
    message = fails(capsys, "ablate", NET, "--input", "sample=4x12x16", "--steps-batch", "2")
    assert "no --input depends on the batch size" in message


def test_a_new_folder_may_hold_another_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ["--out", "new", "--out", "new/t.md", "--no-time", "--no-errors"]
    run(capsys, "ablate", NET, *INPUT, "--passes", "set_to_none", *out)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["ablation.csv", "ablation.md", "t.md"]
