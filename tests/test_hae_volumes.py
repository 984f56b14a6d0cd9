"""Masks and maps as volumes: they lie where the patient's own files do, voxel by voxel."""

import gzip
import time

import nibabel
import numpy as np
import pytest

from examples.hae_v2.data import SliceDataset, prepare
from examples.hae_v2.results import Method, Slices
from examples.hae_v2.simulate import MODALITIES
from examples.hae_v2.volumes import write_volumes

NAMES = tuple(f"BraTS2021_{number:05d}" for number in (3, 7, 11, 12, 20))
SEEN = slice(1, 6)
AFFINES = {
    "identity": np.eye(4),
    "BraTS": np.array([[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    "flips and an offset": np.array([[-1, 0, 0, 90.5], [0, 1, 0, -126.25], [0, 0, -1, 72], [0, 0, 0, 1.0]]),
    "axes exchanged": np.array([[0, 0, 1, -3], [-1, 0, 0, 17], [0, 1, 0, 8.5], [0, 0, 0, 1.0]]),
    "turned": np.array(
        [[np.cos(0.3), -np.sin(0.3), 0, 5], [np.sin(0.3), np.cos(0.3), 0, -7], [0, 0, 1, 2], [0, 0, 0, 1.0]]
    ),
}


def blocks(shape, size, seed):
    """A mask of whole blocks, those of one pixel each: single ones, lines and surfaces, like nothing turned."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((size, size, shape[2])) < 0.3
    coarse[:, :, 2] = False
    coarse[1:4, 2, 2] = coarse[size - 1, size - 1, 2] = True
    return coarse.repeat(shape[0] // size, axis=0).repeat(shape[1] // size, axis=1)


def patients(root, shape=(24, 24, 7), size=12, affine=None, change=lambda header: None):
    """Patients whose brain fills the slices `SEEN`; returns each one's lesion."""
    lesions = {}
    for number, name in enumerate(NAMES):
        lesions[name] = blocks(shape, size, number)
        lesions[name][:, :, : SEEN.start] = lesions[name][:, :, SEEN.stop :] = False
        rng = np.random.default_rng(number)
        (root / name).mkdir(parents=True)
        for kind in (*MODALITIES, "seg"):
            volume = np.zeros(shape, np.int16)
            volume[:, :, SEEN] = rng.integers(1, 1000, shape)[:, :, SEEN]
            if kind == "seg":
                volume = 2 * lesions[name].astype(np.uint8)
            image = nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine)
            change(image.header)
            nibabel.save(image, reference(root, name, kind))
    return lesions


def reference(root, name, kind="flair"):
    return root / name / f"{name}_{kind}.nii.gz"


def slices_of(dataset):
    foreground = np.ones(dataset.masks.shape, bool)
    names = tuple(dataset.patients)
    return Slices(dataset.split, names, dataset.patient, dataset.slices, dataset.images, dataset.masks, foreground)


def written(folder, slices, source, masks=None, maps=None):
    """What is written for these masks and maps: name and kind to image."""
    nothing = np.zeros(slices.truth.shape)
    masks = nothing > 0 if masks is None else masks
    maps = nothing.astype(np.float32) if maps is None else maps
    scores = np.zeros(len(slices), np.float32)
    files = write_volumes(folder, slices, Method("ours", scores, maps, scores > 0, masks), source)
    assert sorted(files) == sorted(folder.iterdir())
    return {file.name.removesuffix(".nii.gz"): nibabel.load(file) for file in files}


@pytest.fixture
def prepared(tmp_path):
    """Slices of 12 x 12 pixels and the volumes of 24 x 24 x 7 they come from."""
    patients(tmp_path / "raw")
    root = prepare(tmp_path / "raw", tmp_path / "out", 12)
    return slices_of(SliceDataset(root, "train")), tmp_path / "raw"


@pytest.mark.parametrize("affine", AFFINES)
def test_volumes_are_in_the_space_of_the_patient(tmp_path, affine):
    def change(header):
        header.set_xyzt_units("mm", "sec")
        header.set_sform(AFFINES[affine], code=4)
        header["descrip"] = b"from the scanner"
        header["cal_max"], header["cal_min"] = 900, 100

    patients(tmp_path / "raw", affine=AFFINES[affine], change=change)
    slices = slices_of(SliceDataset(prepare(tmp_path / "raw", tmp_path / "out", 12), "train"))
    found = written(tmp_path / "nifti", slices, tmp_path / "raw")
    assert found.keys() == {f"{name}_{kind}" for name in slices.patients for kind in ("mask", "map")}
    for name, image in found.items():
        own = nibabel.load(reference(tmp_path / "raw", name.rpartition("_")[0]))
        assert image.shape == own.shape == (24, 24, 7)
        assert np.array_equal(image.affine, own.affine)
        assert np.allclose(image.affine, AFFINES[affine], atol=1e-6)
        assert nibabel.aff2axcodes(image.affine) == nibabel.aff2axcodes(AFFINES[affine])
        assert image.header.get_zooms() == own.header.get_zooms() == (1, 1, 1)
        assert image.header.get_xyzt_units() == ("mm", "sec")
        for key in ("sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d", "pixdim", "descrip"):
            assert np.array_equal(image.header[key], own.header[key]), key
        assert image.header["sform_code"] == 4
        assert (image.header["cal_min"], image.header["cal_max"]) == (0, 0)  # those of the patient's intensities
        assert image.header.get_data_dtype() == (np.uint8 if name.endswith("mask") else np.float32)


@pytest.mark.parametrize(
    ("shape", "size"), [((24, 24, 7), 12), ((24, 24, 7), 24), ((24, 12, 7), 12), ((16, 32, 6), 16)]
)
def test_a_mask_comes_back_as_it_was(tmp_path, shape, size):
    lesions = patients(tmp_path / "raw", shape, size, AFFINES["flips and an offset"])
    root = prepare(tmp_path / "raw", tmp_path / "out", size)
    for split in ("train", "val", "test"):
        slices = slices_of(SliceDataset(root, split))
        assert slices.truth.any()
        found = written(tmp_path / split, slices, tmp_path / "raw", masks=slices.truth)
        for name in slices.patients:
            back = np.asarray(found[f"{name}_mask"].dataobj)
            assert set(np.unique(back)) == {0, 1}
            assert np.array_equal(back == 1, lesions[name])
            # no other arrangement of the axes would pass
            turned = [lesions[name][::-1], lesions[name][:, ::-1], lesions[name][:, :, ::-1]]
            assert not any(np.array_equal(back == 1, other) for other in turned)


def test_a_map_is_interpolated_between_pixels(prepared, tmp_path):
    slices, source = prepared
    rows, columns = np.mgrid[:12, :12].astype(np.float32)
    maps = (100 * (1 + slices.slices[:, None, None]) + 10 * columns + 0.5 * rows).astype(np.float32)
    found = written(tmp_path / "nifti", slices, source, maps=maps)
    at = np.clip((np.arange(24) + 0.5) / 2 - 0.5, 0, 11)  # a voxel's place among the pixels
    x, y, z = np.meshgrid(at, at, np.arange(7), indexing="ij")
    expected = 100 * (1 + z) + 10 * x + 0.5 * y
    expected[:, :, : SEEN.start] = expected[:, :, SEEN.stop :] = 0
    assert expected[:, :, SEEN].min() > 0
    for name in slices.patients:
        np.testing.assert_allclose(np.asarray(found[f"{name}_map"].dataobj), expected, rtol=1e-6)


def test_each_patient_has_its_own_and_unseen_slices_are_empty(prepared, tmp_path):
    slices, source = prepared
    assert len(slices.patients) == 3
    everything = np.ones(slices.truth.shape, bool)
    maps = (everything * (7 + slices.patient)[:, None, None]).astype(np.float32)
    kept = ~np.isin(slices.slices, [3])  # as if slice 3 had no brain
    some = Slices(
        slices.split,
        slices.patients,
        *(a[kept] for a in (slices.patient, slices.slices, slices.images, slices.truth, slices.foreground)),
    )
    found = written(tmp_path / "nifti", some, source, everything[kept], maps[kept])
    for number, name in enumerate(slices.patients):
        mask, amap = (np.asarray(found[f"{name}_{kind}"].dataobj) for kind in ("mask", "map"))
        assert mask.all(axis=(0, 1)).tolist() == [False, True, True, False, True, True, False]
        assert np.array_equal(amap, mask * np.float32(7 + number))


def test_values_are_not_scaled_as_the_patients_are(tmp_path):
    """A file whose integers stand for others (slope and intercept), in big-endian order."""
    patients(tmp_path / "raw")
    for name in NAMES:
        image = nibabel.load(reference(tmp_path / "raw", name))
        header = nibabel.Nifti1Header(endianness=">")
        header.set_data_dtype(np.int16)
        other = nibabel.Nifti1Image(np.asarray(image.dataobj) * 0.25 + 10.0, image.affine, header)
        other.header.set_slope_inter(0.25, 10)
        nibabel.save(other, reference(tmp_path / "raw", name))
    assert nibabel.load(reference(tmp_path / "raw", NAMES[0])).dataobj.slope == 0.25
    slices = slices_of(SliceDataset(prepare(tmp_path / "raw", tmp_path / "out", 12), "train"))
    maps = np.full(slices.truth.shape, 0.3, np.float32)
    found = written(tmp_path / "nifti", slices, tmp_path / "raw", slices.truth, maps)
    for name in slices.patients:
        mask, amap = found[f"{name}_mask"], found[f"{name}_map"]
        assert (mask.dataobj.slope, mask.dataobj.inter, amap.dataobj.slope, amap.dataobj.inter) == (1, 0, 1, 0)
        assert set(np.unique(np.asarray(mask.dataobj))) == {0, 1}
        assert (np.asarray(amap.dataobj)[:, :, slices.slices[slices.patient == 0]] == np.float32(0.3)).all()


def test_the_same_results_give_the_same_bytes(prepared, tmp_path, monkeypatch):
    slices, source = prepared
    maps = np.random.default_rng(0).random(slices.truth.shape).astype(np.float32)
    written(tmp_path / "one", slices, source, slices.truth, maps)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    written(tmp_path / "two", slices, source, slices.truth, maps)
    written(tmp_path / "two", slices, source, slices.truth, maps)  # over what is there
    for file in (tmp_path / "one").iterdir():
        content = file.read_bytes()
        assert (tmp_path / "two" / file.name).read_bytes() == content
        assert content[4:8] == bytes(4)  # no time
        assert len(gzip.decompress(content)) == 352 + 24 * 24 * 7 * (1 if "mask" in file.name else 4)
