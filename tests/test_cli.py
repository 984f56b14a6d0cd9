"""The command line: what it says, and how it fails."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memopt.cli import main
from memopt.recipe import load_recipe
from tests.training_jobs import ROOT, TINY

HAE = ROOT / "examples" / "hae_v2"


def fails(capsys, *arguments):
    """Run a command that must end with exit code 2 and a message; returns the message."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stopped:  # argparse's own errors
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err
    return captured.err


def brats(folder, patients=3, shape=(48, 48, 12)):
    """A folder in BraTS layout with spheres for brains, quick to write."""
    import nibabel

    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    brain = (grid**2).sum(0) < 0.9
    for number in range(patients):
        name = f"BraTS2021_{number:05d}"
        (folder / name).mkdir(parents=True)
        for kind in ("flair", "t1", "t1ce", "t2"):
            volume = (brain * generator.integers(100, 1000, shape)).astype(np.int16)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / name / f"{name}_{kind}.nii.gz")
        seg = (brain & (((grid - 0.3) ** 2).sum(0) < 0.1)).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(seg, np.eye(4)), folder / name / f"{name}_seg.nii.gz")
    return folder


def replace(folder, kind, change):
    import nibabel

    path = folder / "BraTS2021_00001" / f"BraTS2021_00001_{kind}.nii.gz"
    image = nibabel.load(path)
    volume = change(np.asarray(image.dataobj).copy())
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)


def nan(volume):
    volume = volume.astype(np.float32)
    volume[5, 5, 5] = np.nan
    return volume


def label(volume):
    volume[20, 20, 5] = 9
    return volume


def train_hae(tmp_path, *more):
    return [
        "train",
        HAE,
        "--out",
        tmp_path / "run",
        "--cache",
        tmp_path / "cache",
        "--set",
        "slice_step=1",
        "image_size=16",
        *more,
    ]


DATA = {
    "no folder": (lambda d: shutil.rmtree(d), r"data folder .*brats does not exist"),
    "no patients": (lambda d: [shutil.rmtree(p) for p in d.iterdir()], r"no patient.*brats"),
    "one modality missing": (
        lambda d: (d / "BraTS2021_00001" / "BraTS2021_00001_t1ce.nii.gz").unlink(),
        r"BraTS2021_00001.*t1ce",
    ),
    "wrong shape": (lambda d: replace(d, "t2", lambda v: v[:-1]), r"BraTS2021_00001.*47.*48|BraTS2021_00001.*48.*47"),
    "four dimensions": (lambda d: replace(d, "t1", lambda v: v[..., None].repeat(2, -1)), r"BraTS2021_00001_t1.nii.gz"),
    "not a number": (lambda d: replace(d, "flair", nan), r"BraTS2021_00001_flair.nii.gz.*(NaN|finite)"),
    "label out of range": (
        lambda d: replace(d, "seg", label),
        r"BraTS2021_00001_seg.nii.gz.*label.*9|9.*allowed are 0",
    ),
}


@pytest.mark.parametrize("bad", DATA)
def test_bad_data(tmp_path, capsys, bad):
    folder = brats(tmp_path / "brats")
    harm, message = DATA[bad]
    harm(folder)
    text = fails(capsys, *train_hae(tmp_path, "--data", folder))
    assert "memopt train: error: " in text
    assert re.search(message, text), text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "1000"], r"batch size 1000 is larger than the data set of \d+ samples"),
        (["--set", "image_size=18"], r"image_size 18 is not divisible by 4"),
        (["--set", "num_classes=1"], r"class 1 \(lesion\), out of range for num_classes=1; set num_classes=2"),
        (["--set", "model_channels=48"], r"model_channels 48 \* channel_mult 1 = 48 is not a multiple of 32"),
        (["--set", "guidance="], "guidance needs at least one number"),
        (["--set", "attention_resolutions=3"], r"attention_resolutions must be among \[1, 2, 4\]"),
        (["--set", "drop_condition=5"], r"drop_condition must be in \[0, 1\]"),
        (["--set", "dropout=2"], r"dropout must be in \[0, 1\), got 2"),
    ],
)
def test_bad_hae_settings(tmp_path, capsys, more, message):
    text = fails(capsys, *train_hae(tmp_path, "--data", brats(tmp_path / "brats"), *more))
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no recipe folder nowhere"),
        ([ROOT / "docs"], "has no recipe.py; a recipe folder defines recipe"),
        ([TINY, "--preset", "big"], "recipe tiny has no preset 'big'; presets: small, wide"),
        ([TINY, "--set", "widht=3"], "recipe tiny has no option 'widht'. Did you mean 'width'?"),
        ([TINY, "--set", "width=wide"], r"recipe tiny: width: .*valid integer.*given: 'wide'"),
        ([TINY, "--set", "width"], "--set takes key=value, not 'width'"),
        ([TINY, "--steps", "0"], "recipe tiny: steps must be at least 1"),
        ([TINY, "--steps", "many"], r"recipe tiny: steps: .*given: 'many'"),
        ([TINY, "--set", "ema_decay=1"], r"ema_decay must be in \[0, 1\)"),
        ([TINY, "--set", "num_workers=9"], "num_workers must be between 0 and 4"),
        ([TINY, "--batch-size", "65"], "batch size 65 is larger than the data set of 64 samples"),
        ([TINY, "--passes", "chekpoint"], "unknown pass 'chekpoint'. Did you mean 'checkpoint'?"),
        ([TINY, "--passes", "amp:dtype=int8"], "pass 'amp': dtype: "),
        ([TINY, "--passes", "amp:fp16"], "write options as name:option=value, not 'fp16'"),
        ([TINY, "--passes", "checkpoint:blocks=x*"], "checkpoint: found nothing to do"),
        ([TINY, "--cache", ""], "argument --cache: an empty path"),
        ([TINY, "--frobnicate"], "unrecognized arguments: --frobnicate"),
        ([], "the following arguments are required: DIR"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    out = ["--out", tmp_path / "run"] if arguments else []
    text = fails(capsys, "train", *arguments, *out)
    assert re.search(message.replace("?", r"\?") if "mean" in message else message, text), text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_checkpoint_of_another_model_is_refused_and_kept(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(TINY), "--out", str(out)]) == 0
    before = (out / "model.safetensors").read_bytes()
    text = fails(capsys, "train", TINY, "--out", out, "--resume", "--set", "width=32")
    assert "holds the weights of another model: " in text
    assert "inp.weight is [16, 8] in the file and [32, 8] in the model" in text
    assert (out / "model.safetensors").read_bytes() == before


def test_resume_keeps_the_settings_of_the_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        main(["train", str(TINY), "--out", str(out), "--set", "width=24", "dropout=0.3", "--passes", "checkpoint"]) == 0
    )
    assert main(["train", str(TINY), "--out", str(out), "--resume", "--steps", "16"]) == 0
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["width"], config["dropout"], config["steps"]) == (24, 0.3, 16)
    assert config["passes"] == ["checkpoint"]
    text = fails(capsys, "train", HAE, "--out", out, "--resume")
    assert "is a run of recipe 'tiny', not of 'hae_v2'" in text
    (out / "config.json").write_text("{")
    assert "config.json cannot be read" in fails(capsys, "train", TINY, "--out", out, "--resume")


def test_resume_goes_on_with_the_data_of_the_run(tmp_path, capsys):
    folder = brats(tmp_path / "brats")
    more = ["--batch-size", "2", "--set", "sample_steps=1", "guidance=1"]
    assert main([str(a) for a in train_hae(tmp_path, "--data", folder, "--steps", "1", *more)]) == 0
    assert (
        main(
            [
                "train",
                str(HAE),
                "--out",
                str(tmp_path / "run"),
                "--cache",
                str(tmp_path / "cache"),
                "--resume",
                "--steps",
                "2",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(folder)
    assert not list((tmp_path / "cache").glob("simulated*"))


def test_an_unwritable_run_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    text = fails(capsys, "train", TINY, "--out", tmp_path / "file" / "run")
    assert "cannot write" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", r"does not define recipe\(\)"),
        ("from .nett import x", r"recipe.py imports .nett, which is not in that folder"),
        ("def recipe():\n    return 5", "returned a int, not a memopt.Recipe|returned a int"),
    ],
)
def test_a_recipe_that_is_none(tmp_path, capsys, content, message):
    (tmp_path / "recipe.py").write_text(content)
    assert re.search(message, fails(capsys, "train", tmp_path))


def test_a_recipe_whose_packages_are_missing(tmp_path, capsys):
    (tmp_path / "recipe.py").write_text("import surely_not_installed")
    assert "the Python package 'surely_not_installed' is needed and not installed" in fails(capsys, "train", tmp_path)


def test_passes_lists_every_pass(capsys):
    assert main(["passes"]) == 0
    text = capsys.readouterr().out
    for name in ("amp  not exact", "cache_cleanup  exact", "checkpoint  exact", "set_to_none  exact"):
        assert name in text
    assert main(["passes", "amp"]) == 0
    assert "dtype: Literal['bf16', 'fp16'] = 'bf16'" in capsys.readouterr().out
    assert "unknown pass 'ampp'" in fails(capsys, "passes", "ampp")


def test_help_has_worked_examples_that_parse(capsys):
    for verb in ("train", "passes"):
        with pytest.raises(SystemExit) as stopped:
            main([verb, "--help"])
        assert stopped.value.code == 0
        assert "examples:\n  memopt" in capsys.readouterr().out


def test_the_installed_command(tmp_path):
    command = [Path(sys.executable).with_name("memopt"), "train", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "memopt train: error: no recipe folder nowhere\n"
    module = subprocess.run([sys.executable, "-m", "memopt.cli", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"memopt \d+\.\d+\.\d+\n", module.stdout)


def test_training_on_nifti_data(tmp_path):
    """The real road: NIfTI files in, weights and pictures out."""
    folder = brats(tmp_path / "brats")
    arguments = train_hae(tmp_path, "--data", folder, "--steps", "2", "--batch-size", "2")
    assert main([str(a) for a in arguments] + ["--set", "sample_steps=2", "guidance=1", "--passes", "checkpoint"]) == 0
    for name in ("model.safetensors", "ema.safetensors", "loss.png", "samples.png", "metrics.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size


def test_presets_name_the_models_they_say():
    presets = load_recipe(HAE).presets
    assert list(presets) == ["quickstart", "brats128"]
    full = presets["brats128"]
    assert (full.image_size, full.model_channels, full.channel_mult) == (128, 128, (1, 1, 2, 3, 4))
    assert (full.batch_size, full.lr, full.ema_decay, full.drop_condition) == (28, 1e-4, 0.9999, 0.1)
    assert (full.attention_resolutions, full.num_heads, full.dropout, full.num_classes) == ((4, 8, 16), 4, 0.1, 2)
    assert full.guidance == (1.0, 1.8, 2.0, 3.0)
