"""The scripts that launch HAE V2 on several GPUs, here with two processes on the CPU."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hae_runs import HAE, TINY, patients
from tests.training_jobs import ROOT

LAUNCH = HAE / "launch"
SCRIPTS = ["train.sh", "train.slurm", "translate.sh", "translate.slurm"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return patients(tmp_path_factory.mktemp("launch") / "raw")


def launch(script, *arguments, folder=ROOT, path="", **environment):
    python = Path(sys.executable).parent
    values = {
        **os.environ,
        "PATH": os.pathsep.join(filter(None, [path, str(python), os.environ["PATH"]])),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=values, capture_output=True, text=True, timeout=300)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_all_scripts_are_tested():
    assert sorted(file.name for file in LAUNCH.iterdir()) == SCRIPTS
    assert all(os.access(LAUNCH / name, os.X_OK) for name in SCRIPTS if name.endswith(".sh"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_whole_and_says_what_it_needs(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    done = launch(LAUNCH / name)
    assert (done.returncode, done.stdout) == (2, "")
    called = f"{'sbatch ' if name.endswith('slurm') else ''}{LAUNCH / name}"
    verb = "train" if name.startswith("train") else "run examples/hae_v2 translate"
    assert done.stderr == f"usage: {called} RUN_FOLDER [options of memopt {verb}]\n"


def fake_slurm(folder):
    """A folder with commands that stand for Slurm's: a job of one node, which is this machine."""
    folder.mkdir()
    commands = {
        "srun": f'echo "$@" >> "{folder}/srun.txt"\nexec "$@"\n',
        "scontrol": '[ "$*" = "show hostnames node[1-2]" ] || exit 9\necho localhost\nsleep 0.3\necho node2\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    return folder


def check(run, trained, translated):
    assert trained.returncode == 0, trained.stdout + trained.stderr
    described = json.loads((run / "config.json").read_text())
    assert described["processes"] == 2
    assert (described["config"]["batch_size"], described["config"]["steps"]) == (4, 2)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "ema.safetensors").is_file()
    assert translated.returncode == 0, translated.stdout + translated.stderr
    out = run / "translate"
    assert re.search(r">processes</th><td>2<", (out / "report.html").read_text())
    settings = json.loads((out / "batches" / "test" / "settings.json").read_text())
    assert (settings["batch_size"], settings["steps"], settings["slices"]) == (3, 2, 12)
    assert [file.name for file in sorted((out / "batches" / "test").glob("*.safetensors"))] == [
        f"batch_{number:05d}.safetensors" for number in range(4)
    ]
    assert len((out / "slices.csv").read_text().splitlines()) == 1 + 12
    assert len(list((out / "nifti").iterdir())) == 4


def settings(raw, cache):
    """Further arguments of a training."""
    return ["--data", raw, "--cache", cache, "--set", *TINY, "steps=2", "save_every=2", "log_every=1", "lr=1e-2"]


def test_the_scripts_for_one_machine(raw, tmp_path):
    run, cache = tmp_path / "a run", tmp_path / "cache"
    values = {"PROCESSES": "2", "PRESET": "quickstart", "folder": tmp_path}
    trained = launch(LAUNCH / "train.sh", run, *settings(raw, cache), BATCH="4", PORT=free_port(), **values)
    more = ["--cache", cache, "--steps", "2", "--guidance", "2"]
    translated = launch(LAUNCH / "translate.sh", run, *more, BATCH="3", PORT=free_port(), **values)
    check(run, trained, translated)


def test_the_scripts_for_a_cluster(raw, tmp_path):
    path = fake_slurm(tmp_path / "bin")
    run, cache = tmp_path / "run", tmp_path / "cache"
    values = {
        "path": str(path),
        "PRESET": "quickstart",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    for name in ("train.slurm", "translate.slurm"):  # Slurm runs a copy from a folder of its own
        shutil.copy(LAUNCH / name, tmp_path / name)
    trained = launch(
        tmp_path / "train.slurm", run, *settings(raw, cache), BATCH="4", PROCESSES="2", PORT=free_port(), **values
    )
    more = ["--cache", cache, "--steps", "2", "--guidance", "2"]
    translated = launch(tmp_path / "translate.slurm", run, *more, BATCH="3", PORT=free_port(), **values)
    check(run, trained, translated)
    first, second = (path / "srun.txt").read_text().splitlines()
    assert (
        "torch.distributed.run --nnodes 1 --nproc_per_node 2 --rdzv_id 7 --rdzv_backend c10d --rdzv_endpoint " in first
    )
    assert re.search(r"--rdzv_endpoint localhost:\d+ -m memopt.cli train examples/hae_v2 --preset quickstart ", first)
    assert re.search(r"--rdzv_endpoint localhost:\d+ -m memopt.cli run examples/hae_v2 translate --checkpoint ", second)
