"""What `translate` and `sample` of HAE V2 say about bad input, and the pictures that `sample` draws."""

import re
import shutil

import nibabel
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from memopt import plots
from memopt.cli import main
from memopt.recipe import configure, load_recipe
from tests.hae_runs import HAE, SHAPE, TINY, Calls, file_of, names, patients
from tests.test_cli import fails


def weights(file, noise=0.05, **changes):
    """Those of a fresh model, whose last convolution is zero, with some noise added."""
    recipe = load_recipe(HAE)
    model = recipe.model(configure(recipe, None, dict(setting.split("=") for setting in TINY) | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    save_file(model.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("errors")
    torch.manual_seed(0)
    weights(place / "some.safetensors")
    patients(place / "raw")
    return place


def arguments(place, task="translate", settings=(), **changes):
    """A command line; the folder of the results is where nothing is yet."""
    defaults = {
        "checkpoint": place / "some.safetensors",
        "data": place / "raw",
        "cache": place / "cache",
        "out": place / "out",
        **({"steps": 3, "batch_size": 4} if task == "translate" else {"steps": 2, "batch_size": 1}),
    }
    options = [part for name, value in (defaults | changes).items() for part in (f"--{name.replace('_', '-')}", value)]
    return ["run", str(HAE), task, *map(str, options), "--set", *TINY, *settings]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": "flair,t3"}, "modalities must be some of flair, t1, t1ce, t2"),
        ({"modalities": ""}, "modalities must be some of flair, t1, t1ce, t2"),
        ({"grid": ""}, "grid needs at least one number"),
        ({"grid": "1,wide"}, r"task translate: grid.*'wide'"),
        ({"guidance": "strong"}, r"task translate: guidance.*'strong'"),
        ({"split": "holdout"}, r"task translate: split: .*'test', 'val' or 'train'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 300, "until": 200}, "until=200 leaves no room for steps=300"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"end_ratio": 0}, "end_ratio must be above 0 and at most 1"),
        ({"end_ratio": 1.5}, "end_ratio must be above 0 and at most 1"),
        ({"until": 1200}, "until=1200 is beyond diffusion_steps=1000"),
        ({"settings": ["diffusion_steps=100"]}, "until=344 is beyond diffusion_steps=100"),
        ({"settings": ["model_channels=64"]}, "some.safetensors holds the weights of another model: "),
        ({"data": "gone"}, "data folder gone does not exist or is not a folder: give the one that holds the patients"),
        ({"task": "sample", "steps": 0}, "sample needs at least one step and one guidance strength"),
        ({"task": "sample", "guidance": ""}, "sample needs at least one step and one guidance strength"),
        ({"task": "sample", "sampler": "euler"}, "task sample: sampler: .*'ddpm' or 'ddim'"),
    ],
)
def test_options_out_of_range(place, capsys, changes, message):
    with Calls() as calls:
        text = fails(capsys, *arguments(place, **changes))
    assert re.search(message, text), text
    assert not calls.sizes
    assert not list((place / "out").glob("[!.]*"))


def test_weights_that_were_not_trained(place, tmp_path, capsys):
    fresh = weights(tmp_path / "fresh.safetensors", noise=0)
    text = fails(capsys, *arguments(place, checkpoint=fresh, out=tmp_path / "out"))
    assert f"{fresh} holds untrained weights (the noise they predict is zero everywhere): train them first\n" in text
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_model_of_one_class(place, tmp_path, capsys):
    one = weights(tmp_path / "one.safetensors", num_classes="1")
    text = fails(capsys, *arguments(place, checkpoint=one, settings=["num_classes=1"]))
    assert "translation needs a model of two classes, healthy and lesion: num_classes=2" in text


@pytest.mark.parametrize(("sick", "missing"), [(slice(0), "unhealthy"), (slice(0, SHAPE[2]), "healthy")])
def test_a_validation_split_of_one_kind(place, tmp_path, capsys, sick, missing):
    raw = patients(tmp_path / "raw", lambda name: sick if name in names("val") else slice(2, 5))
    with Calls() as calls:
        text = fails(capsys, *arguments(place, data=raw, cache=tmp_path / "cache", out=tmp_path / "out"))
    assert f"the validation split has {SHAPE[2]} slices and none is {missing}: a threshold needs both kinds" in text
    assert calls.sizes in ([], [2])  # found out before the work
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def resave(file, affine):
    image = nibabel.load(file)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj).copy(), affine), file)


@pytest.mark.parametrize(
    ("kinds", "affine", "message"),
    [
        (
            ("flair", "t1", "t1ce", "t2", "seg"),
            np.diag([1, 1, 2, 1]),
            r"_seg.nii.gz has voxels of 1 x 1 x 2 mm, expected 1 mm along each axis .*: resample the patient's files",
        ),
        (("t2",), np.diag([2, 2, 2, 1]), r"_t2.nii.gz has voxels of 2 x 2 x 2 mm, expected 1 mm along each axis"),
        (
            ("t1ce",),
            np.diag([-1, 1, 1, 1]),
            r"_t1ce.nii.gz lies elsewhere in space than .*_seg.nii.gz \(affines differ\): register the patient's files",
        ),
    ],
)
def test_volumes_that_do_not_fit(place, tmp_path, capsys, kinds, affine, message):
    raw = shutil.copytree(place / "raw", tmp_path / "raw")
    for kind in kinds:
        resave(file_of(raw, names("test")[0], kind), affine)
    text = fails(capsys, *arguments(place, data=raw, cache=tmp_path / "cache", out=tmp_path / "out"))
    assert re.search(message, text), text
    assert names("test")[0] in text


def test_the_patients_are_gone_between_two_calls(place, tmp_path, capsys):
    raw = shutil.copytree(place / "raw", tmp_path / "raw")
    more = {"data": raw, "cache": tmp_path / "cache", "out": tmp_path / "out"}
    assert main(arguments(place, "sample", **more)) == 0  # takes no patients
    shutil.rmtree(raw / names("test")[0])
    for kind in ("flair", "seg"):
        file_of(raw, names("test")[1], kind).unlink()
    text = fails(capsys, *arguments(place, **more))
    assert re.search(rf"patient {names('test')[1]} in .* has no flair, seg: expected .*add the file or remove", text)
    shutil.rmtree(raw)
    assert re.search(f"data folder {raw} does not exist", fails(capsys, *arguments(place, **more)))


@pytest.fixture
def drawn(monkeypatch):
    """The samples themselves, beside their picture."""
    seen, draw = [], plots.sample_grid

    def sample_grid(grid, file):
        seen.append(grid)
        return draw(grid, file)

    monkeypatch.setattr(plots, "sample_grid", sample_grid)
    return seen


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples(place, tmp_path, capsys, drawn, sampler):
    for out, seed in (("first", 3), ("again", 3), ("other", 4)):
        with Calls() as calls:
            made = arguments(place, "sample", out=tmp_path / out, sampler=sampler, seed=seed, guidance="0,2", steps=3)
            assert main(made) == 0
        assert calls.sizes == [4] * 6  # a healthy and an unhealthy sample, each with and without its class
    text = capsys.readouterr().out
    assert text.count("sampling 6/6\n") == 3
    assert text.endswith(f"done: {tmp_path / 'other' / 'samples.png'}\n")
    first, again, other = drawn
    assert first.images.shape == (2, 2, 16, 4 * 16)
    assert (first.rows, len(first.columns)) == (("w = 0", "w = 2"), 2)
    assert first.title == f"3 {sampler.upper()} steps, seed 3, {place / 'some.safetensors'}"
    assert torch.equal(first.images, again.images)
    assert (first.images - other.images).abs().mean() > 0.1
    assert (first.images[0] - first.images[1]).abs().max() > 1e-3  # the strength has an effect
    assert (tmp_path / "first" / "samples.png").read_bytes() == (tmp_path / "again" / "samples.png").read_bytes()
    assert imread(tmp_path / "first" / "samples.png").std() > 0.1


def test_samplers_differ_in_the_noise_they_add(place, tmp_path, drawn):
    for sampler in ("ddpm", "ddim"):
        assert main(arguments(place, "sample", out=tmp_path / sampler, sampler=sampler, guidance="1", steps=3)) == 0
    ancestral, deterministic = (grid.images for grid in drawn)
    assert (ancestral - deterministic).abs().mean() > 1e-3
