"""The task `translate` of HAE V2 from the command line, and that it can be interrupted, shared and repeated."""

import csv
import hashlib
import importlib
import json
import re
import shutil
import signal
import time

import nibabel
import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import load_file

from examples.hae_v2.evaluate import choose_threshold
from examples.hae_v2.translation import judge
from memopt.cli import main
from memopt.recipe import load_recipe
from tests.hae_runs import (
    HAE,
    LESION,
    SHAPE,
    Calls,
    contents,
    copy,
    names,
    patients,
    process,
    times,
    train,
)
from tests.test_cli import fails

QUICK = ["--baselines", "false", "--nifti", "false"]
STEPS, BATCH, GRID = 3, 4, (1.0, 2.0, 5.0, 10.0, 20.0, 40.0)
MAP = 1.0  # the strength of maps in quickstart
SCORES = ("cosine", "ratio", "difference")
CURVES = ("difference", "healthy", "null")
TEST = [(name, z) for name in names("test") for z in range(SHAPE[2])]
BATCHES = -(-len(TEST) // BATCH)
RESULTS = ["batches/*/*", "metrics.csv", "metrics.md", "slices.csv", "figures/*", "nifti/*"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with patients in `raw`, and `trained`, a run on them that was translated, for the first time."""
    place = tmp_path_factory.mktemp("hae")
    train(patients(place / "raw"), place / "cache", place / "trained")
    translate(place, place / "trained")
    return place


@pytest.fixture
def run(place, tmp_path):
    """The weights again, with validation's choices."""
    return copy(place / "trained", tmp_path / "run")


@pytest.fixture
def findings(monkeypatch):
    """What is handed to the report, which then need not be drawn."""
    package = type(load_recipe(HAE)).__module__.rpartition(".")[0]
    module = importlib.import_module(f"{package}.report")
    seen = []

    def write_report(findings, out):
        (out / "metrics.md").write_text("")
        seen.append(findings)
        return out

    monkeypatch.setattr(module, "write_report", write_report)
    return seen


def command(place, run, *more):
    arguments = ["run", HAE, "translate", "--checkpoint", run, "--cache", place / "cache"]
    return [str(a) for a in (*arguments, "--steps", STEPS, "--batch-size", BATCH, *more)]


def translate(place, run, *more):
    assert main(command(place, run, *more)) == 0
    return run / "translate"


def table(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def arrays(out, split, strength=0):
    """The batches of a split, joined along slices; of one strength: the score's is the first, the map's the last."""
    files = sorted((out / "batches" / split).glob("batch_*.safetensors"))
    assert files
    loaded = [load_file(file) for file in files]
    return {
        name: np.concatenate([batch[name] if name == "encoded" else batch[name][strength] for batch in loaded])
        for name in loaded[0]
    }


def choices(run):
    return json.loads((run / "translation.json").read_text())


def test_validation_chooses(place):
    found, run = choices(place / "trained"), place / "trained"
    chosen, settings = found["chosen"], found["settings"]
    assert settings["weights"] == hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert (settings["strengths"], settings["steps"], settings["batch_size"]) == (list(GRID), STEPS, BATCH)
    batches = [load_file(f) for f in sorted((run / "translate" / "batches" / "validation").glob("*.safetensors"))]
    *curves, peaks = (np.concatenate([batch[name] for batch in batches], axis=1) for name in (*CURVES, "peak"))
    scores = {(name, w): judge(*(c[i] for c in curves), name) for name in SCORES for i, w in enumerate(GRID)}
    labels = np.array([z in range(*LESION) for _ in names("val") for z in range(SHAPE[2])])
    tried = {key: choose_threshold(score, labels) for key, score in scores.items()}
    assert chosen["auroc"] == {f"{name}, w = {w:g}": threshold.auroc for (name, w), threshold in tried.items()}
    assert len({score.tobytes() for score in scores.values()}) == len(scores)
    best = max(tried, key=lambda key: (tried[key].auroc, tried[key].margin))
    assert (chosen["score"], chosen["guidance"]) == best
    assert chosen["threshold"] == tried[best].value
    assert chosen["largest"] == peaks[GRID.index(MAP)].max() > 0
    assert chosen["baselines"].keys() == {"FLAIR intensity", "reconstruction (DDIB)"}
    assert 0.4 < chosen["baselines"]["FLAIR intensity"] < 1  # healthy tissue is below 0.45 of the lesions


def test_the_figures_are_those_of_the_slices(place):
    out, chosen = place / "trained" / "translate", choices(place / "trained")["chosen"]
    found, shown = arrays(out, "test"), arrays(out, "test", -1)
    assert found["difference"].shape == (len(TEST), STEPS, 2)
    assert not np.array_equal(found["map"], shown["map"])
    lines = table(out / "slices.csv")
    assert [(line["patient"], int(line["slice"])) for line in lines] == TEST
    scores = judge(*(found[name] for name in CURVES), chosen["score"])
    for line, (_, z), score, peak in zip(lines, TEST, scores, shown["peak"], strict=True):
        assert line["label"] == ("unhealthy" if z in range(*LESION) else "healthy")
        assert line["verdict"] == ("unhealthy" if score > chosen["threshold"] else "healthy")
        assert float(line["score"]) == pytest.approx(score, rel=1e-6)
        assert float(line["max M"]) == pytest.approx(peak, rel=1e-5)
        assert {line["end flair"], line["end t2"]} <= {"0", "114", "229"}
        # 12 x 12 voxels in pixels of 2.5 x 2.5, less what a corner loses
        assert 16 <= float(line["truth pixels"]) <= 25 or line["label"] == "healthy"
        assert (float(line["mask pixels"]) > 0) <= (line["verdict"] == "unhealthy")
    rows = {(row["method"], row["subset"], row["figure"]): float(row["value"] or "nan") for row in
            table(out / "metrics.csv")}  # fmt: skip
    assert rows["FLAIR intensity", "all slices", "pixel AUROC"] > 0.99  # lesions are bright
    assert rows["FLAIR intensity", "all slices", "image AUROC"] == 1
    assert rows["translation", "all slices", "Dice"] == pytest.approx(np.mean([float(r["Dice"]) for r in lines]))
    hits = [float(line["Dice"]) for line in lines if line["label"] == "unhealthy"]
    assert rows["translation", "unhealthy slices", "Dice"] == pytest.approx(np.mean(hits))
    assert {method for method, *_ in rows} == {"translation", "reconstruction (DDIB)", "FLAIR intensity", "chance"}
    md = (out / "metrics.md").read_text()
    assert f"| translation | unhealthy slices | – | {rows['translation', 'unhealthy slices', 'pixel AUPRC']:.3f}" in md


def test_pictures_volumes_and_a_page_are_left(place):
    out, chosen = place / "trained" / "translate", choices(place / "trained")["chosen"]
    page = (out / "report.html").read_text()
    for text in (
        f"w = {chosen['guidance']:g}, chosen by validation",
        f"map&#x27;s guidance</th><td>w = {MAP:g}<",
        f"{len(TEST)} axial slices of 2 patients",
        f"{chosen['threshold']:.4g}",
        *(f"(step 24, SHA-256 {choices(place / 'trained')['settings']['weights'][:16]})", *names("test")),
    ):
        assert text in page, text
    assert re.search(r">processes</th><td>1<", page)
    assert "simulated patients" not in page.lower()
    pictures = sorted(file.name for file in (out / "figures").iterdir())
    assert pictures[:4] == ["curves.png", "roc_pr.png", "scores.png", "slice-01.png"]
    assert page.count('<img src="data:image/png;base64,') == len(pictures)
    assert all(imread(out / "figures" / name).std() > 0.01 for name in pictures)
    lines = table(out / "slices.csv")
    assert {f.name for f in (out / "nifti").iterdir()} == {
        f"{name}_{kind}.nii.gz" for name in names("test") for kind in ("mask", "map")
    }
    for name in names("test"):
        mask, amap = (nibabel.load(out / "nifti" / f"{name}_{kind}.nii.gz") for kind in ("mask", "map"))
        assert mask.shape == amap.shape == SHAPE
        filled = np.asarray(mask.dataobj).any(axis=(0, 1))
        assert filled.tolist() == [float(line["mask pixels"]) > 0 for line in lines if line["patient"] == name]
        assert np.asarray(amap.dataobj).std(axis=(0, 1)).min() > 0


def test_what_is_there_is_not_computed_again(place, capsys):
    run = place / "trained"
    capsys.readouterr()
    before, results = times(run), contents(run / "translate", RESULTS)
    with Calls() as calls:
        translate(place, run)
    assert calls.sizes == [2]  # whether the weights are trained
    text = capsys.readouterr().out
    assert f"validation's choices: {run / 'translation.json'}\n" in text
    assert "translating" not in text
    assert times(run) == before
    assert contents(run / "translate", RESULTS) == results


def test_the_model_is_called_once_a_step_on_twice_the_slices(place, run, findings, tmp_path, capsys):
    (run / "translation.json").unlink()
    with Calls() as calls:
        out = translate(place, run, *QUICK)
    of_validation = [2 * BATCH] * STEPS + [2 * (SHAPE[2] - BATCH)] * STEPS
    assert calls.sizes == [2, *of_validation, *[2 * BATCH] * (STEPS * BATCHES)]
    assert not (out / "nifti").exists()
    assert {row.method for row in findings[0].rows} == {"translation", "chance"}
    capsys.readouterr()
    with Calls() as calls:
        translate(place, run, *QUICK, "--out", tmp_path / "other")
    assert calls.sizes == [2, *[2 * BATCH] * (STEPS * BATCHES)]
    text = capsys.readouterr().out
    assert f"translating test {STEPS * BATCHES}/{STEPS * BATCHES}\n" in text
    assert "translating validation" not in text
    assert contents(tmp_path / "other", ["batches/test/*"]) == contents(out, ["batches/test/*"])
    assert repr(findings[0].rows) == repr(findings[1].rows)  # some may be nan
    # With the baselines, batches in which the reconstruction's start is missing are computed, and agree.
    maps = arrays(out, "test")["map"]
    with Calls() as calls:
        translate(place, run, "--nifti", "false")
    assert len(calls.sizes) == 1 + 2 * STEPS * (2 + BATCHES)
    assert np.array_equal(arrays(out, "test")["map"], maps)
    assert contents(out, ["batches/*/*"]) == contents(place / "trained" / "translate", ["batches/*/*"])


def test_other_settings_need_choices_and_a_folder_of_their_own(place, run, findings, tmp_path, capsys):
    shutil.copytree(place / "trained" / "translate", run / "translate")
    before = choices(run), times(run)
    for more, message in (
        (["--steps", "2"], r"validation holds the batches of a run with other settings \(steps=3 there, 2 now\): rem"),
        (["--clipping", "dynamic"], r"\(clipping=static there, dynamic now\)"),
        (["--seed", "1", "--batch-size", "5"], r"\(seed=0 there, 1 now; batch_size=4 there, 5 now\)"),
        (
            ["--guidance", "1.5"],
            r"\(strengths=\[1.0, 2.0, 5.0, 10.0, 20.0, 40.0\] there, \[1.5\] now\): .*another --out",
        ),
    ):
        text = fails(capsys, *command(place, run, *more))
        assert re.search(message, text), text
    assert (choices(run), times(run)) == before
    translate(place, run, "--steps", "2", *QUICK, "--out", tmp_path / "two")
    text = capsys.readouterr().out
    assert "translating validation 4/4\n" in text
    assert re.search(
        r"validation: image AUROC \d\.\d{3} with w = [\d.]+ and the score (cosine|ratio|difference), threshold ", text
    )
    assert choices(run)["settings"]["steps"] == 2
    (run / "translate" / "batches" / "test" / "settings.json").write_text("{")
    (run / "translation.json").write_text("{")
    shutil.rmtree(run / "translate" / "batches" / "validation")
    assert "other settings (weights=None there, " in fails(capsys, *command(place, run))


def test_two_processes_leave_what_one_does(place, run):
    (run / "translation.json").unlink()
    with process(*command(place, run), processes=2) as two:
        text, _ = two.communicate()
    assert two.returncode == 0, text
    assert ", 2 processes, weights" in text
    assert text.count("hae_v2 translate: ") == text.count("evaluating\n") == 1
    one = contents(place / "trained" / "translate", RESULTS)
    assert contents(run / "translate", RESULTS) == one
    assert sum(name.startswith("batches/") for name in one) == 4 + 2 * (2 + BATCHES)
    assert (run / "translation.json").read_bytes() == (place / "trained" / "translation.json").read_bytes()
    assert re.search(r">processes</th><td>2<", (run / "translate" / "report.html").read_text())


def test_a_killed_translation_goes_on_after_its_last_finished_batch(place, run):
    (run / "translation.json").unlink()
    out = run / "translate"
    with process(*command(place, run)) as killed:
        deadline = time.monotonic() + 120
        while not times(out) and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        text, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, text
    finished, whole = times(out), place / "trained" / "translate"
    assert 0 < len(finished) < len(times(whole)), text
    translate(place, run)
    assert {name: at for name, at in times(out).items() if name in finished} == finished
    assert contents(out, RESULTS) == contents(whole, RESULTS)


@pytest.mark.parametrize("harm", ["cut off", "no safetensors", "gone"])
def test_a_damaged_batch_is_computed_anew(place, run, harm, findings):
    whole = place / "trained" / "translate"
    out = shutil.copytree(whole, run / "translate")
    file = out / "batches" / "test" / "batch_00001.safetensors"
    {
        "cut off": lambda: file.write_bytes(file.read_bytes()[:-8]),
        "no safetensors": lambda: file.write_text("{}"),
        "gone": file.unlink,
    }[harm]()
    before = times(out)
    with Calls() as calls:
        translate(place, run, "--nifti", "false")
    assert calls.sizes == [2] + [2 * BATCH] * STEPS
    after = times(out)
    assert {name for name in after if after[name] != before.get(name)} == {"batches/test/batch_00001.safetensors"}
    assert contents(out, ["batches/*/*"]) == contents(whole, ["batches/*/*"])


@pytest.mark.parametrize(
    "option",
    ["encoding=noise", "clipping=dynamic", "evidence=gradient", "last_only=true", "interval=2", "end_ratio=0.5"],
)
def test_an_ablation_changes_the_maps(place, run, findings, option):
    name, _, value = option.partition("=")
    chosen = choices(run)["chosen"]["guidance"]
    passes = ["--passes", ""] if name == "evidence" else []
    flag = f"--{name.replace('_', '-')}"
    out = translate(place, run, flag, value, "--guidance", chosen, *passes, *QUICK)
    plain, changed = (arrays(folder, "test") for folder in (place / "trained" / "translate", out))
    assert not np.array_equal(changed["map"], plain["map"])
    assert np.isfinite(changed["map"]).all()
    of_maps_alone = name in ("evidence", "last_only", "interval", "end_ratio")
    assert np.allclose(changed["difference"], plain["difference"], rtol=1e-4, atol=1e-7) == of_maps_alone
    if name in ("last_only", "interval", "end_ratio"):  # at the first step there is nothing to leave out
        first = (plain["end"] == 0).all(axis=1)
        assert np.array_equal(changed["map"][first], plain["map"][first])
    (seen,) = findings
    assert str(seen.about[name]).lower() == value
    assert seen.about["guidance"] == f"w = {chosen:g}, given"
    assert re.fullmatch(rf"(\w+, w = {chosen:g}: [\d.]+(; |$)){{3}}", seen.about["validation AUROC"])
    assert np.array_equal(seen.ours.maps, changed["map"])


def test_the_gradient_needs_autograd(place, run, capsys):
    text = fails(capsys, *command(place, run, "--evidence", "gradient"))
    assert "evidence=gradient needs autograd: leave the pass inference_mode out of --passes" in text


def test_noise_depends_on_the_slice_alone(place, run, findings, tmp_path):
    noisy = ["--encoding", "noise", "--guidance", "2", "--steps", "1", "--until", "400", "--nifti", "false"]
    found = {}
    for name, more in {
        "by 4": ["--batch-size", 4],
        "by 5": ["--batch-size", 5],
        "other": ["--batch-size", 4, "--seed", 1],
    }.items():
        translate(place, run, *noisy, *more, "--out", tmp_path / name)
        found[name] = arrays(tmp_path / name, "test")["encoded"]
    assert np.array_equal(found["by 4"], found["by 5"])
    apart = np.abs(found["by 4"] - found["other"]).max(axis=(1, 2, 3))
    assert apart.min() > 0
    noise = found["by 4"].reshape(len(TEST), -1)
    assert len(np.unique(noise.round(5), axis=0)) == len(TEST)


def test_the_validation_split_can_be_shown_itself(place, run, findings, tmp_path):
    out = translate(place, run, "--split", "val", *QUICK)
    best = GRID.index(choices(run)["chosen"]["guidance"])
    judges = [choices(run)["chosen"]["score"]]
    for w in (GRID[0], GRID[-1]):
        translate(place, run, "--split", "val", "--guidance", w, *QUICK, "--out", tmp_path / f"{w}")
        judges.append(choices(run)["chosen"]["score"])
    seen, weakest, strongest = findings
    assert (seen.slices.split, list(seen.slices.patients)) == ("val", names("val"))
    validation = [load_file(f) for f in sorted((out / "batches" / "validation").glob("*.safetensors"))]
    curves = [np.concatenate([batch[name] for batch in validation], axis=1) for name in CURVES]
    for found, i, score in zip((seen, weakest, strongest), (best, 0, -1), judges, strict=True):
        assert np.array_equal(found.ours.scores, judge(*(curve[i] for curve in curves), score))
    assert not np.array_equal(weakest.ours.scores, strongest.ours.scores)
    assert 0 < seen.ours.unhealthy.sum() < SHAPE[2]
    assert seen.ours.masks.any()
    assert not seen.ours.masks[~seen.ours.unhealthy].any()


def test_strength_and_modalities_can_be_given(place, run, findings):
    out = translate(place, run, "--guidance", "1.5", "--modalities", "t1", *QUICK)
    found = choices(run)
    assert (found["settings"]["strengths"], found["chosen"]["guidance"]) == ([1.5], 1.5)
    assert found["chosen"]["auroc"].keys() == {f"{name}, w = 1.5" for name in SCORES}
    assert arrays(out, "test")["difference"].shape == (len(TEST), STEPS, 1)
    assert findings[0].curves.modalities == ("t1",)
    assert json.loads((out / "batches" / "test" / "settings.json").read_text())["strengths"] == [1.5]


def test_maps_may_have_a_strength_of_their_own(place, run, findings, tmp_path):
    translate(place, run, *QUICK, "--out", tmp_path / "usual")
    with Calls() as calls:
        translate(place, run, "--map-guidance", "5", *QUICK, "--out", tmp_path / "other")
    of_validation = [2 * BATCH] * STEPS + [2 * (SHAPE[2] - BATCH)] * STEPS
    assert calls.sizes == [2, *of_validation, *[2 * BATCH] * (STEPS * BATCHES)]  # no call more for it
    translate(place, run, "--guidance", "5", *QUICK, "--out", tmp_path / "five")
    usual, other, five = findings
    assert np.array_equal(other.ours.scores, usual.ours.scores)
    assert not np.array_equal(other.ours.scores, five.ours.scores)
    assert not np.array_equal(other.ours.maps, usual.ours.maps)
    assert np.array_equal(other.ours.maps, five.ours.maps)
    assert np.array_equal(other.curves.difference, five.curves.difference)
    assert (other.about["map's guidance"], five.about["map's guidance"]) == ("w = 5", "w = 5")


def test_patients_without_lesions_are_evaluated(place, run, tmp_path):
    """All test slices healthy: some figures are not defined, and the report says so."""
    raw = patients(tmp_path / "raw", lambda name: slice(0) if name in names("test") else slice(*LESION))
    out = translate(place, run, "--data", raw, "--cache", tmp_path / "cache")
    rows = {(row["method"], row["subset"], row["figure"]): row["value"] for row in table(out / "metrics.csv")}
    assert rows["translation", "all slices", "image AUROC"] == ""
    assert rows["translation", "unhealthy slices", "Dice"] == ""
    assert 0 <= float(rows["translation", "all slices", "Dice"]) <= 1
    assert "0 with a lesion and 12 without" in (out / "report.html").read_text()
