"""The files of prediction: which are scans, where results go, and writing these.

A result has the source's name, or the case's where that is nnU-Net's `case_0000`. Its header is the
source's but for type and scaling: orientation, affine, units and description stay.
"""

import gzip
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.nnunet import split_name
from data_prep.volumes import Source, is_nifti
from kafjax.errors import UserError
from kafjax.files import replacing
from kafjax.workdir.preparation import Preparation

# Level 1 takes a third of the time of the default and hardly more space.
_DEFLATE_LEVEL = 1
_SUFFIX = re.compile(r"\.nii(\.gz)?$")


@dataclass(frozen=True)
class Job:
    """A scan, and where its labels and, if wanted, its class probabilities go."""

    source: Source
    labels: Path
    probabilities: Path | None = None

    @property
    def done(self) -> bool:
        """Whether all its results are there."""
        return self.labels.exists() and (self.probabilities is None or self.probabilities.exists())


class _Name(NamedTuple):
    volume_id: str  # as preparation names the volume
    result: str  # without suffix


def list_jobs(
    source: Path, target: Path, preparation: Preparation, *, probabilities: bool = False
) -> list[Job]:
    """The scan, or those of a folder in order of name, each with its results' places.

    Files of a folder whose names say that they are no scans of the runs' kind of dataset (labels,
    other channels, cines) are left out.

    Raises:
      ValueError: there is no scan, or a result's place is that of a scan or of another result.
    """
    if source.is_dir():
        found = sorted(path for path in source.iterdir() if is_nifti(path))
        scans = {path: name for path in found if (name := _name(path, preparation))}
        if not scans:
            raise UserError(f"{source}: holds no scan; expected files .nii.gz or .nii")
        if _is_file_name(target) or target.is_file():
            raise UserError(f"output is {target}; expected a folder, as the input is one")
    else:
        scans = {source: _single(source, preparation)}
    jobs = [_job(path, name, target, probabilities=probabilities) for path, name in scans.items()]
    _check_places(jobs)
    return jobs


def write_like(path: Path, array: np.ndarray, like: Any) -> None:
    """Writes a NIfTI file with another's header; the file appears only when it is whole.

    Args:
      path: `.nii` or `.nii.gz`; its folder is made.
      array: [x, y, z] or [x, y, z, d] in the axis order of `like`.
      like: nibabel image, whose type of file, affine and header are taken.
    """
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    image = type(like)(array, like.affine, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        if path.suffix == ".gz":
            # Without name and time, so that the same labels give the same bytes.
            with gzip.GzipFile("", "wb", _DEFLATE_LEVEL, file, mtime=0) as stream:
                image.to_stream(stream)
        else:
            image.to_stream(file)


def _name(path: Path, preparation: Preparation) -> _Name | None:
    """A scan's names; None where its name says that it is none, by the dataset's layout."""
    stem = _SUFFIX.sub("", path.name)
    kind = preparation["kind"]
    if kind == "chd" and (match := re.fullmatch(r"ct_(\d+)_(image|label)", stem)):
        return _Name(f"ct_{int(match[1])}", stem) if match[2] == "image" else None
    if kind == "acdc" and re.fullmatch(r"patient\d+_(4d|frame\d+_gt)", stem):
        return None
    if kind == "nnunet":
        match = re.fullmatch(r"(.+)_(\d{4})", stem, re.DOTALL)
        if match and int(match[2]) != preparation["channel"]:
            return None
        case = match[1] if match else stem
        return _Name(split_name(case), case)
    return _Name(stem, stem)


def _single(path: Path, preparation: Preparation) -> _Name:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not _is_file_name(path):
        raise UserError(f"{path}: is no .nii.gz or .nii file")
    name = _name(path, preparation)
    if name is None:
        raise UserError(
            f"{path}: its name is not that of a scan in the {preparation['kind']} layout; "
            "rename it if it is one"
        )
    return name


def _job(path: Path, name: _Name, target: Path, *, probabilities: bool) -> Job:
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    labels = target if _is_file_name(target) else target / f"{name.result}{suffix}"
    beside = _SUFFIX.sub(r"_probabilities.nii\1", labels.name)
    return Job(
        Source(name.volume_id, path), labels, labels.with_name(beside) if probabilities else None
    )


def _is_file_name(path: Path) -> bool:
    return is_nifti(path) and not path.is_dir()


def _check_places(jobs: list[Job]) -> None:
    scans = {job.source.image.resolve() for job in jobs}
    places = [place.resolve() for job in jobs for place in (job.labels, job.probabilities) if place]
    wrong = [f"  {place}: is one of the scans" for place in places if place in scans]
    wrong += [
        f"  {place}: is the place of {count} results"
        for place, count in Counter(places).items()
        if count > 1
    ]
    if wrong:
        raise UserError("results would lie on each other or on scans:\n" + "\n".join(wrong))
