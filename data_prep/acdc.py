"""The ACDC dataset's raw layout and rules: short-axis cine MRI of the heart.

A patient has a folder with `Info.cfg`, which names the frames of end-diastole (`ED: 1`) and
end-systole (`ES: 12`), a volume and its labels for each of the two, and the whole cine, 4-d. A
volume is one frame; frames are counted from 1. Sources: Bernard et al. (IEEE TMI 2018); Yang et al.
(NeurIPS 2023), appendix, for resampling, intensities and neighbours.
"""

import dataclasses
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.entries import list_entries, misplaced, unused_folder
from data_prep.faults import DatasetError, Fault
from data_prep.intensity import with_moments
from data_prep.nifti import Plane, count_frames, slice_plane
from data_prep.resampling import check_spacing, resample
from data_prep.volumes import Prepared, Reader, Source, Volume
from kafjax.files import read_text

PIXEL = 1.25  # mm, edge of the paper's resampled pixels
_RADIUS = 37.5  # mm, within which keypoints correspond: the paper's 30 pixels
_FOLDER = re.compile(r"patient(\d+)")
_FILE = re.compile(r"patient(\d+)_(?:4d|frame(\d+)(_gt)?)\.nii(?:\.gz)?")
_CINE = 0  # where a frame's number would be
_INFO = "Info.cfg"
_PARTS = ("training", "testing")
_EXPECTED = (
    "patient001/ with Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz, ..."
)

# Paths of one patient by frame (or _CINE) and whether they are labels.
_Files = dict[tuple[int, bool], list[Path]]


@dataclass(frozen=True)
class AcdcReader(Reader):
    """Folders `patient001`, ... in RAW, or in `training` and `testing` there.

    With `cine` the other frames of the 4-d files become volumes without labels.
    `pixel_spacing` is in mm; the paper's is 1.25. `radius` follows from it: 37.5 mm.
    """

    cine: bool = False
    pixel_spacing: float = PIXEL
    radius: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Raises `ValueError` for a spacing outside 0.1 to 10 mm."""
        check_spacing(self.pixel_spacing)
        object.__setattr__(self, "radius", round(_RADIUS / self.pixel_spacing))

    kind = "acdc"
    classes = ("background", "right_ventricle", "myocardium", "left_ventricle")
    one_plane = False  # short axes are oblique to the body's planes

    @property
    def facts(self) -> dict[str, Any]:
        """The pixel size of the grid."""
        return {"pixel_spacing": self.pixel_spacing}

    def plane(self, affine: np.ndarray) -> Plane:
        """The plane across the coarsest axis: short-axis slices are oblique, and files vary."""
        return slice_plane(affine)

    def reach(self, num_slices: int) -> int:
        """18 % of the slices, and at most two: they are up to 10 mm apart."""
        return max(1, min(18 * num_slices // 100, 2))

    def prepare(self, volume: Volume) -> Prepared:
        """Resamples slices, float32, with the volume's own mean and deviation."""
        return with_moments(resample(volume, self.pixel_spacing))

    def find(self, raw_dir: Path) -> tuple[list[Source], list[Fault]]:
        """The frames of all patients, in order of patient and frame number."""
        if not raw_dir.is_dir():
            return [], [Fault(raw_dir, "is not a folder", "give the patients' parent folder")]
        folders, faults = _find_folders(raw_dir)
        if not folders:
            faults.append(Fault(raw_dir, "holds no patient's folder", f"expected {_EXPECTED}"))
        sources: list[Source] = []
        for number, paths in sorted(folders.items()):
            for extra in paths[1:]:
                remedy = f"move it or {paths[0]} away"
                faults.append(Fault(extra, f"is a second folder of patient {number}", remedy))
            of_patient, more = self._find_patient(number, paths[0])
            sources += of_patient
            faults += more
        return sources, faults

    def _find_patient(self, number: int, folder: Path) -> tuple[list[Source], list[Fault]]:
        files, broken, faults = _sort_files(number, folder)
        named, more = _read_info(folder / _INFO)
        faults += more
        # Without Info.cfg the other files are still checked.
        frames = named or sorted({frame for frame, _ in files if frame != _CINE})
        sources, more = _labelled_frames(number, folder, frames, files)
        faults += more
        if self.cine:
            cine, more = _cine_frames(number, folder, frames, files)
            sources = sorted([*sources, *cine], key=lambda source: source.id)
            faults += more
        return [source for source in sources if not broken & {*source.files}], faults


def _name(number: int, frame: int) -> str:
    return f"patient{number:03d}_frame{frame:02d}"


def _find_folders(raw_dir: Path) -> tuple[dict[int, list[Path]], list[Fault]]:
    """Patients' folders by number, in `raw_dir` and its parts, and faults of everything else."""
    folders: dict[int, list[Path]] = defaultdict(list)
    faults: list[Fault] = []
    for parent in (raw_dir, *(raw_dir / part for part in _PARTS)):
        entries = list_entries(parent, used=_PARTS if parent == raw_dir else ())
        faults += [*entries.faults, *misplaced(entries.scans, _EXPECTED)]
        for path in entries.folders:
            if match := _FOLDER.fullmatch(path.name):
                folders[int(match[1])].append(path)
            elif "patient" in path.name.lower():
                remedy = "rename it to patient<number>, or move it away"
                faults.append(Fault(path, "its name is not a patient's", remedy))
            else:
                faults.append(unused_folder(path, _EXPECTED))
    return folders, faults


def _sort_files(number: int, folder: Path) -> tuple[_Files, frozenset[Path], list[Fault]]:
    """A patient's NIfTI files by frame and kind, the unreadable ones, and faults."""
    files: _Files = defaultdict(list)
    entries = list_entries(folder, used=(_INFO,))
    faults = [*entries.faults, *(unused_folder(path, _EXPECTED) for path in entries.folders)]
    for path in entries.scans:
        match = _FILE.fullmatch(path.name)
        if match is None or int(match[1]) != number:
            remedy = f"expected {_EXPECTED}; rename it, or move it away"
            faults.append(Fault(path, "its name does not match this patient's files", remedy))
        elif files[key := (int(match[2] or _CINE), bool(match[3]))]:
            found = f"is a second {files[key][0].name}"
            faults.append(Fault(path, found, "move one of them away"))
        else:
            files[key].append(path)
    return files, entries.broken, faults


def _read_info(path: Path) -> tuple[list[int], list[Fault]]:
    """The frames of end-diastole and end-systole; none if the file is faulty."""
    remedy = "expected lines such as 'ED: 1' and 'ES: 12', the numbers of its frames"
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        return [], [Fault(path, f"cannot be read ({error.strerror})", remedy)]
    fields = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    faults = [
        Fault(
            path, f"{phase} is {fields[phase]!r}" if phase in fields else f"has no {phase}", remedy
        )
        for phase in ("ED", "ES")
        if not re.fullmatch(r"0*[1-9]\d*", fields.get(phase, ""), re.ASCII)
    ]
    return ([] if faults else sorted({int(fields["ED"]), int(fields["ES"])})), faults


def _labelled_frames(
    number: int, folder: Path, frames: list[int], files: _Files
) -> tuple[list[Source], list[Fault]]:
    """The frames that Info.cfg names; either all of them have labels or none."""
    sources, faults = [], []
    labelled = any(is_label for _, is_label in files)
    for frame in frames:
        name = _name(number, frame)
        image, label = files.get((frame, False)), files.get((frame, True))
        missing = [] if image else [f"{name}.nii.gz"]
        missing += [f"{name}_gt.nii.gz"] if labelled and not label else []
        for file in missing:
            faults.append(Fault(folder, f"has no {file}", "add it, or correct Info.cfg"))
        if image:
            sources.append(Source(name, image[0], label[0] if label else None))
    for (frame, _), paths in files.items():
        if frame not in (*frames, _CINE):
            found = f"its frame is not one of Info.cfg's, {' and '.join(map(str, frames))}"
            faults.append(Fault(paths[0], found, "correct Info.cfg, or move it away"))
    return sources, faults


def _cine_frames(
    number: int, folder: Path, frames: list[int], files: _Files
) -> tuple[list[Source], list[Fault]]:
    """All frames of the cine except those that have their own files."""
    cine = files.get((_CINE, False))
    if not cine:
        missing = f"patient{number:03d}_4d.nii.gz"
        return [], [Fault(folder, f"has no {missing}", "add it, or leave --cine out")]
    try:
        every = range(1, count_frames(cine[0]) + 1)
    except DatasetError as error:
        return [], list(error.faults)
    others = [frame for frame in every if frame not in frames]
    return [Source(_name(number, frame), cine[0], frame=frame - 1) for frame in others], []
