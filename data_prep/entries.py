"""Lists a folder of scans. Nothing is skipped silently: each entry is a scan or is reported.

Only files that operating systems leave behind (`.DS_Store`, `._name`, `Thumbs.db`, ...), a
scan's side-car JSON, `name.json` next to `name.nii.gz`, and the values of a header in a file of
their own, `name.raw` next to `name.mhd`, are harmless and not reported.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.dicom import find_series, holds_dicom, is_dicom
from data_prep.faults import DatasetError, Fault, finding
from data_prep.segmentations import is_segmentation

NIFTI_ENDINGS = (".nii.gz", ".nii")
# Of one file for each scan, and of a header with a file of values.
SCAN_ENDINGS = (*NIFTI_ENDINGS, ".seg.nrrd", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")
SCANS = "scans: .nii.gz, .nii, .nrrd, .mha, .mhd or folders of DICOM"
_VALUES = (".raw", ".zraw", ".raw.gz", ".raw.bz2", ".gz", ".bin", ".img")
# Images in other formats: a user who keeps them among scans expects them to be read.
OTHER_IMAGES = (
    *(".ima", ".img", ".img.gz", ".hdr", ".mgz", ".mgh"),
    *(".mnc", ".gipl", ".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip"),
)
_OF_SYSTEMS = re.compile(
    r"\._.*|\.DS_Store|\.git.*|\.datalad|\.Trash.*|\.Spotlight.*|\.fseventsd|__MACOSX|Icon\r"
    r"|Thumbs\.db|desktop\.ini|@eaDir|lost\+found",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Entries:
    """The entries of a folder, sorted by name.

    Attributes:
      scans: all entries named as scans, readable or not; with `dicom` also the series in folders,
        each by its folder or, if it holds several, by the first file of each.
      broken: the unreadable ones among `scans`: dangling links, folders, devices, damaged series.
      folders: other folders; the caller uses or reports them.
      faults: those of `broken` and of all other entries.
    """

    scans: tuple[Path, ...]
    broken: frozenset[Path]
    folders: tuple[Path, ...]
    faults: tuple[Fault, ...]
    stems: Mapping[Path, str] = dataclasses.field(default_factory=dict)  # of series in folders

    def stem(self, path: Path) -> str:
        """A scan's name without its ending; for a series its folder's and, of several, its own."""
        return self.stems.get(path, file_stem(path))


def list_entries(folder: Path, *, used: Collection[str] = (), dicom: bool = False) -> Entries:
    """Lists a folder; a missing folder counts as empty.

    Args:
      folder: not searched recursively.
      used: names of the layout's own entries, which the caller handles.
      dicom: whether a folder of DICOM files is a scan.
    """
    if not os.path.lexists(folder):
        return Entries((), frozenset(), (), ())
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        fault = Fault(folder, f"cannot be read ({error.strerror})", "expected a folder of files")
        return Entries((), frozenset(), (), (fault,))
    scans: list[Path] = []
    broken: list[Path] = []
    folders: list[Path] = []
    faults: list[Fault] = []
    stems: dict[Path, str] = {}
    loose: list[Path] = []
    described = {file_stem(Path(name)) for name in names if is_scan_name(name)}
    headers = {file_stem(Path(name)) for name in names if name.endswith((".mhd", ".nhdr"))}
    wanted = {name.lower(): name for name in used if name not in names}
    for name in names:
        path = folder / name
        if name in used or _is_harmless(path, described, headers):
            continue
        if name.lower() in wanted:
            remedy = f"rename it to {wanted[name.lower()]}: capitals matter"
            faults.append(Fault(path, "its name does not fit this layout", remedy))
        elif dicom and _is_loose(path):
            loose.append(path)
        elif is_scan_name(name):
            scans.append(path)
            if problem := scan_problem(path):
                broken.append(path)
                faults.append(problem)
        elif os.path.isdir(path):
            if dicom and holds_dicom(path):
                series, more = _series(path)
                stems |= series
                scans += series
                faults += more
                broken += [p for p in series if any(fault.stops for fault in more)]
            else:
                folders.append(path)
        else:
            faults.append(_other(path))
    if loose:
        found = f"holds {len(loose)} DICOM files itself, such as {loose[0].name}"
        faults.append(Fault(folder, found, "give each series a folder of its own, named as a scan"))
    return Entries(tuple(scans), frozenset(broken), tuple(folders), tuple(faults), stems)


def _series(folder: Path) -> tuple[dict[Path, str], list[Fault]]:
    """Names of a folder's series by the path that opens each, and the faults of its files."""
    try:
        found, faults = find_series(folder)
    except DatasetError as error:
        return {}, list(error.faults)
    if len(found) == 1:
        return {folder: folder.name}, faults
    if not found and not faults:
        faults = [Fault(folder, "holds no DICOM image", "expected the slices of a series")]
    named = [f"{folder.name}_{one.number}" for one in found]
    unique = len(set(named)) == len(named) and all(one.number for one in found)
    return {
        one.files[0]: name if unique else f"{folder.name}_{i}"
        for i, (one, name) in enumerate(zip(found, named, strict=True), start=1)
    }, faults


def is_scan_name(name: str) -> bool:
    """Whether a name is a scan file's, in any case, and not hidden."""
    return name.lower().endswith(SCAN_ENDINGS) and not name.startswith(".")


def _is_loose(path: Path) -> bool:
    """Whether a file is a DICOM image outside a folder of its series, by content or name."""
    if not os.path.isfile(path) or path.name.startswith("."):
        return False
    return (path.name.endswith(".dcm") or is_dicom(path)) and not is_segmentation(path)


def _is_harmless(path: Path, described: Collection[str], headers: Collection[str]) -> bool:
    """Whether an operating system left the entry, or it belongs to a scan."""
    for ending, names in ((".json", described), *((ending, headers) for ending in _VALUES)):
        if path.name.endswith(ending) and path.name.removesuffix(ending) in names:
            return os.path.isfile(path)
    return _OF_SYSTEMS.fullmatch(path.name) is not None


def scan_problem(path: Path) -> Fault | None:
    """Why an entry named as a scan cannot be read as a file, or None."""
    if os.path.isdir(path):
        remedy = "move the file out of it, or rename the folder"
        return Fault(path, "is a folder with the name of a scan", remedy)
    if link := _dangling(path):
        return link
    if not os.path.isfile(path):
        return Fault(path, "is neither a file nor a link to one", "move it away")
    if not path.name.endswith(SCAN_ENDINGS):
        right = path.name[: -len(_ending(path.name))] + _ending(path.name).lower()
        taken = ", unless that is another scan" if os.path.lexists(path.with_name(right)) else ""
        return Fault(path, "its ending has capitals", f"expected the name {right}{taken}")
    return None


def unused_folder(path: Path, expected: str) -> Fault:
    """A finding about a folder outside the layout."""
    inside = f", with {count} scans" if (count := _count_scans(path)) else ""
    return finding(path, f"is a folder that is not used{inside}", f"expected {expected}")


def misplaced(paths: Sequence[Path], expected: str) -> list[Fault]:
    """Faults of scans outside the layout's folders."""
    return [
        Fault(path, "lies outside the layout's folders", f"expected {expected}") for path in paths
    ]


def _other(path: Path) -> Fault:
    if link := _dangling(path):  # whatever it held
        return link
    if path.name.startswith("."):
        return finding(path, "is hidden and not used", "rename it if it is to be used")
    if path.name.lower().endswith(OTHER_IMAGES):
        return Fault(path, "is an image of another format", "save it as NIfTI, or move it away")
    return finding(path, "is not used", f"expected {SCANS}")


def _dangling(path: Path) -> Fault | None:
    if not os.path.islink(path) or os.path.exists(path):
        return None
    remedy = "fetch its file (such as `datalad get`), or remove the link"
    return Fault(path, f"is a link to {os.readlink(path)}, which does not exist", remedy)


def _ending(name: str) -> str:
    return next(name[-len(ending) :] for ending in SCAN_ENDINGS if name.lower().endswith(ending))


def file_stem(path: Path) -> str:
    """A scan's name without its ending; a folder's name as it is."""
    name = path.name
    return name[: -len(_ending(name))] if is_scan_name(name) else name


def _count_scans(folder: Path) -> int:
    """Scans at any depth; links to folders are not followed."""
    return sum(is_scan_name(name) for _, _, names in os.walk(folder) for name in names)
