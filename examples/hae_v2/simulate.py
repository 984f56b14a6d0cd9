"""Simulated patients on real anatomy, written in the layout of BraTS 2021.

The BraTS images cannot be shipped with this package. What every installation has is the ICBM MNI152 template (an
average T1 image with grey- and white-matter maps, inside nilearn's wheel). From it `simulate` makes patients:

1. Anatomy: the template is rotated, scaled, perhaps mirrored, its ventricles widened or narrowed, and bent by a smooth
   random deformation on two scales; a lesion pushes its surroundings away.
2. Contrast: FLAIR, T1, T1ce and T2 are mixtures of a CSF, a grey- and a white-matter intensity by the tissue maps,
   which differ a little between patients, plus the template's own fine structure. Everybody has some healthy tissue
   that looks like parts of a lesion: bright white matter of age (caps around the ventricles and scattered spots in
   FLAIR and T2), regional grey-matter differences and, in T1ce, vessels.
3. Lesion (in `lesion_share` of the patients): blobs of thresholded smooth noise, oedema (label 2) following white
   matter around a core with an irregular enhancing rim (4) and a necrotic centre (1); one in four does not enhance.
   Its intensities differ between patients and overlap with those of CSF, grey matter and aged white matter, so that
   no single intensity gives it away.
4. Acquisition: a smooth bias field, a gain per image and Rician noise; outside the brain everything is zero.

Limits: all patients share one average brain, so their folding differs far less than between people; one lesion each;
no motion, no resection cavities, no thick slices. They exercise a pipeline and compare methods with each other. They
say nothing about patients, and no result on them is a result on BraTS.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from memopt.errors import InputError

MODALITIES = ("flair", "t1", "t1ce", "t2")
SHAPE = (240, 240, 155)
"""Voxels of 1 mm, stored right to left, front to back, foot to head."""
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239.0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
VERSION = 1
"""Of the method: raised whenever the same seed gives other voxels."""

Array = NDArray[np.float32]
Box = tuple[slice, slice, slice]
Item = TypeVar("Item")
Result = TypeVar("Result")

# The part of the grid that a brain can reach: work outside it would be spent on zeros.
_BOX: Box = (slice(34, 206), slice(18, 222), slice(2, 153))

# Mean intensity of CSF, grey and white matter, then the weight of the T1 template's fine structure.
_TISSUE = {
    "flair": (0.16, 0.66, 0.52, -0.3),
    "t1": (0.26, 0.62, 0.88, 1.0),
    "t1ce": (0.28, 0.64, 0.89, 1.0),
    "t2": (1.00, 0.58, 0.42, -0.8),
}

# Where lesion intensities lie, in the same units: (lowest, highest) over patients.
_LESION = {
    "oedema": {"flair": (0.64, 0.86), "t1": (0.50, 0.74), "t1ce": (0.52, 0.75), "t2": (0.66, 0.90)},
    "rim": {"flair": (0.54, 0.80), "t1": (0.46, 0.66), "t1ce": (0.85, 1.20), "t2": (0.52, 0.78)},
    "centre": {"flair": (0.22, 0.66), "t1": (0.28, 0.50), "t1ce": (0.30, 0.55), "t2": (0.72, 1.02)},
}


class _Template(NamedTuple):
    """MNI152 cut to its brain: maps [X, Y, Z] in [0, 1], 1 mm, stored left to right, back to front, foot to head."""

    maps: tuple[Array, Array, Array, Array, Array]
    """Brain mask, grey matter, white matter, fine structure of T1, nearness to the lateral ventricles."""
    deep_white: Array
    """[N, 3] millimetres from the centre: white matter deep enough for the middle of a lesion."""
    ventricles: Array
    """[3] millimetres from the centre: the middle of the lateral ventricles."""


@lru_cache(maxsize=1)
def _template() -> _Template:
    from nilearn import datasets
    from scipy import ndimage

    names = ("template", "gm_template", "wm_template", "brain_mask")
    t1, grey, white, mask = (getattr(datasets, f"load_mni152_{name}")(resolution=1).get_fdata() for name in names)
    brain = mask > 0
    box = tuple(slice(max(s.start - 2, 0), s.stop + 2) for s in ndimage.find_objects(brain.astype(np.int8))[0])
    t1, grey, white, brain = (volume[box] for volume in (t1, grey, white, brain))
    fluid = 1 - grey - white
    mixture = np.stack([fluid[brain], grey[brain], white[brain]], axis=1)
    fine = np.zeros_like(t1)
    fine[brain] = t1[brain] - mixture @ np.linalg.lstsq(mixture, t1[brain], rcond=None)[0]

    centre = (np.array(brain.shape) - 1) / 2
    depth = ndimage.distance_transform_edt(np.pad(brain, 1))[1:-1, 1:-1, 1:-1]
    inner = (fluid > 0.5) & (depth > 25)
    pieces, count = ndimage.label(inner)
    lateral = pieces == 1 + np.argmax(ndimage.sum_labels(inner, pieces, range(1, count + 1)))
    near = np.exp(-((ndimage.distance_transform_edt(~lateral) / 5) ** 2)) * ~lateral
    maps = tuple(np.ascontiguousarray(m, dtype=np.float32) for m in (brain, grey, white, fine, near))
    deep = np.argwhere((white > 0.6) & (depth > 12)) - centre
    return _Template(maps, deep.astype(np.float32), (np.argwhere(lateral).mean(0) - centre).astype(np.float32))  # type: ignore[arg-type]


def _noise(rng: np.random.Generator, shape: tuple[int, ...], spacing: float) -> Array:
    """Smooth noise [X, Y, Z] of about unit variance: a cubic B-spline over random values `spacing` voxels apart."""
    knots = [int((n - 1) / spacing) + 5 for n in shape]
    field = rng.standard_normal(knots, dtype=np.float32)
    for n, count in zip(shape, knots, strict=True):
        at = np.arange(n) / spacing + rng.random()
        first, f = at.astype(int), at % 1
        basis = np.zeros((n, count), np.float32)
        weights = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
        for k, weight in enumerate(weights):
            basis[np.arange(n), first + k] = weight / 6
        field = np.tensordot(field, basis, axes=(0, 1))  # the new axis goes last: three turns restore the order
    return np.asarray(field * np.float32(3.0), dtype=np.float32)  # 3 makes up for the averaging of neighbours


def _bump(axes: list[Array], centre: NDArray[Any], radius: float) -> Array:
    """exp(-(r / radius)^2) around `centre`, both in millimetres: [X, Y, Z] on the box."""
    parts = [np.exp(-(((axis - c) / radius) ** 2)) for axis, c in zip(axes, centre, strict=True)]
    return np.asarray(np.multiply.outer(parts[0], parts[1])[..., None] * parts[2], dtype=np.float32)


def _millimetres() -> list[Array]:
    """Coordinates of the box's voxels along each axis, towards right, front and head, from the grid's centre."""
    signs = (-1, -1, 1)
    return [
        (s * (np.arange(b.start, b.stop) - (n - 1) / 2)).astype(np.float32)
        for b, n, s in zip(_BOX, SHAPE, signs, strict=True)
    ]


class _Lesion(NamedTuple):
    centre: Array
    """[3] millimetres from the grid's centre."""
    radius: float
    """Of the oedema, in millimetres, before it becomes irregular."""


def _anatomy(
    rng: np.random.Generator, lesion: _Lesion | None, pose: NDArray[Any], age: float
) -> tuple[NDArray[np.bool_], list[Array]]:
    """One patient's brain [X, Y, Z] on the box, and the template's other maps [N] in its N voxels."""
    from scipy import ndimage

    template = _template()
    axes = _millimetres()
    shape = tuple(len(axis) for axis in axes)
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    shift = [2.5 * _noise(rng, shape, 45) + 0.9 * _noise(rng, shape, 14) for _ in range(3)]
    swellings = [(np.linalg.solve(pose, template.ventricles), 28.0, -0.12 + 0.42 * age)]
    if lesion is not None:
        swellings.append((lesion.centre, 1.3 * lesion.radius, rng.uniform(0.05, 0.3)))
    for centre, radius, strength in swellings:
        bump = np.float32(strength) * _bump(axes, centre, radius)
        for k in range(3):
            shift[k] -= bump * (grid[k] - np.float32(centre[k]))
    for k in range(3):
        shift[k] += grid[k]
    middle = (np.array(template.maps[0].shape, np.float32) - 1) / 2
    at = np.tensordot(pose.astype(np.float32), np.stack(shift), axes=1) + middle[:, None, None, None]
    brain = ndimage.map_coordinates(template.maps[0], at, order=1) > 0.5
    inside = at[:, brain]
    return brain, [ndimage.map_coordinates(source, inside, order=1) for source in template.maps[1:]]


def _step(values: Array, width: float) -> Array:
    """0 below -width, 1 above width, smooth between."""
    t = np.clip(values / (2 * width) + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def _grow(
    rng: np.random.Generator, lesion: _Lesion, brain: NDArray[np.bool_], white: Array
) -> tuple[dict[str, Array], NDArray[np.uint8]]:
    """The share of oedema, rim and centre in each of the N brain voxels, and their labels (0, 1, 2, 4)."""
    from scipy import ndimage

    def noise(spacing: float) -> Array:
        return _noise(rng, brain.shape, spacing)[brain]

    stretch = lesion.radius * rng.uniform(0.75, 1.35, 3)
    x, y, z = (((a - c) / s) ** 2 for a, c, s in zip(_millimetres(), lesion.centre, stretch, strict=True))
    distance = np.sqrt(np.add(np.add.outer(x, y)[..., None], z, dtype=np.float32)[brain])
    rough, fine = noise(0.7 * lesion.radius), noise(7)
    height = 1 - distance + 0.28 * rough + 0.10 * fine + 0.45 * (white - 0.75)
    above = np.zeros(brain.shape, np.bool_)
    above[brain] = height > 0
    pieces, _ = ndimage.label(above)
    # Blobs cut off from the largest one are noise, not satellites; a margin keeps its own soft border.
    sizes = np.bincount(pieces.ravel(), minlength=2)[1:]
    main = ndimage.binary_dilation(pieces == 1 + np.argmax(sizes), iterations=3)[brain]
    oedema = _step(np.where(main, height, -1), rng.uniform(0.06, 0.22))
    core_height = rng.uniform(0.3, 0.7) - distance + 0.16 * noise(0.5 * lesion.radius) + 0.07 * fine
    core = _step(core_height, rng.uniform(0.04, 0.1)) * oedema
    thickness = rng.uniform(0.10, 0.26) * (1 + 0.5 * noise(9))
    centre = _step(core_height - np.maximum(thickness, 0), 0.05) * core
    if rng.random() < 0.25:
        centre = core  # a tumour that does not enhance
    shares = {"oedema": oedema - core, "rim": core - centre, "centre": centre}
    names = np.array([2, 4, 1], np.uint8)[np.argmax(list(shares.values()), axis=0)]
    return shares, np.where(oedema > 0.5, names, 0).astype(np.uint8)


def patient_name(number: int) -> str:
    """The name of a patient's folder: `BraTS2021_00007`."""
    return f"BraTS2021_{number:05d}"


def has_lesion(seed: int, number: int, lesion_share: float) -> bool:
    """Whether a patient has a lesion: spread evenly over the numbers, so that few patients keep the share too."""
    start = np.random.default_rng([seed, 0x1E510]).random()
    return bool((start + number * 0.6180339887498949) % 1 < lesion_share)


def simulate_patient(seed: int, number: int, *, lesion_share: float = 0.6) -> dict[str, NDArray[Any]]:
    """One patient, determined by the arguments alone: int16 images and the uint8 `seg`, each [240, 240, 155]."""
    rng = np.random.default_rng([seed, number])
    age = rng.beta(1.4, 1.8)
    angles = np.deg2rad(rng.normal(0, 2.5, 3))
    pose = np.diag(1 / rng.normal(0.915, 0.015, 3))  # from a patient's millimetres to the template's
    for (a, b), angle in zip(((0, 1), (0, 2), (1, 2)), angles, strict=True):
        turn = np.eye(3)
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        pose = pose @ turn
    if rng.random() < 0.5:
        pose = np.diag([-1.0, 1, 1]) @ pose
    lesion = None
    if has_lesion(seed, number, lesion_share):
        spot = rng.choice(_template().deep_white)
        lesion = _Lesion(np.linalg.solve(pose, spot).astype(np.float32), rng.uniform(17, 34))
    brain, (grey, white, fine, near) = _anatomy(rng, lesion, pose, age)
    fluid = 1 - grey - white

    def noise(spacing: float) -> Array:
        return _noise(rng, brain.shape, spacing)[brain]

    spots = np.clip(0.8 * noise(6) + 0.3 * noise(3) - 2.1 + 0.5 * age, 0, 0.7) * white
    caps = near * np.clip(0.8 + 0.5 * noise(16), 0, 1.6) * (white + 0.5 * grey)
    aged = np.minimum(caps * (0.35 + 0.75 * age) + spots, 1)
    vessels = _step(noise(3) - 1.5, 0.5) * np.clip(fluid * 2, 0, 1)
    regional = noise(22)
    shares, labels = _grow(rng, lesion, brain, white) if lesion else ({}, np.uint8(0))
    visible = rng.uniform(0.7, 0.95)  # how much of the tissue's own contrast a lesion hides
    mottle = noise(5) if lesion else np.float32(0)

    images: dict[str, NDArray[Any]] = {}
    for name in MODALITIES:
        *means, weight = _TISSUE[name]
        means = [mean * rng.normal(1, 0.04) for mean in means]
        image = means[0] * fluid + means[1] * grey + means[2] * white + 1.3 * weight * fine
        image += {"flair": 0.05, "t2": 0.04}.get(name, 0.0) * regional * grey
        image += {"flair": 0.36, "t2": 0.20}.get(name, -0.10) * aged
        if name == "t1ce":
            image += 0.55 * vessels
        for part, share in shares.items():
            level = rng.uniform(*_LESION[part][name])
            image += np.float32(visible) * share * (np.float32(level) + np.float32(0.045) * mottle - image)
        image *= np.exp(0.06 * noise(70))
        gain, sigma = rng.uniform(300, 1500), rng.uniform(0.015, 0.03)
        error = np.float32(sigma) * rng.standard_normal((2, image.size), dtype=np.float32)
        measured = gain * np.hypot(image + error[0], error[1])
        images[name] = np.zeros(SHAPE, np.int16)
        images[name][_BOX][brain] = np.maximum(np.rint(measured), 1)  # zero means "outside the brain"
    images["seg"] = np.zeros(SHAPE, np.uint8)
    images["seg"][_BOX][brain] = labels
    return images


def write_patient(folder: Path, images: dict[str, NDArray[Any]]) -> None:
    """Write `folder/NAME_{flair,t1,t1ce,t2,seg}.nii.gz` in one step: all five files or no folder."""
    import nibabel

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, voxels in images.items():
        data = nibabel.Nifti1Image(voxels, AFFINE).to_bytes()
        (temporary / f"{folder.name}_{name}.nii.gz").write_bytes(gzip.compress(data, compresslevel=1, mtime=0))
    temporary.rename(folder)


def in_parallel(job: Callable[[Item], Result], items: Iterable[Item], workers: int, title: str) -> list[Result]:
    """[job(item) for item in items] in threads, with a progress bar; the first error ends it.

    Threads suffice because numpy, scipy, zlib and torch release the interpreter lock; unlike processes they leave
    nothing running when the program is killed, and need no import of this file by name.
    """
    from rich.console import Console
    from rich.progress import Progress

    items = list(items)
    # Not rich's track(): an error leaves that generator behind with its threads, and whichever thread collects it may
    # then wait for ever for one that waits for it.
    with ThreadPoolExecutor(workers) as pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(title, total=len(items))
        futures = [pool.submit(job, item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
                progress.advance(bar)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def simulate(
    root: Path | str,
    *,
    patients: int = 40,
    seed: int = 0,
    lesion_share: float = 0.6,
    workers: int | None = None,
) -> Path:
    """Make patients 0 to `patients` - 1 under `root` and return it; those already there are kept.

    A killed run goes on where it stopped. `README.txt` and `simulation.json` in `root` say what the folder holds.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    root = Path(root)
    if patients < 1 or not 0 <= lesion_share <= 1:
        raise InputError(
            f"cannot simulate {patients} patients with lesion_share={lesion_share}: "
            "give at least 1 patient and a share between 0 and 1"
        )
    made_by = {"simulated": True, "version": VERSION, "seed": seed, "lesion_share": lesion_share}
    marker = root / "simulation.json"
    if marker.exists():
        if (found := json.loads(marker.read_text())) != made_by:
            raise InputError(
                f"{root} holds patients simulated with {found}, asked for {made_by}: choose another folder"
            )
    elif root.exists() and any(root.iterdir()):
        raise InputError(f"{root} is not empty and was not made by this simulator: choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(".*.tmp"):
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    for name, text in ((marker.name, json.dumps(made_by)), ("README.txt", __doc__ or "")):
        temporary = root / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(text)
        temporary.replace(root / name)

    def make(number: int) -> None:
        write_patient(root / patient_name(number), simulate_patient(seed, number, lesion_share=lesion_share))

    missing = [number for number in range(patients) if not (root / patient_name(number)).exists()]
    if missing:
        _template()  # once, before the threads would each load it
        with threadpool_limits(1):  # patients already fill the cores; more BLAS threads would only wait for each other
            in_parallel(make, missing, workers or min(os.cpu_count() or 1, 8), "Simulating patients")
    return root
