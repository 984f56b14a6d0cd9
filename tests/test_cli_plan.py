"""`memopt plan`: what it prints, writes and refuses."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import memopt
from memopt.cli import main
from memopt.planning import Plan
from tests import nets
from tests.training_jobs import ROOT, TINY

NET = ["tests.nets:Net", "--input", "sample=512x4x16", "--hardware", "a100", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def plain_peak():
    model = nets.Net()
    return memopt.profile(model, torch.randn(512, 4, 16), optimizer=torch.optim.AdamW(model.parameters())).peak


def test_a_plan_is_printed_and_written(tmp_path, capsys):
    file, budget = tmp_path / "plan.toml", int(0.7 * plain_peak())
    assert main(["plan", *NET, "--budget", f"{budget}B", "--out", str(file)]) == 0
    said = capsys.readouterr().out
    assert "Net: training step on cpu, sample=512x4x16 float32" in said
    assert "predicted peak" in said
    assert "estimated time +" in said
    assert "on a100" in said
    assert "passes:" in said
    assert "because" in said
    assert f"wrote {file}" in said
    plan = Plan.load(file)
    assert 0 < plan.peak <= budget
    model = nets.Net()
    optimizer = torch.optim.AdamW(model.parameters())
    real = memopt.profile(model, torch.randn(512, 4, 16), optimizer=optimizer, passes=plan.passes, real=True)
    assert real.peak <= budget


def test_a_picture_of_many_budgets(tmp_path, capsys):
    file = tmp_path / "plan.png"
    assert main(["plan", *NET, "--pareto", str(file)]) == 0
    said = capsys.readouterr().out.splitlines()
    points = [line.split("  ") for line in said if "of plain's time" in line]
    assert any("checkpoint every block" in line for line in said)
    assert any("no passes" in line for line in said)
    assert len(points) >= 5
    picture = Image.open(file)
    assert picture.width > 600
    assert len(picture.getcolors(1 << 20) or range(99)) > 5


def test_a_recipe(tmp_path, capsys):
    assert main(["plan", str(TINY), "--budget", "1GiB", "--hardware", "t4"]) == 0
    assert "passes: none needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --budget SIZE for a plan, or --pareto FILE for a picture of many"),
        (["--budget", "lots"], "--budget is a number of bytes or a text such as '8GiB'"),
        (["--budget", "1KiB"], "no plan fits 1.00 KiB. The smallest budget that one fits is"),
        (["--budget", "1MiB", "--hardware", "abacus"], "unknown hardware 'abacus'"),
        (["--budget", "1MiB", "--allow", "checkpoint"], "allow='checkpoint': a plan can be allowed exact, amp"),
        (["--pareto", "a.png", "--out", "b.toml"], "--out writes the plan of a budget: give --budget, too"),
        (["--budget", "1MiB", "--out", "/proc/no/plan.toml"], "/proc/no"),
    ],
)
def test_bad_input(arguments, message, capsys):
    hardware = [] if "--hardware" in arguments else NET[3:5]
    assert main(["plan", *NET[:3], *hardware, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("a.png").exists()
    assert not os.path.exists("b.toml")


def dit():
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=3, sample_size=16, in_channels=4, out_channels=4
    )
    inputs = {
        "hidden_states": torch.randn(8, 4, 16, 16),
        "timestep": torch.arange(8),
        "class_labels": torch.arange(8),
    }
    return model, inputs, model.enable_gradient_checkpointing, lambda: model.is_gradient_checkpointing


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, use_cache=False, bos_token_id=0))
    tokens = torch.arange(128).view(2, 64) % 50
    how = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    inputs = {"input_ids": tokens, "labels": tokens}
    enable = getattr(model, f"{how}_checkpointing_enable")
    return model, inputs, enable, lambda: getattr(model, f"is_{how}_checkpointing")


@pytest.mark.parametrize("made", [dit, gpt2])
def test_the_model_s_own_checkpointing_is_a_peer(made):
    from memopt.planning import search
    from memopt.planning.pareto import by_hand

    model, inputs, enable, is_on = made()
    points = {point.name: point for point in by_hand(search(model, inputs, hardware="a100"))}
    own = points["the model's own checkpointing"]
    assert not is_on()
    plain = memopt.profile(model, inputs).peak
    enable()
    assert own.peak == memopt.profile(model, inputs).peak < plain
    assert own.name not in [point.name for point in by_hand(search(model, inputs, hardware="a100"))]  # it is on already
