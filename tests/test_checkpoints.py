"""Checkpoints against SIGKILL, damage and full disks."""

import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from memopt import InputError, checkpoints
from tests.test_training import go, losses_of, same, weights
from tests.training_jobs import ROOT, TINY, killable

RUNS = 50


@pytest.fixture(scope="module")
def fork():
    """Processes that start in milliseconds: forked from a server that has everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "tests.training_jobs",
            "accelerate",
            "matplotlib.figure",
            "torch.utils.tensorboard.writer",
            "safetensors.torch",
        ]
    )
    return context


def run_to_end(fork, out, resume=False):
    process = fork.Process(target=killable, args=(str(out), resume))
    start = time.monotonic()
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - start


def test_fifty_killed_runs_resume_to_the_same_bits(fork, tmp_path):
    reference = tmp_path / "reference"
    run_to_end(fork, reference)
    duration = min(run_to_end(fork, tmp_path / "warm"), 10)
    expected = {name: weights(reference, name) for name in ("model", "ema")}
    losses = losses_of(reference)
    chance = random.Random(0)
    during_writing = after_some_steps = 0
    for i in range(RUNS):
        out = tmp_path / f"run{i}"
        process = fork.Process(target=killable, args=(str(out), False))
        process.start()
        if i % 2:  # while a checkpoint is being written
            nth, seen, partial = chance.randrange(1, 14), set(), out / "checkpoints"
            while process.is_alive() and len(seen) < nth:
                seen |= {p.name for p in partial.glob(".partial-step_*")} if partial.exists() else set()
            time.sleep(chance.uniform(0, 0.004))
        else:
            time.sleep(chance.uniform(0, duration))
        process.kill()
        process.join()
        left = list((out / "checkpoints").glob("*"))
        during_writing += any(p.name.startswith(".partial") for p in left)
        after_some_steps += any(p.name.startswith("step_") for p in left)
        run_to_end(fork, out, resume=True)
        for name, tensors in expected.items():
            assert same(tensors, weights(out, name)), (i, name)
        assert losses_of(out) == losses
        assert not list((out / "checkpoints").glob(".partial*"))
    assert during_writing >= 5  # the test met what it is about
    assert after_some_steps >= 20


DAMAGES = {
    "truncated": (lambda d: truncate(d / "model.safetensors"), r"model.safetensors has \d+ bytes instead of \d+"),
    "altered": (lambda d: flip(d / "ema.safetensors"), "ema.safetensors was altered: its checksum differs"),
    "optimizer": (lambda d: flip(d / "optimizer.pt"), "optimizer.pt was altered"),
    "missing": (lambda d: (d / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json cannot be read"),
    "bad manifest": (lambda d: (d / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    "odd manifest": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
}


def truncate(file):
    file.write_bytes(file.read_bytes()[:-10])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, capsys, damage):
    out = tmp_path / "run"
    go(out)
    expected = weights(out)
    harm, message = DAMAGES[damage]
    harm(out / "checkpoints" / "step_00000012")
    warnings = []
    found = checkpoints.newest(out / "checkpoints", warnings.append)
    assert found.step == 8
    assert len(warnings) == 1
    assert "step_00000012 is broken (" in warnings[0]
    assert re.search(message, warnings[0])
    capsys.readouterr()
    go(out, resume=True)
    text = capsys.readouterr().out
    assert "step_00000012 is broken" in text
    assert "resuming from" in text
    assert same(expected, weights(out))
    assert checkpoints.verify(out / "checkpoints" / "step_00000012") is None


def test_all_damaged_starts_anew(tmp_path, capsys):
    out = tmp_path / "run"
    go(out)
    expected = weights(out)
    for folder in (out / "checkpoints").iterdir():
        truncate(folder / "optimizer.pt")
    go(out, resume=True)
    assert "step 0 of 12" in capsys.readouterr().out
    assert same(expected, weights(out))


def test_what_a_user_put_beside_the_checkpoints_stays(tmp_path):
    out = tmp_path / "run"
    go(out)
    mine = out / "checkpoints" / "step_00000008_mine"
    shutil.copytree(out / "checkpoints" / "step_00000008", mine)
    (out / "checkpoints" / "step_best").mkdir()
    go(out, resume=True, steps=24)
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names == {"step_00000020", "step_00000024", "step_00000008_mine", "step_best"}


def test_broken_checkpoints_beyond_the_resumed_step_make_room(tmp_path):
    """Counted among the newest, they would push out the good ones that are written after them."""
    out = tmp_path / "run"
    go(out)
    for folder in (out / "checkpoints").iterdir():
        truncate(folder / "model.safetensors")
    (out / "model.safetensors").unlink()
    go(out, resume=True, steps=6)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert (out / "model.safetensors").is_file()


def test_a_manifest_that_lists_too_little_is_no_checkpoint(tmp_path):
    go(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_00000012"
    (newest / "manifest.json").write_text('{"files": {}}')
    assert checkpoints.verify(newest) == ("manifest.json does not list model.safetensors, optimizer.pt, state.json")


def test_old_checkpoints_go_and_the_newest_stay(tmp_path):
    go(tmp_path / "run", save_every=1, keep=4)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step_{i:08d}" for i in (9, 10, 11, 12)]


LIMITED = """
import resource, sys
from memopt.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["train", {recipe!r}, "--out", {out!r}, "--resume", "--steps", "24", "--set", "width=64"]))
"""


def test_a_disk_that_refuses_to_write(tmp_path):
    """A limit on file sizes makes every library's own writing fail, as a full disk does."""
    out = tmp_path / "run"
    go(out, width=64)
    before = {p: p.read_bytes() for p in (out / "checkpoints" / "step_00000012").iterdir()}
    limit = (out / "model.safetensors").stat().st_size // 2
    program = LIMITED.format(limit=limit, recipe=str(TINY), out=str(out))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "could not save the checkpoint of step 16" in done.stderr
    assert "The one before it, step_00000012, is untouched. When it can be written, go on with --resume." in done.stderr
    assert "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in (out / "checkpoints" / "step_00000012").iterdir()} == before
    assert not list((out / "checkpoints").glob(".partial*"))
    go(out, resume=True, steps=24, width=64)


def test_a_full_disk(tmp_path):
    """A real one: a file system of 300 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a file system here")
    try:
        command = [sys.executable, "-m", "memopt.cli", "train", str(TINY), "--out", str(disk / "run")]
        command += ["--set", "width=64", "ema_decay=none", "save_every=1", "keep=100", "log_every=12", "--steps", "100"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        assert "could not save the checkpoint of step" in done.stderr
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        kept = sorted((disk / "run" / "checkpoints").glob("step_*"))
        assert kept
        assert all(checkpoints.verify(path) is None for path in kept)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Other(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 4)


def save(folder, module, step=1):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return checkpoints.save(folder, step, modules={"model": module}, optimizer=optimizer, state={}, keep=2)


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    path = save(tmp_path, Other(8)) / "model.safetensors"
    model = Other(16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        InputError, match=r"weights of another model: a.weight is \[8, 4\] in the file and \[16, 4\] in the"
    ):
        checkpoints.load_weights(path, model)
    assert same(before, dict(model.state_dict()))
    with pytest.raises(InputError, match=r"0.weight is not in the file; .*a.bias is not in the model"):
        checkpoints.load_weights(path, nn.Sequential(nn.Linear(4, 8)))


def test_tied_weights_round_trip(tmp_path):
    model, again = Other(4), Other(4)
    model.b.weight = model.a.weight
    again.b.weight = again.a.weight
    checkpoints.load_weights(save(tmp_path, model) / "model.safetensors", again)
    assert torch.equal(again.b.weight, model.a.weight)
    assert again.b.weight is again.a.weight


def test_weights_are_plain_safetensors(tmp_path):
    model = Other(4)
    tensors = load_file(save(tmp_path, model) / "model.safetensors")
    assert same(tensors, {k: v.detach() for k, v in model.state_dict().items()})
