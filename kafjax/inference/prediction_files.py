"""The files of prediction: finding scans, naming results, and writing them.

A result has the source's name, or the case's for nnU-Net's `case_0000`. Its header is the source's
except type and scaling: orientation, affine, units and description are kept.
"""

import gzip
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.entries import (
    OTHER_IMAGES,
    SCAN_ENDINGS,
    is_scan_name,
    list_entries,
    scan_problem,
    unused_folder,
)
from data_prep.faults import DatasetError, Fault
from data_prep.folder import split_name
from data_prep.nifti import open_header, read_nifti
from data_prep.volumes import Source
from kafjax.errors import UserError
from kafjax.files import replacing
from kafjax.inference.uncertainty import FILE
from kafjax.workdir.preparation import Preparation

# Level 1 takes a third of the time of the default and hardly more space.
_DEFLATE_LEVEL = 1
_SUFFIX = re.compile(r"\.nii(\.gz)?$")
# Endings that no folder has.
_FILE_ENDINGS = (
    *(*SCAN_ENDINGS, *OTHER_IMAGES, ".gz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".png", ".jpg"),
    *(".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".vtk"),
    *(".vti", ".stl", ".obj", ".ply", ".pt", ".pth", ".json", ".txt", ".csv", ".xml", ".pdf"),
)
_CHD = re.compile(r"ct_(\d+)_(image|label)")
_ACDC_OTHERS = re.compile(r"patient\d+_(4d|frame\d+_gt)")
_CHANNEL = re.compile(r"(.+)_(\d{4})", re.DOTALL)
_DESCRIPTIONS = {"acdc": ("Info.cfg",), "nnunet": ("dataset.json",), "chd": ("phantom.json",)}
# What results next to labels end in, before the suffix.
MAPS = ("probabilities", "uncertainty")
_LONGEST_NAME = 230  # in bytes, of the system's 255: a file being written has a longer name


@dataclass(frozen=True)
class Request:
    """A scan, and the paths of its labels and, if requested, probabilities and uncertainty."""

    source: Source
    labels: Path
    probabilities: Path | None = None
    uncertainty: Path | None = None

    @property
    def done(self) -> bool:
        """Whether all its results exist."""
        return all(place.exists() for place in self.places)

    @property
    def places(self) -> tuple[Path, ...]:
        """The paths of its results."""
        places = (self.labels, self.probabilities, self.uncertainty)
        return tuple(place for place in places if place is not None)


class Listing(NamedTuple):
    """The requests of a prediction, and the skipped entries with the reason."""

    requests: list[Request]
    left_out: list[Fault]


class _Name(NamedTuple):
    volume_id: str  # as preparation names the volume
    result: str  # without suffix


def list_requests(
    source: Path,
    target: Path,
    preparation: Preparation,
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
) -> Listing:
    """The scan, or those of a folder sorted by name, with the paths of their results.

    Each entry of a folder is a scan, belongs to one (labels, other channels and cines by their
    names; results of an earlier prediction into the same folder), or is skipped with a reason.

    Raises:
      ValueError: nothing to predict, or an impossible output.
    """
    _check_target(target, folder_given=source.is_dir())
    faults: list[Fault] = []
    if not source.is_dir():
        paths = [source]
        if not os.path.lexists(source):
            raise UserError(f"{source}: no such file or folder")
        if not is_scan_name(source.name):
            raise UserError(f"{source}: not a .nii.gz or .nii file")
        if problem := scan_problem(source):
            raise DatasetError([problem])
    else:
        paths, faults = _list_folder(source, target, preparation)
        if not paths and not faults:
            raise UserError(f"{source}: holds no scan; expected .nii.gz or .nii files")
    requests = []
    for path in paths:
        if name := _name(path, preparation):
            requests.append(
                _request(path, name, target, probabilities=probabilities, uncertainty=uncertainty)
            )
        elif not _belongs_to_one_of(path, paths, preparation):
            faults.append(_no_scan(path, preparation))
    requests = _without_results(requests, preparation)
    wrong = _wrong_places(requests)
    faults += wrong.values()
    return Listing([request for request in requests if request not in wrong], faults)


def write_like(path: Path, array: np.ndarray, like: Any) -> None:
    """Writes a NIfTI file atomically, with another file's header.

    Args:
      path: `.nii` or `.nii.gz`; its folder is created.
      array: [x, y, z] or [x, y, z, d] in the axis order of `like`.
      like: nibabel image that provides file type, affine and header.
    """
    header = like.header.copy()
    header.set_data_dtype(array.dtype)
    image = type(like)(array, like.affine, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        if path.suffix == ".gz":
            # No name and time, so that the same labels give the same bytes.
            with gzip.GzipFile("", "wb", _DEFLATE_LEVEL, file, mtime=0) as stream:
                image.to_stream(stream)
        else:
            image.to_stream(file)


def _check_target(target: Path, *, folder_given: bool) -> None:
    if target.is_dir():
        return
    if folder_given and (is_scan_name(target.name) or target.exists()):
        raise UserError(f"output is {target}; expected a folder, as the input is one")
    if target.name.endswith(SCAN_ENDINGS):
        return
    if target.name.lower().endswith(_FILE_ENDINGS):
        raise UserError(
            f"output is {target}, a file's name; expected one that ends in "
            f"{' or '.join(SCAN_ENDINGS)}, or a folder: make it first if that is its name"
        )
    if target.exists():
        raise UserError(f"output is {target}, a file; expected {' or '.join(SCAN_ENDINGS)}")


def _list_folder(
    source: Path, target: Path, preparation: Preparation
) -> tuple[list[Path], list[Fault]]:
    """Readable entries named as scans, and the faults of all others."""
    described = (*_DESCRIPTIONS.get(preparation["kind"], ()), FILE)
    entries = list_entries(source, used=[n for n in described if (source / n).is_file()])
    faults = list(entries.faults)
    results = target.resolve()
    for folder in entries.folders:
        if not results.is_relative_to(folder.resolve()):
            faults.append(unused_folder(folder, "scans, .nii.gz or .nii"))
    return [path for path in entries.scans if path not in entries.broken], faults


def _name(path: Path, preparation: Preparation) -> _Name | None:
    """A scan's names; None if it is not a scan by the dataset's naming rules."""
    stem = _SUFFIX.sub("", path.name)
    kind = preparation["kind"]
    if kind == "chd" and (match := _CHD.fullmatch(stem)):
        return _Name(f"ct_{int(match[1])}", stem) if match[2] == "image" else None
    if kind == "acdc" and _ACDC_OTHERS.fullmatch(stem):
        return None
    if kind == "nnunet":
        match = _CHANNEL.fullmatch(stem)
        if match and int(match[2]) != preparation["channel"]:
            return None
        case = match[1] if match else stem
        return _Name(split_name(case), case)
    return _Name(stem, stem)


def _belongs_to_one_of(path: Path, paths: Iterable[Path], preparation: Preparation) -> bool:
    """Whether a non-scan is the labels, cine or another channel of an existing scan."""
    stem, kind = _SUFFIX.sub("", path.name), preparation["kind"]
    if kind == "chd":
        scan = stem.replace("label", "image")
    elif kind == "acdc":
        scan = rf"{stem[:-3]}_frame\d+" if stem.endswith("_4d") else stem.removesuffix("_gt")
    else:
        scan = re.escape(f"{stem[:-4]}{preparation['channel']:04d}")
    return any(re.fullmatch(scan, _SUFFIX.sub("", other.name)) for other in paths)


def _no_scan(path: Path, preparation: Preparation) -> Fault:
    stem = _SUFFIX.sub("", path.name)
    if preparation["kind"] == "nnunet":
        channel = preparation["channel"]
        right = f"{stem}_{channel:04d}{path.name.removeprefix(stem)}"
        found = f"belongs to channel {int(stem[-4:])} by its name, the runs use channel {channel}"
        return Fault(path, found, f"rename it to {right} if the number is the scan's own")
    found = f"its name is not a scan's in the {preparation['kind']} layout"
    return Fault(path, found, "rename it if it is one")


def _request(
    path: Path, name: _Name, target: Path, *, probabilities: bool, uncertainty: bool
) -> Request:
    labels = target
    if target.is_dir() or not target.name.endswith(SCAN_ENDINGS):
        suffix = path.name.removeprefix(_SUFFIX.sub("", path.name))
        labels = target / f"{name.result}{suffix}"
    return Request(
        Source(name.volume_id, path),
        labels,
        _beside(labels, "probabilities") if probabilities else None,
        _beside(labels, "uncertainty") if uncertainty else None,
    )


def _beside(labels: Path, what: str) -> Path:
    return labels.with_name(_SUFFIX.sub(rf"_{what}.nii\1", labels.name))


def _without_results(requests: list[Request], preparation: Preparation) -> list[Request]:
    """The requests, except those whose scan is an earlier result on another scan's grid."""
    values = preparation.get("label_values") or range(len(preparation.get("classes", ())))
    maker = {
        place.resolve(): request
        for request in requests
        for place in (request.labels, *(_beside(request.labels, what) for what in MAPS))
        if place.resolve() != request.source.image.resolve()
    }
    return [
        request
        for request in requests
        if (made := maker.get(request.source.image.resolve())) is None
        or not _is_result(request.source.image, made.source.image, values)
    ]


def _is_result(path: Path, scan: Path, values: Sequence[int]) -> bool:
    """Whether a file holds labels, probabilities or uncertainty on a scan's grid."""
    try:
        found, header = open_header(path), open_header(scan)
        if found.shape[:3] != header.shape or not np.allclose(found.affine, header.affine):
            return False
        kind = found.get_data_dtype().newbyteorder("=")
        if kind == np.float32:
            return found.shape[3:] in ((), (len(values),))
        return kind.kind == "u" and bool(np.isin(read_nifti(path).array, values).all())
    except DatasetError:
        return False


def _wrong_places(requests: list[Request]) -> dict[Request, Fault]:
    """The requests whose results would overwrite scans or each other, or cannot be written."""
    scans = {request.source.image.resolve() for request in requests}
    counts = Counter(place.resolve() for request in requests for place in request.places)
    wrong = {}
    for request in requests:
        for place in request.places:
            found = None
            if place.resolve() in scans:
                found = f"its result, {place}, would overwrite a scan"
            elif counts[place.resolve()] > 1:
                found = f"its result, {place}, is also another scan's"
            elif place.is_dir():
                found = f"its result, {place}, is a folder"
            elif len(os.fsencode(place.name)) > _LONGEST_NAME:
                found = f"its result's name, {place.name}, is too long"
            if found:
                wrong[request] = Fault(
                    request.source.image, found, "choose another output, or rename it"
                )
    return wrong
