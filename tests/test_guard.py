"""A run that runs out of memory ends as one that was planned right: same weights, no step and no data lost."""

import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import memopt
from memopt.cli import main
from memopt.estimate import profile_recipe
from memopt.guard import Guard
from memopt.memory import limit
from memopt.planning import Plan
from memopt.recipe import configure, load_recipe
from memopt.training import Trainer, train
from tests.training_jobs import TINY

tiny = load_recipe(TINY)
WIDE = {"batch_size": 256, "samples": 512, "dropout": 0.0, "width": 32, "steps": 5, "save_every": 5}


def config_of(**changes):
    return configure(tiny, None, {**WIDE, **changes})


def peak(**changes):
    return profile_recipe(tiny, config_of(**changes), device="cpu").peak


def same(a: Path, b: Path):
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == two.keys()
    return all(torch.allclose(one[name], two[name], rtol=0, atol=1e-6) for name in one)


def steps_of(out: Path):
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_step_that_does_not_fit_goes_on_in_parts(tmp_path, capsys):
    budget = (peak() + peak(microbatch=128)) // 2
    with limit(budget):
        train(tiny, config_of(), out=tmp_path / "short")
    said = " ".join(capsys.readouterr().out.split())
    assert "out of memory in step 1 (CUDA out of memory. Tried to allocate" in said
    assert "the step runs again with microbatches of 128" in said
    assert "microbatches of 64" not in said
    train(tiny, config_of(microbatch=128), out=tmp_path / "right")
    assert steps_of(tmp_path / "short") == steps_of(tmp_path / "right") == [1, 2, 3, 4, 5]
    assert same(tmp_path / "short", tmp_path / "right")


def test_a_planned_run_is_inside_and_as_good(tmp_path):
    budget = int(0.8 * peak())
    with limit(budget * 1.02):  # the samples on the CPU count here, too
        train(tiny, config_of(budget=f"{budget} B"), out=tmp_path / "planned")
    plan = Plan.load(tmp_path / "planned" / "plan.toml")
    assert plan.passes
    assert plan.budget == budget
    assert plan.peak <= budget
    train(tiny, config_of(), out=tmp_path / "plain")
    assert same(tmp_path / "planned", tmp_path / "plain")


def test_a_plan_that_was_too_large_becomes_tighter(tmp_path, capsys):
    budget = peak()
    with limit(int(0.93 * budget)):
        train(tiny, config_of(budget=f"{budget} B"), out=tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "the step runs again with a plan for" in said
    stored = Plan.load(tmp_path / "run" / "plan.toml")
    assert stored.budget < budget
    assert stored.passes
    train(tiny, config_of(), out=tmp_path / "plain")
    assert same(tmp_path / "run", tmp_path / "plain")
    more = config_of(budget=f"{budget} B", steps=7)
    train(tiny, more, out=tmp_path / "run", resume=True)
    assert Plan.load(tmp_path / "run" / "plan.toml") == stored  # a resumed run does not try what failed


class Hungry(type(tiny)):
    """Runs out of memory in the first calls of the loss, with a large tensor in hand."""

    def __init__(self, failures):
        self.failures, self.calls, self.held, self.alive = failures, 0, [], []

    def loss(self, config, model, batch):
        self.calls += 1
        self.alive.append(sum(ref() is not None for ref in self.held))
        loss = super().loss(config, model, batch)
        if self.calls <= self.failures:
            large = torch.zeros(1000)
            self.held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate it all.\nAnd more.")
        return loss


def test_it_ends():
    recipe = Hungry(10**9)
    trainer = Trainer(recipe, config_of(batch_size=8), data=None, cache=Path("unused"))
    warned = []
    with pytest.raises(memopt.MemoptError) as error:
        Guard(trainer, warn=warned.append).step(next(iter(trainer.loader(range(1)))))
    assert recipe.calls == 4
    assert [w.rpartition(" ")[2] for w in warned] == ["4", "2", "1"]
    text = str(error.value)
    assert (
        "out of memory in step 1 (CUDA out of memory. Tried to allocate it all.), and nothing smaller is left" in text
    )
    assert "Tried: microbatches of 4; microbatches of 2; microbatches of 1." in text
    assert "--allow" in text


def test_nothing_is_held_of_what_failed():
    recipe = Hungry(2)
    trainer = Trainer(recipe, config_of(batch_size=8), data=None, cache=Path("unused"))
    Guard(trainer, warn=lambda text: None).step(next(iter(trainer.loader(range(1)))))
    assert recipe.alive[:3] == [0, 0, 0]
    assert len(recipe.held) == 2


class Normed(Hungry):
    def model(self, config):
        return nn.Sequential(nn.BatchNorm1d(8), super().model(config))


def test_statistics_count_a_batch_once():
    trainer = Trainer(Normed(1), config_of(batch_size=8, microbatch=8), data=None, cache=Path("unused"))
    guard = Guard(trainer, warn=lambda text: None)
    guard.step(next(iter(trainer.loader(range(1)))))
    assert trainer.microbatch == 4
    assert trainer.model[0].num_batches_tracked == 2  # the two halves


def test_weights_that_have_changed_are_not_changed_again():
    trainer = Trainer(tiny, config_of(batch_size=8), data=None, cache=Path("unused"))
    guard = Guard(trainer, warn=lambda text: None)
    data = next(iter(trainer.loader(range(1))))

    def fails_late(optimizer, args, kwargs):
        raise torch.OutOfMemoryError("late")

    trainer.optimizer.register_step_post_hook(fails_late)
    with pytest.raises(memopt.MemoptError, match="while the optimizer was changing weights: this run cannot go on"):
        guard.step(data)


def test_states_that_were_being_made_are_made_again():
    trainer = Trainer(tiny, config_of(batch_size=8), data=None, cache=Path("unused"))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    guard = Guard(trainer, warn=lambda text: None)
    data = next(iter(trainer.loader(range(1))))
    calls = []

    def fails_early(optimizer, args, kwargs):
        calls.append(len(optimizer.state))
        if len(calls) == 1:
            first = next(trainer.model.parameters())
            optimizer.state[first]["exp_avg"] = torch.zeros_like(first)
            raise torch.OutOfMemoryError("early")

    trainer.optimizer.register_step_pre_hook(fails_early)
    guard.step(data)
    assert calls == [0, 0]
    assert any((a != b).any() for a, b in zip(before, trainer.model.parameters(), strict=True))


class TestCommandLine:
    def test_a_budget(self, tmp_path, capsys):
        size = f"{int(0.8 * peak())}B"
        sets = ["width=32", "dropout=0", "samples=512"]
        arguments = ["train", str(TINY), "--out", str(tmp_path / "run"), "--steps", "2", "--batch-size", "256"]
        assert main([*arguments, "--budget", size, "--set", *sets]) == 0
        said = capsys.readouterr().out
        assert "predicted peak" in said
        assert "passes:" in said
        assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["budget"] == size

    def test_the_largest_batch(self, tmp_path, capsys):
        size = f"{peak(batch_size=48)}B"
        arguments = ["train", str(TINY), "--out", str(tmp_path / "run"), "--steps", "1", "--batch-size", "auto"]
        assert main([*arguments, "--budget", size, "--set", "width=32", "dropout=0", "samples=512"]) == 0
        assert "batch size 48: predicted peak" in capsys.readouterr().out
        assert main([*arguments, "--set", "width=32"]) == 2
        assert "--batch-size auto needs to know what a step may take: give --budget SIZE" in capsys.readouterr().err

    def test_what_does_not_fit(self, tmp_path, capsys):
        arguments = ["train", str(TINY), "--out", str(tmp_path / "run"), "--budget", "2KiB"]
        assert main(arguments) == 2
        assert "no plan fits 2.00 KiB. The smallest budget that one fits is" in capsys.readouterr().err
        assert main([*arguments[:-1], "much"]) == 2
        assert "budget is a number of bytes or a text such as '8GiB'" in capsys.readouterr().err


def test_settings_are_kept():
    assert dataclasses.replace(config_of(budget="1GiB"), allow=("amp",)).allow == ("amp",)
    assert config_of(allow="amp,optimizer_8bit").allow == ("amp", "optimizer_8bit")
