"""The files of prediction: finding scans, naming results, and writing them.

A result has the source's name, or the case's for nnU-Net's `case_0000`, and by default the source's
format: `kafjax.inference.label_files` writes it on the source's grid.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.dicom import holds_dicom, is_dicom
from data_prep.entries import (
    OTHER_IMAGES,
    SCAN_ENDINGS,
    SCANS,
    file_stem,
    is_scan_name,
    list_entries,
    scan_problem,
    unused_folder,
)
from data_prep.faults import DatasetError, Fault
from data_prep.folder import split_name
from data_prep.formats import is_series, open_grid, read_labels
from data_prep.readers import channels_of
from data_prep.segmentations import is_segmentation
from data_prep.volumes import Source
from kafjax.errors import UserError
from kafjax.inference.label_files import OUTPUT_ENDINGS
from kafjax.inference.uncertainty import FILE
from kafjax.regions import regions_of
from kafjax.workdir.preparation import Preparation

# The format of a result, where it is not the scan's own; a series has none.
_RESULT_ENDINGS = {"": ".dcm", ".dcm": ".dcm", ".nhdr": ".nrrd", ".mhd": ".mha"}
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


class _Entry(NamedTuple):
    path: Path
    stem: str  # its name without ending

    @property
    def ending(self) -> str:
        """The ending of a file's name; a series has none."""
        return self.path.name.removeprefix(self.stem) if is_scan_name(self.path.name) else ""


class _Name(NamedTuple):
    volume_id: str  # as preparation names the volume
    result: str  # without ending


def list_requests(
    source: Path,
    target: Path,
    preparation: Preparation,
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
    ending: str | None = None,
) -> Listing:
    """The scan, or those of a folder sorted by name, with the paths of their results.

    Each entry of a folder is a scan, belongs to one (labels, other channels and cines by their
    names; results of an earlier prediction into the same folder), or is skipped with a reason. A
    folder with DICOM images is one scan; so is one with such folders, if the target is a file.

    Args:
      source: a scan or a folder of scans.
      target: a file for one scan, or a folder.
      preparation: of the runs' dataset.
      probabilities: whether they are requested too.
      ending: of the results in a folder; by default of the scan's format.

    Raises:
      ValueError: nothing to predict, or an impossible output.
    """
    if not os.path.lexists(source):
        raise UserError(f"{source}: no such file or folder")
    one = not source.is_dir() or _is_one_series(source, target)
    _check_target(target, ending, folder_given=not one)
    faults: list[Fault] = []
    if one:
        entries = [_only_entry(source)]
    else:
        entries, faults = _list_folder(source, target, preparation)
        if not entries and not faults:
            raise UserError(f"{source}: holds no scan; expected {SCANS}")
    requests = []
    maps = {"probabilities": probabilities, "uncertainty": uncertainty}
    for entry in entries:
        if name := _name(entry, preparation):
            further, missing = _further(entry, preparation)
            faults += missing
            if not missing:
                requests.append(_request(entry, name, target, ending, maps, further))
        elif not _belongs_to_one_of(entry, entries, preparation):
            faults.append(_no_scan(entry, preparation))
    requests = _without_results(requests, preparation)
    wrong = _wrong_places(requests)
    faults += wrong.values()
    return Listing([request for request in requests if request not in wrong], faults)


def _is_one_series(folder: Path, target: Path) -> bool:
    """Whether a folder is a scan: of DICOM images, or of folders of such for a target of a file."""
    try:
        files = [path for path in folder.iterdir() if path.is_file()]
    except OSError:
        return False
    if any(is_dicom(path) and not is_segmentation(path) for path in files):
        return True
    return (
        target.name.endswith(OUTPUT_ENDINGS)
        and not any(is_scan_name(path.name) for path in files)
        and holds_dicom(folder)
    )


def _only_entry(source: Path) -> _Entry:
    if source.is_dir() or (is_dicom(source) and not is_segmentation(source)):
        return _Entry(source, source.name if source.is_dir() else file_stem(source))
    if not is_scan_name(source.name):
        raise UserError(f"{source}: is not a scan; expected {SCANS}")
    if problem := scan_problem(source):
        raise DatasetError([problem])
    return _Entry(source, file_stem(source))


def _check_target(target: Path, ending: str | None, *, folder_given: bool) -> None:
    endings = f"{', '.join(OUTPUT_ENDINGS[:-1])} or {OUTPUT_ENDINGS[-1]}"
    if ending not in (None, *OUTPUT_ENDINGS):
        raise UserError(f"format is {ending!r}; expected {endings}")
    if target.is_dir():
        return
    if folder_given and (is_scan_name(target.name) or target.exists()):
        raise UserError(f"output is {target}; expected a folder, as the input is one")
    if target.name.endswith(OUTPUT_ENDINGS):
        if ending is not None and not target.name.endswith(ending):
            raise UserError(f"output is {target}, but format is {ending}; leave one of them out")
        return
    if target.name.lower().endswith(_FILE_ENDINGS):
        raise UserError(
            f"output is {target}, a file's name; expected one that ends in {endings}, or a "
            "folder: make it first if that is its name"
        )
    if target.exists():
        raise UserError(f"output is {target}, a file; expected {endings}")


def _list_folder(
    source: Path, target: Path, preparation: Preparation
) -> tuple[list[_Entry], list[Fault]]:
    """Readable scans, and the faults of all other entries."""
    described = (*_DESCRIPTIONS.get(preparation["kind"], ()), FILE)
    entries = list_entries(
        source, used=[n for n in described if (source / n).is_file()], dicom=True
    )
    faults = list(entries.faults)
    results = target.resolve()
    for folder in entries.folders:
        if not results.is_relative_to(folder.resolve()):
            faults.append(unused_folder(folder, SCANS))
    sound = [path for path in entries.scans if path not in entries.broken]
    return [_Entry(path, entries.stem(path)) for path in sound], faults


def _name(entry: _Entry, preparation: Preparation) -> _Name | None:
    """A scan's names; None if it is not a scan by the dataset's naming rules."""
    stem, kind = entry.stem, preparation["kind"]
    if kind == "chd" and (match := _CHD.fullmatch(stem)):
        return _Name(f"ct_{int(match[1])}", stem) if match[2] == "image" else None
    if kind == "acdc" and _ACDC_OTHERS.fullmatch(stem):
        return None
    if kind == "nnunet":
        match = _CHANNEL.fullmatch(stem)
        if match and int(match[2]) != channels_of(preparation)[0]:
            return None
        case = match[1] if match else stem
        return _Name(split_name(case), case)
    return _Name(stem, stem)


def _belongs_to_one_of(entry: _Entry, entries: Iterable[_Entry], preparation: Preparation) -> bool:
    """Whether a non-scan is the labels, cine or another channel of an existing scan."""
    stem, kind = entry.stem, preparation["kind"]
    if kind == "chd":
        scan = stem.replace("label", "image")
    elif kind == "acdc":
        scan = rf"{stem[:-3]}_frame\d+" if stem.endswith("_4d") else stem.removesuffix("_gt")
    else:
        scan = re.escape(f"{stem[:-4]}{channels_of(preparation)[0]:04d}")
    return any(re.fullmatch(scan, other.stem) for other in entries)


def _no_scan(entry: _Entry, preparation: Preparation) -> Fault:
    path, stem = entry.path, entry.stem
    if preparation["kind"] == "nnunet":
        channels = channels_of(preparation)
        if int(stem[-4:]) in channels:
            right = f"{stem[:-4]}{channels[0]:04d}{entry.ending}"
            return Fault(path, f"has no channel {channels[0]} next to it", f"add {right}")
        right = f"{stem}_{channels[0]:04d}{entry.ending}"
        used = f"{'channels' if channels[1:] else 'channel'} {' and '.join(map(str, channels))}"
        found = f"belongs to channel {int(stem[-4:])} by its name, the runs use {used}"
        return Fault(path, found, f"rename it to {right} if the number is the scan's own")
    found = f"its name is not a scan's in the {preparation['kind']} layout"
    return Fault(path, found, "rename it if it is one")


def _further(entry: _Entry, preparation: Preparation) -> tuple[tuple[Path, ...], list[Fault]]:
    """The files of a scan's other channels, and faults of those that are not there."""
    channels = channels_of(preparation)
    if len(channels) == 1:
        return (), []
    case = match[1] if (match := _CHANNEL.fullmatch(entry.stem)) else entry.stem
    files = [entry.path.with_name(f"{case}_{n:04d}{entry.ending}") for n in channels]
    if not match:
        found = f"has no channel in its name, and the runs see {len(channels)}"
        remedy = f"expected {' and '.join(path.name for path in files)}"
        return (), [Fault(entry.path, found, remedy)]
    missing = [
        Fault(entry.path, f"has no channel {n} next to it", f"add {path.name}")
        for n, path in zip(channels, files, strict=True)
        if not path.exists()
    ]
    return tuple(files[1:]), missing


def _request(
    entry: _Entry,
    name: _Name,
    target: Path,
    ending: str | None,
    maps: Mapping[str, bool],
    further: tuple[Path, ...],
) -> Request:
    labels = target
    if target.is_dir() or not target.name.endswith(OUTPUT_ENDINGS):
        own = _RESULT_ENDINGS.get(entry.ending, entry.ending)
        labels = target / f"{name.result}{ending or own}"
    return Request(
        Source(name.volume_id, entry.path, further=further),
        labels,
        **{what: _beside(labels, what) if wanted else None for what, wanted in maps.items()},
    )


def _beside(labels: Path, what: str) -> Path:
    """Next to the labels; NIfTI, as other formats have no place for classes."""
    ending = ".nii" if labels.name.endswith(".nii") else ".nii.gz"
    return labels.with_name(f"{file_stem(labels)}_{what}{ending}")


def _without_results(requests: list[Request], preparation: Preparation) -> list[Request]:
    """The requests, except those whose scan is an earlier result on another scan's grid."""
    values = preparation.get("label_values") or range(len(preparation.get("classes", ())))
    num_regions = len(regions_of(preparation))
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
        or not _is_result(request.source.image, made.source.image, values, num_regions)
    ]


def _is_result(path: Path, scan: Path, values: Sequence[int], num_regions: int) -> bool:
    """Whether a file holds labels, probabilities or uncertainty on a scan's grid."""
    try:
        found, grid = open_grid(path), open_grid(scan)
        if found.dtype == np.float32:
            maps = num_regions or len(values)
            on_grid = found.shape in (grid.shape, (*grid.shape, maps))
            return on_grid and np.allclose(found.affine, grid.affine)
        labels = read_labels(path, grid)
    except DatasetError:
        return False
    if labels.array.shape != grid.shape or not np.allclose(labels.affine, grid.affine, atol=1e-3):
        return False
    known = range(len(values)) if path.suffix == ".dcm" else values
    return labels.array.dtype.kind == "u" and bool(np.isin(labels.array, known).all())


def _wrong_places(requests: list[Request]) -> dict[Request, Fault]:
    """The requests whose results would overwrite scans or each other, or cannot be written."""
    scans = {path.resolve() for request in requests for path in request.source.images}
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
        scan = request.source.image
        if is_segmentation(scan):
            remedy = "give its series, in a folder"
            wrong[request] = Fault(scan, "holds segmentations, not a scan", remedy)
        elif request.labels.name.endswith(".dcm") and not is_series(scan):
            remedy = "choose another output"
            wrong[request] = Fault(scan, "is no DICOM series, which .dcm refers to", remedy)
    return wrong
