"""Tiny raw datasets in the layouts that the readers know, made of phantom hearts."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.phantom.subjects import render

# Phantom classes to ACDC's: right ventricle 1, myocardium 2, left ventricle 3.
_TO_ACDC = np.array([0, 3, 1, 0, 0, 2, 0, 0], np.uint8)
SPACING = (1.5, 1.7, 10.0)  # mm, in the file's order: columns, rows, slices


def save(path: Path, array: np.ndarray, spacing: tuple[float, float, float] = SPACING) -> Path:
    """Writes [x, y, z] or [x, y, z, t], x to the left and y to the back."""
    x, y, z = spacing
    nib.save(nib.Nifti1Image(array, np.diag([-x, -y, z, 1.0])), path)
    return path


def heart(number: int, size: tuple[int, int, int] = (40, 36, 6)) -> tuple[np.ndarray, np.ndarray]:
    """An image, int16, and its classes as in CHD, uint8, [x, y, z]."""
    return render(size, number=number)


def write_acdc(
    folder: Path,
    num_patients: int = 2,
    *,
    first: int = 1,
    frames: tuple[int, int] = (1, 4),
    num_frames: int = 5,
    labelled: bool = True,
    size: tuple[int, int, int] = (40, 36, 6),
) -> Path:
    """Writes `patient001`, ...: a heart whose brightness changes from frame to frame."""
    for number in range(first, first + num_patients):
        name = f"patient{number:03d}"
        (folder / name).mkdir(parents=True)
        info = (
            f"ED: {frames[0]}\nES: {frames[1]}\nGroup: NOR\nHeight: 170.0\nNbFrame: {num_frames}\n"
        )
        (folder / name / "Info.cfg").write_text(info)
        image, label = heart(number, size)
        cine = np.stack([np.where(image > 0, image + 3 * t, image) for t in range(num_frames)], -1)
        cine = cine.astype(np.int16)
        save(folder / name / f"{name}_4d.nii.gz", cine)
        for frame in frames:
            stem = f"{name}_frame{frame:02d}"
            save(folder / name / f"{stem}.nii.gz", cine[..., frame - 1])
            if labelled:
                save(folder / name / f"{stem}_gt.nii.gz", _TO_ACDC[label])
    return folder


def write_nnunet(
    folder: Path,
    *,
    labelled: tuple[str, ...] = ("case_001", "case_002"),
    unlabelled: tuple[str, ...] = (),
    test: tuple[str, ...] = (),
    channels: tuple[str, ...] = ("CT",),
    ending: str = ".nii.gz",
    size: tuple[int, int, int] = (40, 36, 6),
    **changes: Any,
) -> Path:
    """Writes `dataset.json` (with `changes`), `imagesTr`, `labelsTr` and `imagesTs`."""
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "ventricles": 1, "myocardium": 2},
        "numTraining": len(labelled) + len(unlabelled),
        "file_ending": ending,
        **changes,
    }
    for part in ("imagesTr", "labelsTr", *(["imagesTs"] if test else [])):
        (folder / part).mkdir(parents=True, exist_ok=True)
    described = {key: value for key, value in description.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(described))
    for number, case in enumerate((*labelled, *unlabelled, *test)):
        image, label = heart(number, size)
        part = "imagesTs" if case in test else "imagesTr"
        for channel in range(len(channels)):
            save(folder / part / f"{case}_{channel:04d}{ending}", image + np.int16(7 * channel))
        if case in labelled:
            classes = np.array([0, 1, 1, 0, 0, 2, 0, 0], np.uint8)[label]
            save(folder / "labelsTr" / f"{case}{ending}", classes)
    return folder
