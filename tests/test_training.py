"""The loop: what it leaves, and what its results do not depend on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memopt import InputError, MemoptError
from memopt.recipe import configure, load_recipe
from memopt.training import Batches, Trainer, seed_for, train
from tests.training_jobs import ROOT, TINY, gradients, hae_trainer


def tiny(**values):
    recipe = load_recipe(TINY)
    return recipe, configure(recipe, None, values)


def go(out, resume=False, **values):
    return train(*tiny(**values), out=out, resume=resume)


def weights(out, name="model"):
    return load_file(out / f"{name}.safetensors")


def losses_of(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def relative(a, b):
    """Norm of the difference of two sets of gradients over the norm of one."""
    assert a.keys() == b.keys()
    difference = sum((a[k] - b[k]).double().square().sum() for k in a)
    return float((difference / sum(b[k].double().square().sum() for k in b)).sqrt())


def test_a_run_leaves_what_it_promises(tmp_path):
    out = tmp_path / "run"
    result = go(out, sample_every=4)
    assert result.step == 12
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() and "tfevents" not in p.name} - {
        ".lock"
    }
    checkpoint = {f"{n}.safetensors" for n in ("model", "ema")} | {"optimizer.pt", "state.json", "manifest.json"}
    assert names == (
        {"model.safetensors", "ema.safetensors", "config.json", "metrics.jsonl", "loss.png", "samples.png"}
        | {f"samples/step_{s:08d}.png" for s in (4, 8, 12)}
        | {f"checkpoints/step_{s:08d}/{f}" for s in (8, 12) for f in checkpoint}
    )
    assert list((out / "tensorboard").glob("events.*"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines] == result.losses
    assert {
        "lr",
        "samples_per_second",
        "device_peak_bytes",
        "device_reserved_bytes",
        "process_bytes",
    } <= lines[-1].keys()
    assert sum(result.losses[-3:]) < sum(result.losses[:3])
    described = json.loads((out / "config.json").read_text())
    assert described["config"]["seed"] == 0
    assert described["parameters"] == 824
    for picture in ("loss.png", "samples.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        go(tmp_path / name, seed=seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert same(weights(tmp_path / "a", "ema"), weights(tmp_path / "b", "ema"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


VARIANTS = [
    {},
    {"passes": "checkpoint,set_to_none,cache_cleanup"},
    {"passes": "amp"},
    {"passes": "amp:dtype=fp16", "grad_clip": "0.5"},
    {"lr_anneal": True, "warmup_steps": 5, "weight_decay": 0.1},
    {"ema_device": "cpu", "microbatch": 3},
    {"ema_decay": "none", "num_workers": 1},
]


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, values):
    go(tmp_path / "whole", **values)

    class Stop(Exception):
        pass

    recipe, config = tiny(**values)
    loss, calls = recipe.loss, []

    def fails(*args):
        calls.append(1)
        if len(calls) == 7 * (3 if "microbatch" in values else 1):
            raise Stop
        return loss(*args)

    recipe.loss = fails
    with pytest.raises(Stop):
        train(recipe, config, out=tmp_path / "cut")
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    go(tmp_path / "cut", resume=True, **values)
    names = ["model"] if values.get("ema_decay") == "none" else ["model", "ema"]
    for name in names:
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "cut", name))
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "cut")


def test_exact_passes_do_not_change_training(tmp_path):
    go(tmp_path / "plain")
    go(tmp_path / "passes", passes="checkpoint,set_to_none,cache_cleanup")
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "passes"))


def test_workers_change_nothing(tmp_path):
    go(tmp_path / "none", num_workers=0)
    go(tmp_path / "two", num_workers=2)
    assert same(weights(tmp_path / "none"), weights(tmp_path / "two"))


@pytest.fixture(scope="module")
def full_batch():
    return {double: gradients(hae_trainer(double=double)) for double in (True, False)}


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_microbatches_equal_the_full_batch_on_hae(micro, full_batch):
    assert relative(gradients(hae_trainer(microbatch=micro)), full_batch[True]) <= 1e-12


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_microbatches_in_float32_are_as_close_to_float64_as_the_full_batch(micro, full_batch):
    """Convolutions of another batch size add up in another order: in float32 that alone is 1e-6 to 3e-6."""
    reference = full_batch[True]
    rounding = relative(full_batch[False], reference)
    assert rounding < 1e-5
    assert relative(gradients(hae_trainer(microbatch=micro, double=False)), reference) <= 2 * rounding


def test_microbatches_keep_no_more_than_their_share(tmp_path):
    sizes = []
    recipe, config = tiny(microbatch=3)
    loss = recipe.loss
    recipe.loss = lambda c, m, batch: sizes.append(len(batch["x"])) or loss(c, m, batch)
    train(recipe, config, out=tmp_path / "run")
    assert sizes == [3, 3, 2] * 12


def torchrun(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("null_rows", "passes"),
    [
        ((1,), ""),
        ((2, 3), ""),
        ((0, 1, 2, 3), "checkpoint"),
        ((2, 3), "outer_product,fused_attention"),
        ((2, 3), "outer_product:mode=sparse"),
    ],
    ids=[
        "mixed",
        "all dropped on one rank",
        "all dropped everywhere, with checkpoint",
        "all dropped on one rank, rank one",
        "all dropped on one rank, sparse",
    ],
)
def test_two_processes_give_the_gradients_of_one(tmp_path, null_rows, passes):
    file = tmp_path / "gradients.pt"
    rows = ",".join(map(str, null_rows))
    torchrun("-m", "tests.training_jobs", str(file), rows, passes)
    trainer = hae_trainer(null_rows)
    alone, together = gradients(trainer), torch.load(file, weights_only=True)
    assert len(alone) == len(list(trainer.model.parameters()))  # every parameter has one, whatever is dropped
    assert relative(together, alone) <= 1e-12


def test_two_processes_train_like_one(tmp_path):
    values = ["--set", "dropout=0", "ema_device=cpu", "--microbatch", "2"]
    torchrun("-m", "memopt.cli", "train", str(TINY), "--out", str(tmp_path / "two"), *values)
    go(tmp_path / "one", dropout=0, ema_device="cpu")
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert relative(two, one) < 1e-5
    assert relative(weights(tmp_path / "two", "ema"), weights(tmp_path / "one", "ema")) < 1e-5


def test_batches_cover_every_epoch_and_split_by_process():
    steps = range(10)
    whole = [i for batch in Batches(20, 6, 7, steps) for i in batch]
    assert sorted(whole[:20]) == sorted(whole[20:40]) == list(range(20))
    assert whole[:20] != whole[20:40]
    halves = [list(Batches(20, 6, 7, steps, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == list(Batches(20, 6, 7, steps))
    assert list(Batches(20, 6, 7, range(4, 10))) == list(Batches(20, 6, 7, steps))[4:]


def test_seeds_are_stable():
    assert seed_for(0, "step", 1, 0) == seed_for(0, "step", 1, 0) != seed_for(0, "step", 2, 0)
    assert 0 <= seed_for("x") < 2**32


def test_ema_follows_its_formula(tmp_path):
    trainer = Trainer(*tiny(ema_decay=0.5), data=None, cache=Path("unused"))
    expected = None
    for data in trainer.loader(range(4)):
        trainer.train_step(data)
        now = trainer.model.inp.weight.detach().clone()
        decay = min(0.5, (1 + trainer.step) / (10 + trainer.step))
        expected = now if expected is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(trainer.ema.module.inp.weight, expected)


def test_sampling_uses_the_average_and_leaves_the_weights(tmp_path):
    recipe, config = tiny(passes="cache_cleanup")
    trainer = Trainer(recipe, config, data=None, cache=Path("unused"))
    for data in trainer.loader(range(3)):
        trainer.train_step(data)
    live = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    average = {k: v.clone() for k, v in trainer.ema.module.state_dict().items()}
    seen = []
    sample = recipe.sample

    def watch(config, model, generator):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        assert not model.training
        return sample(config, model, generator)

    recipe.sample = watch
    assert trainer.sample(tmp_path / "x.png")
    assert same(seen[0], average)
    assert same(dict(trainer.model.state_dict()), live)
    assert same(dict(trainer.ema.module.state_dict()), average)
    assert trainer.model.training
    assert trainer.handle.report().rows[0].counts == {"cleanups": 1}


def test_cleanup_runs_at_phases_and_not_in_steps(tmp_path):
    out = tmp_path / "run"
    recipe, config = tiny(passes="cache_cleanup", sample_every=6)
    from unittest import mock

    with mock.patch("gc.collect") as collect:
        train(recipe, config, out=out)
    assert collect.call_count == 3 + 2  # three checkpoints, two sample grids in twelve steps


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    recipe, config = tiny()
    loss, calls = recipe.loss, []

    def breaks(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == 8 else 1)

    recipe.loss = breaks
    with pytest.raises(MemoptError, match=r"the loss is not finite at step 8. Lower lr"):
        train(recipe, config, out=tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    recipe, config = tiny(lr=1e10, save_every=1)
    loss = recipe.loss
    recipe.loss = lambda *args: loss(*args) * 1e30
    recipe.optimizer = lambda config, model: torch.optim.SGD(model.parameters(), lr=config.lr)
    with pytest.raises(MemoptError, match="the weights are not finite after step 1; they are not saved"):
        train(recipe, config, out=tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    with pytest.raises(InputError, match="lr must be positive and finite"):
        tiny(lr="inf")


def rates(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def test_settings_changed_for_a_resume_take_effect(tmp_path):
    out = tmp_path / "run"
    go(out, log_every=1)
    go(out, resume=True, steps=16, log_every=1, lr=1e-5, weight_decay=0.3)
    assert [rates(out)[step] for step in (12, 13, 16)] == [1e-2, 1e-5, 1e-5]
    state = torch.load(out / "checkpoints" / "step_00000016" / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["weight_decay"] == 0.3


def test_annealing_over_more_steps_goes_on_where_a_longer_run_would_be(tmp_path):
    go(tmp_path / "short", log_every=1, lr_anneal=True)
    go(tmp_path / "short", resume=True, steps=24, log_every=1, lr_anneal=True)
    go(tmp_path / "long", steps=24, log_every=1, lr_anneal=True)
    short, long = rates(tmp_path / "short"), rates(tmp_path / "long")
    assert all(short[step] == long[step] for step in range(13, 25))


def test_other_data_on_resume_is_refused(tmp_path):
    go(tmp_path / "run")
    with pytest.raises(
        InputError, match="was trained on 64 samples, but there are 48 now: give the --data of that run"
    ):
        go(tmp_path / "run", resume=True, steps=16, samples=48)


def test_an_average_that_is_no_longer_kept_goes(tmp_path):
    go(tmp_path / "run")
    go(tmp_path / "run", resume=True, steps=16, ema_decay="none")
    assert not (tmp_path / "run" / "ema.safetensors").exists()


def test_damaged_metrics_are_named_and_the_rest_is_kept(tmp_path, capsys):
    out = tmp_path / "run"
    go(out)
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    lines[4], lines[6] = b"\xff\x00", b"17"
    (out / "metrics.jsonl").write_bytes(b"\n".join(lines))
    go(out, resume=True, steps=16)
    assert "is damaged: 2 of the first 12 steps are missing" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    (out / "metrics.jsonl").unlink()
    go(out, resume=True, steps=16)  # nothing to sum up


def test_two_runs_cannot_share_a_folder(tmp_path):
    out = tmp_path / "run"
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(60)"
    )
    out.mkdir()
    other = subprocess.Popen([sys.executable, "-c", hold, str(out / ".lock")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(InputError, match=r"another run is writing into .*: wait for it, or choose another --out"):
            go(out)
    finally:
        other.kill()
        other.communicate()
    go(out)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    go(tmp_path / "run")
    before = weights(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run: add --resume to go on with it, or choose another --out"):
        go(tmp_path / "run", seed=5)
    assert same(before, weights(tmp_path / "run"))


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    go(tmp_path / "run")
    before = weights(tmp_path / "run")
    assert go(tmp_path / "run", resume=True).step == 12
    assert same(before, weights(tmp_path / "run"))
    with pytest.raises(InputError, match="at step 12 already, beyond --steps 5"):
        go(tmp_path / "run", resume=True, steps=5)
