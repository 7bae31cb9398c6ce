"""Bad datasets: twenty kinds of faults among sound volumes, and a hundred sound ones of all sorts.

Volumes are in nnU-Net's layout, one channel, [x, y, z] as in NIfTI.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.main import main as prepare
from tests.campaigns import tiny
from tests.campaigns.campaign import Settings, Tally

USUAL_CLEAN = 100
_SHAPE = (24, 20, 5)
_NUM_CLASSES = 3
_AFFINE = np.diag([-1.5, -1.5, 4.0, 1.0])

Case = dict[str, Any]  # image, label, affine, label_affine; None: the file is missing


def make_case(rng: np.random.Generator, shape: tuple[int, ...] = _SHAPE) -> Case:
    """A sound volume of noise with its labels."""
    return {
        "image": rng.integers(-1000, 2000, shape).astype(np.int16),
        "label": rng.integers(0, _NUM_CLASSES, shape).astype(np.uint8),
        "affine": _AFFINE,
        "label_affine": _AFFINE,
    }


def _with_value(case: Case, value: float) -> Case:
    image = case["image"].astype(np.float32)
    image[3, 4, 1] = value
    return {**case, "image": image}


def _moved(case: Case, change: np.ndarray) -> Case:
    return {**case, "label_affine": _AFFINE @ change}


def _nearly_constant(case: Case) -> Case:
    image = np.full_like(case["image"], 7)
    image[:2, :2, 0] = 1000
    return {**case, "image": image}


def _rgb(case: Case) -> Case:
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    return {**case, "image": np.zeros(case["image"].shape, kind)}


def _shear(amount: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 3] = amount
    return matrix


# A sound case to one with this fault. The fault's line names `case_NAME` and a remedy.
FAULTS: dict[str, Callable[[Case], Case]] = {
    "nan": lambda c: _with_value(c, np.nan),
    "infinite": lambda c: _with_value(c, -np.inf),
    "constant": lambda c: {**c, "image": np.full_like(c["image"], 3)},
    "constant_but_for_few": _nearly_constant,
    "label_shape": lambda c: {**c, "label": c["label"][:, :, :-1]},
    "label_spacing": lambda c: _moved(c, np.diag([1.1, 1, 1, 1])),
    "label_shifted": lambda c: _moved(c, _shear(1.0)),
    "label_mirrored": lambda c: _moved(c, np.diag([-1, 1, 1, 1])),
    "affine_singular": lambda c: {**c, "affine": np.diag([0, 1.0, 1, 1])},
    "affine_nan": lambda c: {**c, "affine": np.full((4, 4), np.nan)},
    "label_fraction": lambda c: {**c, "label": c["label"].astype(np.float32) * 0.5},
    "label_negative": lambda c: {**c, "label": c["label"].astype(np.int16) - 1},
    "label_range": lambda c: {**c, "label": c["label"] + np.uint8(1)},
    "label_nan": lambda c: {**c, "label": np.where(c["label"] == 2, np.nan, c["label"])},
    "image_missing": lambda c: {**c, "image": None},
    "image_2d": lambda c: {**c, "image": c["image"][:, :, 0]},
    "image_4d": lambda c: {**c, "image": np.stack([c["image"]] * 2, -1)},
    "image_complex": lambda c: {**c, "image": c["image"].astype(np.complex64)},
    "image_rgb": _rgb,
    "image_no_slice": lambda c: {**c, "image": c["image"][:, :, :0]},
    "image_other_ending": lambda c: {**c, "ending": ".nii"},
    "image_other_channel": lambda c: {**c, "channel": 1},
    "duplicate": lambda c: {**c, "twice": True},
}


def run(settings: Settings) -> Iterator[Tally]:
    """Each fault is reported in one pass, with a remedy; sound volumes are not accused."""
    rng = settings.generator("datasets")
    yield _all_faults(settings.folder("datasets/faulty"), rng)
    yield _clean(settings.folder("datasets/clean"), rng, settings.tries(USUAL_CLEAN))


def _all_faults(folder: Path, rng: np.random.Generator) -> Tally:
    _describe(folder)
    for i in range(4):
        _write(folder, f"sound_{i}", make_case(rng))
    for name, spoil in FAULTS.items():
        _write(folder, f"case_{name}", spoil(make_case(rng)))
    lines = _check(folder)
    tally = Tally(f"{len(FAULTS)} kinds of bad volumes, in one pass")
    for name in FAULTS:
        about = [line for line in lines if f"case_{name}_0" in line or f"case_{name}." in line]
        told = any("; " in line for line in about)
        tally.expect(told, f"{name}: {about or 'nothing was said'}", otherwise="silent")
    if accused := [line for line in lines if "sound_" in line]:
        tally.add("unclear", f"sound volumes are accused: {accused}")
    return tally


def _clean(folder: Path, rng: np.random.Generator, count: int) -> Tally:
    """All sorts of sound volumes: each is a try, and caught means that nothing is said of it."""
    _describe(folder)
    for i in range(count):
        _write(folder, f"sound_{i}", _any_sort(rng, i))
    lines = [line for line in _check(folder) if not line.startswith("note:")]  # of planes
    tally = Tally("sound volumes of all sorts: no false alarm")
    for i in range(count):
        accused = [line for line in lines if f"sound_{i}." in line or f"sound_{i}_" in line]
        tally.expect(not accused, f"sound_{i}: {accused}")
    if lines and not tally.wrong:
        tally.add("unclear", f"{lines}")
    return tally


def _any_sort(rng: np.random.Generator, i: int) -> Case:
    """A case of any type, shape, spacing and orientation, with labels or without."""
    types: list[Any] = [np.int16, np.uint8, np.uint16, np.int32, np.float32, np.float64, np.int8]
    shape = tuple(int(n) for n in rng.integers((8, 8, 1), (40, 40, 12)))
    case = make_case(rng, shape)
    case["image"] = rng.integers(0, 120, shape).astype(types[i % len(types)])
    axes = rng.permutation(3)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[axes] * (rng.uniform(0.4, 6, 3) * rng.choice([-1, 1], 3))
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    case |= {"affine": affine, "label_affine": affine}
    if i % 4 == 0:
        case["label"] = None
    if i % 5 == 0 and case["label"] is not None:
        case["label"] = case["label"].astype(np.float32)
    return case


def _describe(folder: Path) -> None:
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "one": 1, "two": 2},
        "file_ending": ".nii.gz",
    }
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir()
    (folder / "dataset.json").write_text(json.dumps(description))


def _write(folder: Path, name: str, case: Case) -> None:
    ending, channel = case.get("ending", ".nii.gz"), case.get("channel", 0)
    for number in range(2 if case.get("twice") else 1):
        stem = name + "_b" * number
        if case["image"] is not None:
            image = folder / "imagesTr" / f"{stem}_{channel:04d}{ending}"
            _save(image, case["image"], case["affine"])
        if case["label"] is not None:
            _save(folder / "labelsTr" / f"{stem}.nii.gz", case["label"], case["label_affine"])


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Writes any affine, also one that nibabel refuses to write."""
    image = nib.Nifti1Image(array, None)
    image.header["sform_code"] = 1
    for row, values in zip(("srow_x", "srow_y", "srow_z"), affine, strict=False):
        image.header[row] = values
    nib.save(image, path)


def _check(folder: Path) -> list[str]:
    arguments = ("--dataset", "nnunet", "--raw_dir", folder, "--check", "--num_workers", 0)
    _, errors = tiny.call_command(prepare, *arguments)
    return errors.splitlines()
