"""Lists a folder of scans. Nothing is skipped silently: each entry is a scan or is reported.

Only files that operating systems leave behind (`.DS_Store`, `._name`, `Thumbs.db`, ...) and a
scan's side-car JSON, `name.json` next to `name.nii.gz`, are harmless and not reported.
"""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.faults import Fault, finding

SCAN_ENDINGS = (".nii.gz", ".nii")
# Images in other formats: a user who keeps them among scans expects them to be read.
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
    """The entries of a folder, sorted by name.

    Attributes:
      scans: all entries named as NIfTI, readable or not.
      broken: the unreadable ones among `scans`: dangling links, folders, devices.
      folders: other folders; the caller uses or reports them.
      faults: those of `broken` and of all other entries.
    """

    scans: tuple[Path, ...]
    broken: frozenset[Path]
    folders: tuple[Path, ...]
    faults: tuple[Fault, ...]


def list_entries(folder: Path, *, used: Collection[str] = ()) -> Entries:
    """Lists a folder; a missing folder counts as empty.

    Args:
      folder: not searched recursively.
      used: names of the layout's own entries, which the caller handles.
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
            faults.append(Fault(path, "its name does not fit this layout", remedy))
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
    """Whether a name is a NIfTI file's, in any case, and not hidden."""
    return name.lower().endswith(SCAN_ENDINGS) and not name.startswith(".")


def _is_harmless(path: Path, described: Collection[str]) -> bool:
    """Whether an operating system left the entry, or it is a scan's side-car JSON."""
    if path.name.endswith(".json") and path.name.removesuffix(".json") in described:
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
    return finding(path, "is not used", "expected scans, .nii.gz or .nii")


def _dangling(path: Path) -> Fault | None:
    if not os.path.islink(path) or os.path.exists(path):
        return None
    remedy = "fetch its file (such as `datalad get`), or remove the link"
    return Fault(path, f"is a link to {os.readlink(path)}, which does not exist", remedy)


def _ending(name: str) -> str:
    return next(name[-len(ending) :] for ending in SCAN_ENDINGS if name.lower().endswith(ending))


def _stem(name: str) -> str:
    return name[: -len(_ending(name))]


def _count_scans(folder: Path) -> int:
    """Scans at any depth; links to folders are not followed."""
    return sum(is_scan_name(name) for _, _, names in os.walk(folder) for name in names)
