"""Slices for training from a folder in the layout of BraTS 2021, real or simulated.

`prepare` turns each patient, `NAME/NAME_{flair,t1,t1ce,t2,seg}.nii.gz`, into one `NAME.npz` under `train/`, `val/` or
`test/`, with

- `images`: float16 [S, 4, H, W]: each modality divided by the 99th percentile of its non-zero voxels, resized
  bilinearly (with a triangle as wide as a coarser pixel, so that none is skipped). float16 keeps 11 significant bits,
  far finer than the noise of the images;
- `masks`: bool [S, H, W]: the lesion (any label > 0), resized the same way, where it is above 0.5;
- `slices`: int16 [S]: the axial slice's index in the volume, from the foot up.

Modalities are in the order of `MODALITIES`. An image's rows run along the volume's second axis and its columns along
the first: for BraTS the forehead is at the top and the patient's right on the left, as radiologists look at it.

`index.json` beside the splits records everything that determined the result; a prepared folder is used again only if
it matches. `SliceDataset` reads one split; `ensure_data` is all that a recipe needs.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from memopt.errors import InputError

from .simulate import MODALITIES, in_parallel, simulate

FORMAT = 1
"""Of the prepared folder: raised whenever the same source gives other files."""
SPLITS = ("train", "val", "test")
LAYOUT = "NAME/NAME_{flair,t1,t1ce,t2,seg}.nii.gz"


def find_patients(source: Path) -> list[Path]:
    """The patient folders in `source`, sorted by name, each with all five files."""
    if not source.is_dir():
        raise InputError(
            f"data folder {source} does not exist or is not a folder: give the one that holds the patients ({LAYOUT})"
        )
    kinds = (*MODALITIES, "seg")
    folders = [
        folder
        for folder in sorted(source.iterdir())
        if folder.is_dir()
        and not folder.name.startswith(".")
        and (folder.name.startswith("BraTS") or any(_file(folder, kind).exists() for kind in kinds))
    ]
    if not folders:
        raise InputError(
            f"no patient folders in {source}: looked for {LAYOUT} as in BraTS 2021 "
            "(BraTS2021_00000/BraTS2021_00000_flair.nii.gz); give the folder right above the patients"
        )
    for folder in folders:
        if missing := [kind for kind in kinds if not _file(folder, kind).exists()]:
            raise InputError(
                f"patient {folder.name} in {source} has no {', '.join(missing)}: expected {_file(folder, missing[0])}; "
                "add the file or remove the patient's folder"
            )
    return folders


def _file(folder: Path, kind: str) -> Path:
    return folder / f"{folder.name}_{kind}.nii.gz"


SPACING = 1.0
"""Millimetres between voxels along each axis."""


def read_volume(path: Path) -> tuple[NDArray[Any], Any]:
    """The voxels [X, Y, Z] of one file, checked, and nibabel's header of it."""
    from nibabel import Nifti1Image
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        # Through gzip as a whole, which checks the file's checksum; nibabel alone reads damaged voxels without a word.
        data = gzip.decompress(path.read_bytes())
        image = Nifti1Image.from_bytes(data)
        volume: NDArray[Any] = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError) as error:
        raise InputError(f"{path} cannot be read as a NIfTI volume ({error}): fetch this file again") from error
    if volume.ndim != 3:
        raise InputError(f"{path} has shape {volume.shape}, expected three dimensions (BraTS: 240 x 240 x 155)")
    spacing = [float(s) for s in image.header.get_zooms()]
    if not np.allclose(spacing, SPACING, atol=0.01):
        raise InputError(
            f"{path} has voxels of {' x '.join(f'{s:g}' for s in spacing)} mm, expected {SPACING:g} mm along each axis "
            "as in BraTS, whose size the model's pixels have: resample the patient's files"
        )
    if volume.dtype.kind not in "iuf":
        raise InputError(f"{path} holds values of type {volume.dtype}, expected plain numbers: convert the file")
    if volume.dtype.kind == "f" and (bad := int((~np.isfinite(volume)).sum())):
        raise InputError(
            f"{path} holds {bad} voxels that are NaN or inf: repair the file or remove the patient's folder"
        )
    return volume, image.header


def _read_patient(folder: Path, image_size: int) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """The modalities, divided by their 99th percentiles, float32 [X, Y, Z] each, and the lesion, bool [X, Y, Z]."""
    seg, header = read_volume(_file(folder, "seg"))
    wrong = seg[(seg < 0) | (seg > 4) | (seg != np.floor(seg))]
    if wrong.size:
        raise InputError(
            f"{_file(folder, 'seg')} holds the label {wrong[0]:g}: allowed are the whole numbers 0 (healthy) to 4 "
            "(BraTS: 1 necrotic core, 2 oedema, 4 enhancing); correct the file or remove the patient's folder"
        )
    if min(seg.shape[:2]) < image_size:
        raise InputError(
            f"{_file(folder, 'seg')} has shape {seg.shape}, smaller in plane than the image size {image_size}: "
            "choose a smaller image size"
        )
    images = []
    for kind in MODALITIES:
        volume, its = read_volume(_file(folder, kind))
        if volume.shape != seg.shape:
            raise InputError(
                f"{_file(folder, kind)} has shape {volume.shape}, but {_file(folder, 'seg').name} has {seg.shape}: "
                "all files of a patient must have one shape"
            )
        if not np.allclose(its.get_best_affine(), header.get_best_affine(), atol=0.01):
            raise InputError(
                f"{_file(folder, kind)} lies elsewhere in space than {_file(folder, 'seg').name} (affines differ): "
                "register the patient's files to one another"
            )
        voxels = volume[volume != 0]
        scale = float(np.percentile(voxels, 99)) if voxels.size else 0.0
        if scale <= 0:
            raise InputError(f"{_file(folder, kind)} is zero or less everywhere: fetch this file again")
        images.append(volume.astype(np.float32) / np.float32(scale))
    return images, seg > 0


def _resize(planes: NDArray[Any], size: int) -> torch.Tensor:
    """[X, Y, Z] to float32 [Z, size, size], rows along Y."""
    stack = torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 1, 0), dtype=np.float32))
    return torch.nn.functional.interpolate(stack[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]


def _prepare_patient(folder: Path, target: Path, image_size: int, min_brain: float, slice_step: int) -> int:
    """Write the patient's slices to `target`, in one step; returns how many there are."""
    images, lesion = _read_patient(folder, image_size)
    brain = np.logical_or.reduce([image != 0 for image in images]).mean(axis=(0, 1))
    kept = np.flatnonzero(brain >= min_brain)
    if not len(kept):
        raise InputError(
            f"no axial slice of patient {folder} shows brain on at least {min_brain:.0%} of its pixels "
            f"(at most {brain.max():.1%}): check the orientation of its files or lower min_brain"
        )
    kept = kept[::slice_step]
    slices = torch.stack([_resize(image[..., kept], image_size) for image in images], dim=1)
    masks = _resize(lesion[..., kept], image_size) > 0.5
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, images=slices.half().numpy(), masks=masks.numpy(), slices=kept.astype(np.int16))
    temporary.replace(target)
    return len(kept)


def split_patients(names: list[str], seed: int) -> dict[str, list[str]]:
    """75% / 5% / 20% of the patients for train, val and test, drawn with `seed`; none is empty from 3 patients up."""
    order = [str(name) for name in np.random.default_rng(seed).permutation(sorted(names))]
    test = max(1, round(0.2 * len(order))) if len(order) > 1 else 0
    val = max(1, round(0.05 * len(order))) if len(order) > 2 else 0
    bounds = {"test": order[:test], "val": order[test : test + val], "train": order[test + val :]}
    return {split: sorted(bounds[split]) for split in SPLITS}


def _config(
    source: Path, folders: list[Path], image_size: int, seed: int, min_brain: float, slice_step: int
) -> dict[str, Any]:
    """Everything that determines a prepared folder. Sizes and times stand for the files' content."""
    files = [_file(folder, kind) for folder in folders for kind in (*MODALITIES, "seg")]
    states = [(str(f.relative_to(source)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return {
        "format": FORMAT,
        "source": str(source.resolve()),
        "files": hashlib.sha256(json.dumps(states).encode()).hexdigest(),
        "image_size": image_size,
        "seed": seed,
        "min_brain": min_brain,
        "slice_step": slice_step,
        "modalities": list(MODALITIES),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def read_index(folder: Path) -> dict[str, Any]:
    """What `index.json` of a prepared folder says: {} where it is missing or cannot be understood."""
    try:
        index = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def prepare(
    source: Path | str,
    destination: Path | str,
    image_size: int,
    seed: int = 0,
    *,
    min_brain: float = 0.1,
    slice_step: int = 1,
    workers: int | None = None,
) -> Path:
    """Prepare the patients in `source` into `destination` and return that; if it holds just that already, do nothing.

    `min_brain`: a slice is kept when at least this share of its pixels is brain (not zero in some modality), and of
    those each `slice_step`-th: neighbours are nearly alike, so fewer slices of more patients teach more.
    A killed run goes on with the patients still missing.
    """
    source, destination = Path(source), Path(destination)
    if image_size < 1:
        raise InputError(f"image size {image_size}: give a positive number of pixels")
    if slice_step < 1:
        raise InputError(f"slice step {slice_step}: give a positive number of slices")
    folders = find_patients(source)
    config = _config(source, folders, image_size, seed, min_brain, slice_step)
    index = read_index(destination)
    made = (destination / "index.json").exists()
    if not made and destination.exists() and any(destination.iterdir()):
        raise InputError(f"{destination} is not empty and holds no prepared slices: choose another folder for them")
    if index.get("config") != config:
        for split in SPLITS:
            shutil.rmtree(destination / split, ignore_errors=True)
    elif index.get("complete"):
        return destination

    splits = split_patients([folder.name for folder in folders], seed)
    for split in SPLITS:
        (destination / split).mkdir(parents=True, exist_ok=True)
        for left_over in (destination / split).glob(".*.tmp"):
            left_over.unlink()
    _write_json(destination / "index.json", {"config": config, "complete": False})
    targets = {name: destination / split / f"{name}.npz" for split, names in splits.items() for name in names}

    def job(folder: Path) -> int:
        target = targets[folder.name]
        if target.exists():
            return len(_load(target)["slices"])
        return _prepare_patient(folder, target, image_size, min_brain, slice_step)

    counts = in_parallel(job, folders, workers or min(os.cpu_count() or 1, 8), "Preparing slices")
    by_name = {folder.name: count for folder, count in zip(folders, counts, strict=True)}
    slices = {split: {name: by_name[name] for name in names} for split, names in splits.items()}
    _write_json(destination / "index.json", {"config": config, "complete": True, "slices": slices})
    return destination


_PARSING = threading.Lock()  # numpy reads a header by `ast`, which Python 3.11 cannot do in two threads at once


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with _PARSING, path.open("rb") as file, np.load(file) as stored:
            return dict(stored)
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is damaged ({error}): delete the folder {path.parent.parent} and run again"
        ) from error


class SliceDataset(Dataset[dict[str, torch.Tensor]]):
    """The slices of one split, in order of patient and slice, held in memory as float16.

    An item: `image` float32 [4, H, W], where each modality is rescaled to exactly [-1, 1] (-1 throughout if it is
    constant); `mask` bool [H, W]; `label` int64, 1 where the mask has any lesion pixel; `patient` int64, an index into
    `patients`; `slice` int64, the axial slice's index in the volume.
    """

    def __init__(self, root: Path | str, split: str) -> None:
        root = Path(root)
        index = read_index(root)
        if not index.get("complete") or index["config"]["format"] != FORMAT:
            raise InputError(f"{root} holds no finished prepared slices of format {FORMAT}: prepare them again")
        if split not in SPLITS:
            raise InputError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        counts: dict[str, int] = index["slices"][split]
        if not counts:
            raise InputError(f"split {split!r} of {root} has no patients: with fewer than 3 not every split gets one")
        self.split = split
        self.patients = list(counts)
        size, total = index["config"]["image_size"], sum(counts.values())
        # Filled patient by patient: never more than one patient is in memory twice.
        self.images = np.empty((total, len(MODALITIES), size, size), np.float16)
        self.masks = np.empty((total, size, size), np.bool_)
        self.slices = np.empty(total, np.int64)
        self.patient = np.empty(total, np.int64)
        start = 0
        for number, (name, count) in enumerate(counts.items()):
            path, stop = root / split / f"{name}.npz", start + count
            stored = _load(path)
            try:
                self.images[start:stop] = stored["images"]
                self.masks[start:stop] = stored["masks"]
                self.slices[start:stop] = stored["slices"]
                self.patient[start:stop] = number
            except (KeyError, ValueError) as error:
                raise InputError(f"{path} does not fit {root / 'index.json'}: delete {root} and run again") from error
            start = stop
        self.labels = np.asarray(self.masks.any(axis=(1, 2)), np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        image = torch.from_numpy(self.images[item].astype(np.float32))
        low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
        span = (high - low).where(high > low, torch.ones(()))
        return {
            "image": (image - low) / span * 2 - 1,
            "mask": torch.from_numpy(self.masks[item].copy()),
            "label": torch.tensor(self.labels[item]),
            "patient": torch.tensor(self.patient[item]),
            "slice": torch.tensor(self.slices[item]),
        }


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the system lets go of it when its holder dies, even by SIGKILL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_data(
    data: Path | str | None,
    cache: Path | str,
    image_size: int,
    *,
    seed: int = 0,
    patients: int = 40,
    lesion_share: float = 0.6,
    min_brain: float = 0.1,
    slice_step: int = 1,
    workers: int | None = None,
) -> Path:
    """The prepared folder for `data`, a folder in BraTS layout, or without it for `patients` simulated patients.

    What is not in `cache` yet is made there. Any number of processes may call this at once: one works, the others wait.
    `seed` determines the simulated patients and the split.
    """
    cache = Path(cache)
    if data is not None:
        find_patients(Path(data))  # before anything is written
    try:
        with _locked(cache / "lock"):
            source = (
                Path(data) if data is not None else cache / f"simulated-{patients}-seed{seed}-lesions{lesion_share:g}"
            )
            if data is None:
                simulate(source, patients=patients, seed=seed, lesion_share=lesion_share, workers=workers)
            settings = f"{source.resolve()} {seed} {min_brain} {slice_step}"
            name = f"{source.name}-{image_size}px-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
            return prepare(
                source,
                cache / "prepared" / name,
                image_size,
                seed,
                min_brain=min_brain,
                slice_step=slice_step,
                workers=workers,
            )
    except OSError as error:
        raise InputError(f"cannot prepare data under {cache} ({error}): free space or choose another folder") from error
