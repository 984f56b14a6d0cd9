"""Small patients, and runs of a tiny HAE V2 on them, for tests of what is done with its weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import nibabel
import numpy as np
import torch

from examples.hae_v2.data import split_patients
from examples.hae_v2.simulate import MODALITIES, patient_name
from memopt.cli import main
from tests.training_jobs import ROOT

HAE = ROOT / "examples" / "hae_v2"
PATIENTS, SHAPE, LESION = 10, (40, 40, 6), (2, 5)
TINY = [
    "image_size=16",
    "slice_step=1",
    "model_channels=32",
    "channel_mult=1,1",
    "attention_resolutions=2",
    "sample_steps=2",
]
"""A model of 400,000 parameters."""
SHORT = [
    "steps=24",
    "batch_size=8",
    "lr=1e-2",
    "lr_anneal=false",
    "warmup_steps=0",
    "ema_decay=none",
    "weighting=noise",
]
"""A training after which the model tells lesions from healthy tissue a little."""


def patients(root: Path, lesion: Callable[[str], slice] = lambda name: slice(*LESION)) -> Path:
    """Patients in BraTS layout; the axial slices that `lesion` gives for a name have a bright square of 12 x 12."""
    for number in range(PATIENTS):
        rng, name = np.random.default_rng(number), patient_name(number)
        brain, seg = np.zeros(SHAPE, bool), np.zeros(SHAPE, np.uint8)
        brain[4:36, 4:36] = True
        x, y = rng.integers(6, 22, 2)
        seg[x : x + 12, y : y + 12, lesion(name)] = 4
        (root / name).mkdir(parents=True)
        for kind in MODALITIES:
            volume = brain * rng.integers(200, 300, SHAPE) + 400 * (seg > 0)
            nibabel.save(nibabel.Nifti1Image(volume.astype(np.int16), np.eye(4)), file_of(root, name, kind))
        nibabel.save(nibabel.Nifti1Image(seg, np.eye(4)), file_of(root, name, "seg"))
    return root


def file_of(root: Path, name: str, kind: str) -> Path:
    return root / name / f"{name}_{kind}.nii.gz"


def names(split: str) -> list[str]:
    """The patients of a split."""
    return split_patients([patient_name(number) for number in range(PATIENTS)], 0)[split]


def train(raw: Path, cache: Path, out: Path) -> Path:
    """A finished run."""
    arguments = ["--data", raw, "--cache", cache, "--out", out, "--set", *TINY, *SHORT]
    assert main(["train", str(HAE), *map(str, arguments)]) == 0
    return out


def copy(run: Path, out: Path) -> Path:
    """The weights and settings of a run, and what validation chose for them, but no results."""
    return shutil.copytree(run, out, ignore=shutil.ignore_patterns("translate", "sample", "checkpoints", "tensorboard"))


def times(folder: Path) -> dict[str, int]:
    """When each batch was written."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


def contents(folder: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """The bytes of the files that the patterns name."""
    return {str(f.relative_to(folder)): f.read_bytes() for pattern in patterns for f in sorted(folder.glob(pattern))}


def process(*arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    """The command line in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, *launcher, "-m", "memopt.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


class Calls:
    """Counts the calls of the model, by the number of samples."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __enter__(self) -> Calls:
        def count(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if type(module).__name__.startswith("HAEUNetModelV2"):
                self.sizes.append(len(arguments[0]))

        self._hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
