"""What lies in a folder of scans. Nothing is passed over: each entry is a scan, or has a line.

Harmless without a line are what systems leave behind (`.DS_Store`, `._name`, `Thumbs.db`, ...) and
the side-car JSON of a scan, `name.json` next to `name.nii.gz`.
"""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.faults import Fault, finding

SCAN_ENDINGS = (".nii.gz", ".nii")
# Images that are no NIfTI: whoever has them among scans expects them to be read.
OTHER_IMAGES = (
    *(".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", ".ima", ".img", ".img.gz", ".hdr", ".mgz", ".mgh"),
    *(".mnc", ".gipl", ".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip"),
)
_OF_SYSTEMS = re.compile(
    r"\._.*|\.DS_Store|\.git.*|\.datalad|\.Trash.*|\.Spotlight.*|\.fseventsd|__MACOSX|Icon\r"
    r"|Thumbs\.db|desktop\.ini|@eaDir|lost\+found",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Entries:
    """What a folder holds, in order of name.

    Attributes:
      scans: all that is named as NIfTI, whether it can be read or not.
      broken: those of `scans` that cannot be: links to nothing, folders, devices.
      folders: other folders; the caller uses or reports them.
      faults: what is said of `broken` and of the rest.
    """

    scans: tuple[Path, ...]
    broken: frozenset[Path]
    folders: tuple[Path, ...]
    faults: tuple[Fault, ...]


def list_entries(folder: Path, *, used: Collection[str] = ()) -> Entries:
    """Looks through a folder; one that is not there is empty.

    Args:
      folder: is not searched any deeper.
      used: names of the layout's own entries, which the caller looks at.
    """
    if not os.path.lexists(folder):
        return Entries((), frozenset(), (), ())
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        fault = Fault(folder, f"cannot be read ({error.strerror})", "expected a folder of files")
        return Entries((), frozenset(), (), (fault,))
    scans, broken, folders, faults = [], [], [], []
    described = {_stem(name) for name in names if is_scan_name(name)}
    wanted = {name.lower(): name for name in used if name not in names}
    for name in names:
        path = folder / name
        if name in used or _is_harmless(path, described):
            continue
        if name.lower() in wanted:
            remedy = f"rename it to {wanted[name.lower()]}: capitals matter"
            faults.append(Fault(path, "its name is not one of this layout's", remedy))
        elif is_scan_name(name):
            scans.append(path)
            if problem := scan_problem(path):
                broken.append(path)
                faults.append(problem)
        elif os.path.isdir(path):
            folders.append(path)
        else:
            faults.append(_other(path))
    return Entries(tuple(scans), frozenset(broken), tuple(folders), tuple(faults))


def is_scan_name(name: str) -> bool:
    """Whether a name is that of a NIfTI file, in capitals too, and not hidden."""
    return name.lower().endswith(SCAN_ENDINGS) and not name.startswith(".")


def _is_harmless(path: Path, described: Collection[str]) -> bool:
    """Whether an entry is of a system, or JSON about the scan of that name without ending."""
    if path.name.endswith(".json") and path.name.removesuffix(".json") in described:
        return os.path.isfile(path)
    return _OF_SYSTEMS.fullmatch(path.name) is not None


def scan_problem(path: Path) -> Fault | None:
    """Why what is named as a scan cannot be read as a file, or nothing."""
    if os.path.isdir(path):
        remedy = "move the file out of it, or rename the folder"
        return Fault(path, "is a folder, though it is named as a scan", remedy)
    if link := _dangling(path):
        return link
    if not os.path.isfile(path):
        return Fault(path, "is neither a file nor a link to one", "move it away")
    if not path.name.endswith(SCAN_ENDINGS):
        right = path.name[: -len(_ending(path.name))] + _ending(path.name).lower()
        taken = ", if that is no other scan" if os.path.lexists(path.with_name(right)) else ""
        return Fault(path, "its ending has capitals", f"expected the name {right}{taken}")
    return None


def unused_folder(path: Path, expected: str) -> Fault:
    """A finding about a folder that is no part of the layout."""
    inside = f", with {count} scans" if (count := _count_scans(path)) else ""
    return finding(path, f"is a folder that is not used{inside}", f"expected {expected}")


def misplaced(paths: Sequence[Path], expected: str) -> list[Fault]:
    """Faults about scans that lie where the layout has none."""
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
    return finding(path, "is not used", "expected scans, .nii.gz or .nii")


def _dangling(path: Path) -> Fault | None:
    if not os.path.islink(path) or os.path.exists(path):
        return None
    remedy = "fetch its file (such as `datalad get`), or take the link away"
    return Fault(path, f"is a link to {os.readlink(path)}, which is not there", remedy)


def _ending(name: str) -> str:
    return next(name[-len(ending) :] for ending in SCAN_ENDINGS if name.lower().endswith(ending))


def _stem(name: str) -> str:
    return name[: -len(_ending(name))]


def _count_scans(folder: Path) -> int:
    """Scans at any depth; links to folders are not followed."""
    return sum(is_scan_name(name) for _, _, names in os.walk(folder) for name in names)
