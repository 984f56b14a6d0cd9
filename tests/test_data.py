"""Simulated patients, the preparation of BraTS folders, and what is said about bad ones."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import nibabel
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from examples.hae_v2 import data as data_module
from examples.hae_v2.data import SPLITS, SliceDataset, ensure_data, prepare, split_patients
from examples.hae_v2.simulate import (
    AFFINE,
    MODALITIES,
    SHAPE,
    has_lesion,
    in_parallel,
    patient_name,
    simulate,
    simulate_patient,
)
from memopt.errors import InputError

KINDS = (*MODALITIES, "seg")
PATIENTS = 5


def file_of(root, number, kind):
    return root / patient_name(number) / f"{patient_name(number)}_{kind}.nii.gz"


def voxels(root, number, kind):
    return np.asanyarray(nibabel.load(file_of(root, number, kind)).dataobj)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("simulated") / "root", patients=PATIENTS)


@pytest.fixture(scope="session")
def prepared(simulated, tmp_path_factory):
    return prepare(simulated, tmp_path_factory.mktemp("prepared") / "32", 32)


def write(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


@pytest.fixture
def raw(tmp_path):
    """Four small patients in BraTS layout; number 0 is healthy."""
    root = tmp_path / "raw"
    rng = np.random.default_rng(0)
    for number in range(4):
        for kind in MODALITIES:
            volume = np.zeros((24, 20, 6), np.int16)
            volume[4:20, 4:16, :5] = rng.integers(1, 1000, (16, 12, 5))
            write(file_of(root, number, kind), volume)
        seg = np.zeros((24, 20, 6), np.uint8)
        seg[6:12, 6:10, 2] = 4 if number else 0
        write(file_of(root, number, "seg"), seg)
    return root


# The simulated patients


def test_layout_of_simulated_patients(simulated):
    folders = sorted(path.name for path in simulated.iterdir() if path.is_dir())
    assert folders == [patient_name(n) for n in range(PATIENTS)]
    assert "simulated patients on real anatomy" in (simulated / "README.txt").read_text().lower()
    for number in range(PATIENTS):
        assert {path.name for path in (simulated / patient_name(number)).iterdir()} == {
            f"{patient_name(number)}_{kind}.nii.gz" for kind in KINDS
        }
        brain = voxels(simulated, number, "t1") > 0
        assert 1.2e6 < brain.sum() < 1.7e6  # mm^3: an adult's brain
        for kind in KINDS:
            image = nibabel.load(file_of(simulated, number, kind))
            assert image.shape == SHAPE == (240, 240, 155)
            assert image.header.get_data_dtype() == (np.uint8 if kind == "seg" else np.int16)
            assert np.array_equal(image.affine, AFFINE)
            assert image.header.get_zooms() == (1, 1, 1)
        for kind in MODALITIES:
            assert np.array_equal(voxels(simulated, number, kind) > 0, brain)
        seg = voxels(simulated, number, "seg")
        assert set(np.unique(seg)) <= {0, 1, 2, 4}
        assert not (seg[~brain]).any()


def test_patients_depend_on_seed_and_number_alone(simulated):
    again = simulate_patient(0, 1)
    for kind in KINDS:
        assert np.array_equal(again[kind], voxels(simulated, 1, kind))
    assert not np.array_equal(voxels(simulated, 3, "t1"), again["t1"])
    assert not np.array_equal(simulate_patient(1, 1)["t1"], again["t1"])


def test_share_of_lesions(simulated):
    for number in range(PATIENTS):
        assert voxels(simulated, number, "seg").any() == has_lesion(0, number, 0.6)
    for share in (0.0, 0.3, 0.6, 1.0):
        drawn = np.mean([[has_lesion(seed, n, share) for n in range(40)] for seed in range(5)], axis=1)
        assert np.abs(drawn - share).max() <= 0.05


def test_a_folder_keeps_one_kind_of_patient(simulated, raw):
    with pytest.raises(InputError, match=r"holds patients simulated with .*'seed': 0.*asked for .*'seed': 7"):
        simulate(simulated, patients=PATIENTS, seed=7)
    with pytest.raises(InputError, match="not empty and was not made by this simulator: choose another folder"):
        simulate(raw, patients=1)
    with pytest.raises(InputError, match="cannot simulate 0 patients"):
        simulate(raw, patients=0)


def test_killed_generation_goes_on(simulated, tmp_path, root):
    target = tmp_path / "root"
    code = f"from examples.hae_v2.simulate import simulate; simulate({str(target)!r}, patients=2, workers=1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    half = target / f".{patient_name(1)}.{process.pid}.tmp"
    deadline = time.monotonic() + 120
    while not half.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert half.exists()
    assert not (target / patient_name(1)).exists()

    simulate(target, patients=2)
    assert not half.exists()
    for number in range(2):
        for kind in KINDS:
            assert file_of(target, number, kind).read_bytes() == file_of(simulated, number, kind).read_bytes()


def test_no_single_intensity_gives_the_lesion_away(prepared):
    from sklearn.metrics import average_precision_score

    images, masks = [], []
    for split in SPLITS:
        dataset = SliceDataset(prepared, split)
        unhealthy = dataset.labels == 1
        images.append(dataset.images[unhealthy].astype(np.float32))
        masks.append(dataset.masks[unhealthy])
    image, mask = np.concatenate(images), np.concatenate(masks)
    brain = (image > 0).any(axis=1)
    scores = {kind: average_precision_score(mask[brain], image[:, c][brain]) for c, kind in enumerate(MODALITIES)}
    assert max(scores.values()) <= 0.6, scores
    assert scores["flair"] > 3 * mask[brain].mean(), scores  # yet it can be seen


# Preparation


def _triangle(size, source):
    """Resampling matrix [size, source] of a bilinear reduction, written down from its definition."""
    scale = source / size
    middle = (np.arange(size)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(source) + 0.5 - middle) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


def test_prepared_values(simulated, prepared):
    number = 1
    path = next(prepared.rglob(f"{patient_name(number)}.npz"))
    stored = np.load(path)
    assert stored["images"].dtype == np.float16
    assert stored["masks"].dtype == np.bool_
    weights = _triangle(32, 240)
    brain = (voxels(simulated, number, "t1") > 0).mean(axis=(0, 1))
    assert stored["slices"].tolist() == [z for z in range(155) if brain[z] >= 0.1]
    for c, kind in enumerate(MODALITIES):
        volume = voxels(simulated, number, kind)
        scale = np.percentile(volume[volume != 0], 99)
        for i in (0, 40, len(stored["slices"]) - 1):
            plane = volume[:, :, stored["slices"][i]].T / scale  # rows along the volume's second axis
            expected = weights @ plane @ weights.T
            np.testing.assert_allclose(stored["images"][i, c], expected, rtol=6e-4, atol=1e-6)
    lesion = voxels(simulated, number, "seg") > 0
    for i, z in enumerate(stored["slices"]):
        expected = weights @ lesion[:, :, z].T @ weights.T
        sure = np.abs(expected - 0.5) > 1e-5
        assert np.array_equal(stored["masks"][i][sure], (expected > 0.5)[sure])


@pytest.mark.parametrize(("count", "sizes"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (40, (30, 2, 8))])
def test_split_sizes(count, sizes):
    names = [patient_name(n) for n in range(count)]
    splits = split_patients(names, seed=0)
    assert tuple(len(splits[split]) for split in SPLITS) == sizes
    assert sorted(name for members in splits.values() for name in members) == names
    assert splits == split_patients(names[::-1], seed=0)
    assert count < 40 or splits != split_patients(names, seed=1)


def test_splits_share_no_patient(prepared):
    patients = [name for split in SPLITS for name in SliceDataset(prepared, split).patients]
    assert sorted(patients) == [patient_name(n) for n in range(PATIENTS)]


def test_dataset_items(prepared):
    seen = set()
    for split in SPLITS:
        dataset = SliceDataset(prepared, split)
        assert 90 * len(dataset.patients) < len(dataset) < 130 * len(dataset.patients)
        for item in map(dataset.__getitem__, range(len(dataset))):
            assert item["image"].shape == (4, 32, 32)
            assert item["image"].dtype == torch.float32
            assert torch.equal(item["image"].amin((1, 2)), torch.full((4,), -1.0))
            assert torch.equal(item["image"].amax((1, 2)), torch.full((4,), 1.0))
            assert item["mask"].dtype == torch.bool
            assert item["label"].dtype == torch.int64
            assert item["label"] == item["mask"].any()
            seen.add((dataset.patients[item["patient"]], int(item["slice"])))
            seen.add(int(item["label"]))
    assert {0, 1} <= seen
    assert len(seen) == 2 + sum(len(SliceDataset(prepared, split)) for split in SPLITS)


def test_items_collate(prepared):
    batch = next(iter(DataLoader(SliceDataset(prepared, "train"), batch_size=3)))
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "image": (3, 4, 32, 32),
        "mask": (3, 32, 32),
        "label": (3,),
        "patient": (3,),
        "slice": (3,),
    }


def test_a_constant_modality_in_a_slice(raw, tmp_path):
    volume = voxels(raw, 0, "t2").copy()
    volume[:, :, 1] = 0
    write(file_of(raw, 0, "t2"), volume)
    root = prepare(raw, tmp_path / "out", 16)
    split = next(root.rglob(f"{patient_name(0)}.npz")).parent.name
    dataset = SliceDataset(root, split)
    item = dataset[dataset.patients.index(patient_name(0)) * 5 + 1]
    assert item["slice"] == 1
    assert (item["image"][3] == -1).all()


def test_prepared_folder_is_reused_only_if_it_matches(raw, tmp_path):
    def state():
        return {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*.npz"))}

    root = prepare(raw, tmp_path / "out", 16)
    first = state()
    assert len(first) == 4
    assert prepare(raw, root, 16) == root
    assert state() == first
    index = json.loads((root / "index.json").read_text())
    assert index["config"] | {"image_size": 16, "seed": 0, "format": 1, "source": str(raw)} == index["config"]

    for change in ({"image_size": 8}, {"image_size": 16, "seed": 1}, {"image_size": 16, "min_brain": 0.2}):
        before = state()
        prepare(raw, root, **change)
        assert not set(before.items()) & set(state().items())
    prepare(raw, root, 16)
    before = state()
    seg = voxels(raw, 1, "seg").copy()
    seg[8, 8, 3] = 1
    write(file_of(raw, 1, "seg"), seg)
    prepare(raw, root, 16)
    assert not set(before.items()) & set(state().items())


def test_only_some_slices(raw, tmp_path):
    every, some = prepare(raw, tmp_path / "every", 16), prepare(raw, tmp_path / "some", 16, slice_step=3)
    for split in ("train", "val", "test"):
        whole, part = SliceDataset(every, split), SliceDataset(some, split)
        for patient in range(len(whole.patients)):
            of_all, of_some = whole.patient == patient, part.patient == patient
            assert np.array_equal(part.slices[of_some], whole.slices[of_all][::3])
            assert np.array_equal(part.images[of_some], whole.images[of_all][::3])
            assert np.array_equal(part.masks[of_some], whole.masks[of_all][::3])
    with pytest.raises(InputError, match="slice step 0: give a positive number of slices"):
        prepare(raw, tmp_path / "none", 16, slice_step=0)


def test_interrupted_preparation_goes_on(raw, tmp_path):
    broken = file_of(raw, 3, "t1")
    whole = broken.read_bytes()
    times = (broken.stat().st_atime_ns, broken.stat().st_mtime_ns)
    damaged = bytes([*whole[:-8], *b"\0\0\0\0", *whole[-4:]])  # another checksum, same size
    broken.write_bytes(damaged)
    os.utime(broken, ns=times)
    with pytest.raises(InputError, match="CRC"):
        prepare(raw, tmp_path / "out", 16, workers=1)
    with pytest.raises(InputError, match="holds no finished prepared slices"):
        SliceDataset(tmp_path / "out", "train")
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npz")}
    assert len(done) == 3
    broken.write_bytes(whole)
    os.utime(broken, ns=times)
    (tmp_path / "out" / "train" / ".half.npz.1.tmp").write_bytes(b"half")
    root = prepare(raw, tmp_path / "out", 16)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(root.rglob("*.npz"))) == 4
    assert not list(root.rglob("*.tmp"))


def test_ensure_data_simulates_and_prepares(raw, tmp_path, monkeypatch):
    asked = []

    def copy(root, **options):
        asked.append(options)
        if not root.exists():
            shutil.copytree(raw, root)
        return root

    monkeypatch.setattr(data_module, "simulate", copy)
    root = ensure_data(None, tmp_path / "cache", 16, patients=4, seed=0)
    assert asked[0] == {"patients": 4, "seed": 0, "lesion_share": 0.6, "workers": None}
    assert len(SliceDataset(root, "train")) == 10
    assert ensure_data(None, tmp_path / "cache", 16, patients=4, seed=0) == root
    assert ensure_data(None, tmp_path / "cache", 8, patients=4, seed=0) != root


def test_one_process_prepares_and_the_others_wait(raw, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure_data(raw, tmp_path / "cache", 16))) for _ in range(3)
    ]
    with data_module._locked(tmp_path / "cache" / "lock"):
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert not (tmp_path / "cache" / "prepared").exists()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(SliceDataset(found[0], "train")) == 10


# Bad input: a message that says what, where and what to do


def _remove(path, raw):
    path.unlink()


def _wrong_dimensions(path, raw):
    write(path, np.ones((24, 20, 6, 2), np.int16))


def _other_shape(path, raw):
    write(path, np.ones((24, 20, 7), np.int16))


def _not_a_number(path, raw):
    volume = np.ones((24, 20, 6), np.float32)
    volume[3, 4, 5] = np.nan
    volume[3, 4, 4] = np.inf
    write(path, volume)


def _complex(path, raw):
    write(path, np.ones((24, 20, 6), np.complex64))


def _truncated(path, raw):
    path.write_bytes(path.read_bytes()[:-200])


def _not_nifti(path, raw):
    path.write_bytes(gzip.compress(b"no image"))


def _not_gzip(path, raw):
    path.write_bytes(b"no image")


def _shorter_than_it_says(path, raw):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))


def _empty(path, raw):
    write(path, np.zeros((24, 20, 6), np.int16))


NAME = patient_name(2)
T1CE = rf"{NAME}/{NAME}_t1ce\.nii\.gz"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _remove,
            rf"patient {NAME} in .*raw has no t1ce: expected .*{T1CE}; add the file or remove the patient's folder",
        ),
        (
            _wrong_dimensions,
            rf"{T1CE} has shape \(24, 20, 6, 2\), expected three dimensions \(BraTS: 240 x 240 x 155\)",
        ),
        (
            _other_shape,
            rf"{T1CE} has shape \(24, 20, 7\), but {NAME}_seg.nii.gz has \(24, 20, 6\): all files .* one shape",
        ),
        (_not_a_number, rf"{T1CE} holds 2 voxels that are NaN or inf: repair the file or remove the patient's folder"),
        (_complex, rf"{T1CE} holds values of type complex64, expected plain numbers"),
        (_truncated, rf"{T1CE} cannot be read as a NIfTI volume \(.*\): fetch this file again"),
        (_not_nifti, rf"{T1CE} cannot be read as a NIfTI volume"),
        (_not_gzip, rf"{T1CE} cannot be read as a NIfTI volume \(Not a gzipped file"),
        (_shorter_than_it_says, rf"{T1CE} cannot be read as a NIfTI volume"),
        (_empty, rf"{T1CE} is zero or less everywhere: fetch this file again"),
    ],
)
def test_bad_modality(raw, tmp_path, damage, message):
    damage(file_of(raw, 2, "t1ce"), raw)
    with pytest.raises(InputError, match=message):
        ensure_data(raw, tmp_path / "cache", 16)


@pytest.mark.parametrize(("dtype", "label"), [(np.uint8, 5), (np.int16, -1), (np.float32, 1.5)])
def test_label_out_of_range(raw, tmp_path, dtype, label):
    seg = np.zeros((24, 20, 6), dtype)
    seg[3, 3, 3] = label
    write(file_of(raw, 2, "seg"), seg)
    message = rf"{NAME}_seg\.nii\.gz holds the label {label}: allowed are the whole numbers 0 \(healthy\) to 4"
    with pytest.raises(InputError, match=message):
        prepare(raw, tmp_path / "out", 16)


def test_missing_and_empty_data_folders(raw, tmp_path):
    with pytest.raises(InputError, match=r"data folder .*nowhere does not exist or is not a folder: give the one"):
        ensure_data(tmp_path / "nowhere", tmp_path / "cache", 16)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photos").mkdir()
    with pytest.raises(
        InputError, match=r"no patient folders in .*holiday: looked for NAME/NAME_\{flair,.*BraTS2021_00000"
    ):
        ensure_data(tmp_path / "holiday", tmp_path / "cache", 16)
    assert not (tmp_path / "cache").exists()
    (raw / "BraTS2021_00009").mkdir()
    with pytest.raises(InputError, match=r"patient BraTS2021_00009 in .* has no flair, t1, t1ce, t2, seg: expected"):
        prepare(raw, tmp_path / "out", 16)


def test_image_size_and_brain_share(raw, tmp_path):
    with pytest.raises(
        InputError, match=r"has shape \(24, 20, 6\), smaller in plane than the image size 32: choose a smaller"
    ):
        prepare(raw, tmp_path / "out", 32)
    with pytest.raises(InputError, match="image size 0: give a positive number of pixels"):
        prepare(raw, tmp_path / "out", 0)
    with pytest.raises(InputError, match=r"no axial slice of patient .* at least 90% of its pixels \(at most 40\.0%\)"):
        prepare(raw, tmp_path / "out", 16, min_brain=0.9)


def test_prepared_folder_is_never_put_over_other_files(raw, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no prepared slices: choose another folder"):
        prepare(raw, tmp_path, 16)


def test_bad_prepared_folders(raw, tmp_path):
    with pytest.raises(InputError, match="holds no finished prepared slices of format 1: prepare them again"):
        SliceDataset(tmp_path / "nowhere", "train")
    root = prepare(raw, tmp_path / "out", 16)
    with pytest.raises(InputError, match="unknown split 'dev': choose one of train, val, test"):
        SliceDataset(root, "dev")
    path = next((root / "train").glob("*.npz"))
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"", bytes([*whole[:300], whole[300] ^ 255, *whole[301:]])):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{path.name} is damaged \(.*\): delete the folder .*out and run again"):
            SliceDataset(root, "train")
    for number in range(1, 4):
        shutil.rmtree(raw / patient_name(number))
    with pytest.raises(InputError, match=r"split 'val' of .* has no patients: with fewer than 3"):
        SliceDataset(prepare(raw, root, 16), "val")


def test_a_full_disk(raw, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(
        InputError, match=r"cannot prepare data under .*cache .*No space left on device.*free space or choose"
    ):
        ensure_data(raw, tmp_path / "cache", 16)


def test_an_error_leaves_no_thread_behind():
    """While the exception lives, so do the frames it came through, and whatever they would clean up later."""

    def job(item):
        raise InputError(f"item {item}")

    before = set(threading.enumerate())
    with pytest.raises(InputError, match="item 1") as caught:
        in_parallel(job, [1], 1, "Working")
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)  # the one that draws the bar ends a moment later
    assert not left
    assert caught.value is not None
