"""Damaged NRRD, MetaImage and DICOM scans, in preparation.

Each damaged scan lies next to sound labels of its grid. DICOM has no checksum, and so nobody can
notice a flipped bit in plain values of its pixels, or a slice that is missing at an end: flips and
blanks are made before them, and slices taken out between others. The values of NRRD and MetaImage
are compressed, as 3D Slicer and ITK write them by default.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_prep.faults import DatasetError
from data_prep.formats import read_scan
from data_prep.main import main as prepare
from data_prep.scan import Scan
from tests.campaigns.campaign import Settings, Tally
from tests.campaigns.damage import DAMAGES
from tests.campaigns.tiny import call_command
from tests.scan_formats import phantom, write_dicom, write_itk, write_nifti

USUAL = 100
_SIZE = (16, 14, 6)
# Numbers that a flipped bit changes by more than labels may be apart.
_AFFINE = np.array([[-1.5, 0, 0, 12], [0, -2.5, 0, -7], [0, 0, 4, 30], [0, 0, 0, 1]], float)
_KINDS = ("flip", "flip", "flip", "flip", "flip", "flip", *sorted(DAMAGES))
_OF_SERIES = (*_KINDS, "missing", "missing", "doubled", "foreign")
_PIXELS = b"\xe0\x7f\x10\x00OW"  # the element of the values


def run_nrrd(settings: Settings) -> Iterator[Tally]:
    """All damaged `.nrrd` of a folder are named in one pass, and no sound one."""
    yield _try_files(settings, ".nrrd")


def run_metaimage(settings: Settings) -> Iterator[Tally]:
    """All damaged `.mha` of a folder are named in one pass, and no sound one."""
    yield _try_files(settings, ".mha")


def run_dicom(settings: Settings) -> Iterator[Tally]:
    """All damaged series of a folder are named in one pass, and no sound one."""
    rng = settings.generator("dicom")

    def make(path: Path, i: int) -> Path:
        image, _ = phantom(_SIZE)
        folder = write_dicom(path, image, _AFFINE)
        for file in sorted(folder.iterdir()):  # names of their own: equal findings share a line
            file.rename(folder / f"{path.name}_{file.name}")
        if i >= 0:
            _damage_series(folder, _OF_SERIES[i % len(_OF_SERIES)], rng)
        return folder

    yield _try(settings, "damaged DICOM series in preparation", "dicom", make)


def _try_files(settings: Settings, ending: str) -> Tally:
    rng = settings.generator(ending)

    def make(path: Path, i: int) -> Path:
        path = write_itk(path.with_name(path.name + ending), phantom(_SIZE)[0], _AFFINE)
        if i >= 0:
            path.write_bytes(DAMAGES[_KINDS[i % len(_KINDS)]](path.read_bytes(), rng))
        return path

    return _try(settings, f"damaged {ending} in preparation", ending[1:], make)


def _try(settings: Settings, fault: str, name: str, make: Callable[[Path, int], Path]) -> Tally:
    """Makes scans, damaged if they have a number, and judges what a check says of them."""
    scans, labels = (settings.folder(f"{name}/{part}") for part in ("scans", "labels"))
    sound = make(scans / "sound", -1)
    original = read_scan(sound)
    write_nifti(labels / "sound.nii", phantom(_SIZE)[1], _AFFINE)
    damaged = []
    for i in range(settings.tries(USUAL)):
        damaged.append(make(scans / f"scan{i}", i))
        shutil.copyfile(labels / "sound.nii", labels / f"scan{i}.nii")
    status, errors = call_command(
        *(prepare, "--dataset", "folder", "--raw_dir", scans, "--labels", labels),
        *("--check", "--num_workers", 0),
    )
    tally = Tally(fault)
    for path in damaged:
        tally.add(*_judge(path, original, _said(errors, path)))
    if status != 2:
        tally.add("unclear", f"exit status {status}: {errors[-300:]}")
    if lines := _said(errors, sound):
        tally.add("unclear", f"a sound scan is refused: {lines}")
    return tally


def _damage_series(folder: Path, kind: str, rng: np.random.Generator) -> None:
    files = sorted(folder.iterdir())
    chosen = files[int(rng.integers(len(files)))]
    content = chosen.read_bytes()
    if kind == "missing":
        files[int(rng.integers(1, len(files) - 1))].unlink()
    elif kind == "doubled":
        shutil.copyfile(chosen, folder / f"{folder.name}_copy.dcm")
    elif kind == "foreign":
        other = write_dicom(folder / "other", phantom(_SIZE)[0] + 1, _AFFINE)
        slices = sorted(other.iterdir())
        shutil.copyfile(slices[files.index(chosen)], chosen)
        shutil.rmtree(other)
    elif kind in ("flip", "blank"):
        end = content.rindex(_PIXELS)
        chosen.write_bytes(DAMAGES[kind](content[:end], rng) + content[end:])
    else:
        chosen.write_bytes(DAMAGES[kind](content, rng))


def _judge(path: Path, original: Scan, lines: list[str]) -> tuple[str, str]:
    """How a damaged scan was taken: what was said of it, or else what is read of it."""
    if lines:
        return "caught", ""
    try:
        found = read_scan(path)
    except DatasetError as error:
        return "unclear", f"{path.name} is not named: {error}"
    same = all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in ((found.array, original.array), (found.affine, original.affine))
    )
    return ("harmless", "") if same else ("silent", path.name)


def _said(errors: str, path: Path) -> list[str]:
    """The lines that name a scan, one of its slices, or its labels, except for equal images.

    A header with another grid is only noticed by its labels; the line names both.
    """
    label = path.parents[1] / "labels" / f"{path.name.split('.')[0]}.nii"
    places = (f"{path}:", f"{path}/", f"{label}:")
    lines = [line for line in errors.splitlines() if any(place in line for place in places)]
    return [line for line in lines if "has the same values as" not in line]
