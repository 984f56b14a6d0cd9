"""Masks and maps as NIfTI volumes in the space of the patient's own files, so that any viewer lays them over these."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .data import read_volume
from .results import Method, Slices


def write_volumes(folder: Path, slices: Slices, method: Method, source: Path) -> list[Path]:
    """Write `PATIENT_mask.nii.gz` (0 or 1) and `PATIENT_map.nii.gz` for each patient of a split.

    Slices are resized from the model's pixels to the volume's (maps bilinearly, masks to the nearest) and turned back;
    slices that the model has not seen are zero. Shape, affine and units are those of the patient's FLAIR file in
    `source`.
    """
    import nibabel

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, name in enumerate(slices.patients):
        rows = np.flatnonzero(slices.patient == number)
        voxels, header = read_volume(_reference(source, name))
        shape, at = voxels.shape, slices.slices[rows]
        for kind, planes, mode, dtype in (
            ("mask", method.masks, "nearest-exact", np.uint8),
            ("map", method.maps, "bilinear", np.float32),
        ):
            values = _back(planes[rows], at, shape, mode)
            own = header.copy()
            own.set_data_dtype(dtype)
            own["scl_slope"], own["scl_inter"], own["cal_max"], own["cal_min"] = 1, 0, 0, 0
            image = nibabel.Nifti1Image(values.astype(dtype), None, own)
            target = folder / f"{name}_{kind}.nii.gz"
            partial = target.with_name(f".partial-{target.name}.{os.getpid()}")
            partial.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))
            partial.replace(target)
            written.append(target)
    return written


def _reference(source: Path, name: str) -> Path:
    return source / name / f"{name}_flair.nii.gz"


def _back(planes: NDArray[Any], at: NDArray[np.int64], shape: tuple[int, ...], mode: str) -> NDArray[np.float32]:
    """Planes [N, H, W], rows along Y, as a volume [X, Y, Z] with zeros where there is none."""
    stack = torch.from_numpy(planes.astype(np.float32))[:, None]
    resized = torch.nn.functional.interpolate(stack, (shape[1], shape[0]), mode=mode)
    volume = np.zeros(shape, np.float32)
    volume[:, :, at] = resized[:, 0].numpy().transpose(2, 1, 0)
    return volume
