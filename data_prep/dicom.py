"""Verified reading of DICOM series: a folder of slices, one image in each file.

DICOM has no checksum, but the slices of a series repeat their grid: a slice that differs from the
others is a fault, named by its file, and so are missing and doubled slices. Positions order the
slices, whatever their numbers and names. A series with a tilted gantry is neither resampled nor
straightened: its affine is sheared, as its voxels are. Each slice has its own slope and intercept.
pydicom reads the files; SimpleITK decodes JPEG of all kinds.

Nothing of the patient, the study's description or the dates is read into a message.

Source: DICOM PS3.3, the image plane and image pixel modules.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.faults import DatasetError, Fault, finding
from data_prep.scan import (
    FETCH_AGAIN,
    Grid,
    Scan,
    as_narrow,
    check_affine,
    from_lps,
    read_bytes,
    scan_error,
    unreadable,
)
from kafjax.errors import import_extra

ENDINGS = (".dcm", ".ima")
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
_DIRECTORY = "1.2.840.10008.1.3.10"
_OWN_CODECS = ("1.2.840.10008.1.2.5",)  # of pydicom, which needs no library for RLE
_MAGIC = b"DICM"
_PREAMBLE = 128
# Equal in all slices of a series.
_SHARED = (
    *("Modality", "SOPClassUID", "StudyInstanceUID", "FrameOfReferenceUID", "Rows", "Columns"),
    *("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelSpacing", "TransferSyntaxUID"),
)
_SCALING = {"RescaleSlope": 1, "RescaleIntercept": 0}  # with what a slice without them has
_SCALED_BY_SLICE = ("PT", "NM")  # modalities whose scaling changes from slice to slice
_USED = (
    *(name for name in _SHARED if name != "TransferSyntaxUID"),
    *_SCALING,
    *("SeriesInstanceUID", "SeriesNumber", "SOPInstanceUID", "NumberOfFrames"),
    *("ImageOrientationPatient", "ImagePositionPatient", "ModalityLUTSequence"),
)
_SAME_PLACE = 1e-3  # mm
_SAME_DIRECTION = 1e-4  # of unit vectors
# Positions are rounded; a slice may lie this far from its place.
_ROUNDING_MM, _ROUNDING = 0.02, 0.02  # the latter of the spacing
_REMOVE = "fetch it again, or move it away if it belongs to another series"


@dataclass(frozen=True)
class Series:
    """The images of one series in one folder, sorted by name."""

    number: str  # by the scanner, as text; empty if it has none
    files: tuple[Path, ...]
    headers: tuple[Any, ...] = dataclasses.field(repr=False, compare=False)  # pydicom's, no pixels


def is_dicom(path: Path) -> bool:
    """Whether a file's bytes say that it is DICOM."""
    try:
        with path.open("rb") as stream:
            return stream.read(_PREAMBLE + len(_MAGIC))[_PREAMBLE:] == _MAGIC
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether a folder, at any depth, holds a file that is DICOM by its content or its name."""
    return any(path.name.lower().endswith(ENDINGS) or is_dicom(path) for path in _walk(folder))


def find_series(folder: Path) -> tuple[list[Series], list[Fault]]:
    """The series of a folder, at any depth, and the faults and findings about its other files.

    Images that are alone in their series, such as localizers, are found but make no series, unless
    there is nothing else.
    """
    found, faults = _find_series(folder, *_state(folder))
    return list(found), list(faults)


def series_of(path: Path) -> Series:
    """The series of a folder, or the one that a file is a slice of.

    Raises `DatasetError`: no series there, several in a folder, or a fault of its files' headers.
    """
    folder = path if path.is_dir() else path.parent
    found, faults = find_series(folder)
    if path != folder:
        _, fault = _open_image(path)
        if fault is not None:
            raise DatasetError([fault])
        found = [one for one in found if path in one.files]
        faults = []
    if stops := [fault for fault in faults if fault.stops]:
        raise DatasetError(stops)
    if not found:
        what = "holds no DICOM image" if path == folder else "is alone in its series"
        raise scan_error(path, what, "expected the slices of a series")
    if len(found) > 1:
        names = "; ".join(
            f"{one.number or 'without number'}: {len(one.files)} images such as {one.files[0].name}"
            for one in found
        )
        remedy = "name one of its files, or give each series a folder of its own"
        raise scan_error(path, f"holds {len(found)} series ({names})", remedy)
    return found[0]


def read_series(path: Path) -> Scan:
    """Reads the series of a folder, or of one of its files, as [column, row, slice].

    Integers, also scaled ones, become int16 or int32, others float32. Raises `DatasetError` with
    all faults of its slices.
    """
    series = series_of(path)
    order, affine = _geometry(path, series)
    files = [series.files[i] for i in order]
    faults: list[Fault] = []
    slices, digests = [], []
    for file, header in zip(files, (series.headers[i] for i in order), strict=True):
        try:
            stored = read_bytes(file)
            slices.append(_decode(file, stored, header))
        except DatasetError as error:
            faults += error.faults
            continue
        digests.append(hashlib.sha256(stored).digest())
    if faults:
        raise DatasetError(faults)
    array = as_narrow(np.stack(slices, axis=-1), scaled=True)
    return Scan(array, affine, _digest(digests))


def series_grid(path: Path) -> Grid:
    """The grid of a series. Raises `DatasetError` with all faults of its slices' headers."""
    series = series_of(path)
    order, affine = _geometry(path, series)
    shape = (int(series.headers[0].Columns), int(series.headers[0].Rows), len(order))
    return Grid(shape, affine, np.dtype(np.int16))


def sorted_files(path: Path) -> list[Path]:
    """The files of a series in the order of `read_series`' slices. Raises `DatasetError`."""
    series = series_of(path)
    return [series.files[i] for i in _geometry(path, series)[0]]


def series_digest(path: Path) -> str:
    """The `sha256` of `read_series`, independent of the files' names."""
    return _digest([hashlib.sha256(read_bytes(file)).digest() for file in series_of(path).files])


def _digest(digests: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    """The files of a folder at any depth, sorted; hidden ones and links to folders left out."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path


# A scan is listed, found, surveyed and read: its headers are parsed once for all of them.
@functools.lru_cache(maxsize=256)
def _find_series(folder: Path, *state: Any) -> tuple[list[Series], list[Fault]]:
    del state
    headers, faults = [], []
    for path in _walk(folder):
        header, fault = _open_image(path)
        if header is not None:
            headers.append((path, header))
        if fault is not None:
            faults.append(fault)
    groups: dict[tuple[Path, str], list[tuple[Path, Any]]] = defaultdict(list)
    for path, header in headers:
        groups[path.parent, str(header.get("SeriesInstanceUID", ""))].append((path, header))
    series = [
        Series(str(slices[0][1].get("SeriesNumber") or ""), *map(tuple, zip(*slices, strict=True)))
        for slices in groups.values()
    ]
    several = [one for one in series if len(one.files) > 1]
    faults += [_lone_image(one, several) for one in series if len(one.files) == 1 and several]
    for one in several:
        faults += _odd_scaling(one)
    return sorted(several or series, key=_order), faults


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes if a file of the folder does."""
    states = []
    for path in _walk(folder):
        state = path.stat()
        states.append((str(path), state.st_mtime_ns, state.st_size))
    return tuple(states)


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Silences pydicom's warnings and log, which do not name the file."""
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _open_image(path: Path) -> tuple[Any, Fault | None]:
    """A file's header if it is an image of one frame, else None; and its fault or finding."""
    if not is_dicom(path):
        if path.suffix and not path.name.lower().endswith(ENDINGS):
            return None, finding(path, "is not used", "expected the files of a DICOM series")
        if path.name.upper() in ("DICOMDIR", "LOCKFILE", "VERSION", "README", "LICENSE"):
            return None, finding(path, "is not used", "expected the files of a DICOM series")
        return None, Fault(
            path, "is not a DICOM file, or a damaged one", f"{FETCH_AGAIN}, or move it away"
        )
    pydicom = import_extra("pydicom")
    try:
        with without_remarks():
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_USED))
            for name in _USED:  # parsed only now
                header.get(name)
            kind = str(header.file_meta.get("MediaStorageSOPClassUID", ""))
            is_image = "Rows" in header or "Image Storage" in pydicom.uid.UID(kind).name
            frames = int(header.get("NumberOfFrames") or 1)
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # pydicom's parsers raise any exception for a damaged file
        return None, Fault(path, f"its header is damaged ({_short(error)})", FETCH_AGAIN)
    if kind == _DIRECTORY:
        return None, None
    if "SOPClassUID" not in header:
        return None, Fault(path, "its header breaks off, or is damaged", FETCH_AGAIN)
    if kind == SEGMENTATION:
        return None, finding(path, "holds segmentations, not a scan", "it is not used")
    if not is_image:
        return None, finding(path, "is DICOM, but not an image", "it is not used")
    if frames > 1:
        remedy = "export the series with one image in each file, or convert it to NIfTI"
        return None, Fault(path, f"holds {frames} frames", remedy)
    return header, None


def _short(error: Exception) -> str:
    """The kind of an error: its text may quote the file, and with it the patient."""
    return type(error).__name__


def _order(series: Series) -> tuple[int, str, Path]:
    number = series.number
    return (int(number) if number.lstrip("-").isdecimal() else 0, number, series.files[0])


def _lone_image(one: Series, several: Sequence[Series]) -> Fault:
    """A localizer is found only; an image that fits another series is a fault."""
    (path,), (header,) = one.files, one.headers
    for series in several:
        if series.files[0].parent == path.parent and all(
            str(header.get(name)) == str(series.headers[0].get(name))
            for name in ("FrameOfReferenceUID", "ImageOrientationPatient", "Rows", "Columns")
        ):
            found = f"is alone in its series, but has the grid of {series.files[0].name}'s"
            return Fault(path, found, _REMOVE)
    return finding(path, "is alone in its series", "it is not used, as a localizer")


def _odd_scaling(series: Series) -> list[Fault]:
    """Slices with a scaling of their own, in modalities where all slices usually share one."""
    if series.headers[0].get("Modality") in _SCALED_BY_SLICE:
        return []
    faults = []
    for name in _SCALING:
        values = [str(header.get(name)) for header in series.headers]
        usual = Counter(values).most_common(1)[0][0]
        faults += [
            finding(
                path, f"its {name} is {value}, {usual} in most slices", "each slice keeps its own"
            )
            for path, value in zip(series.files, values, strict=True)
            if value != usual
        ]
    return faults


def _geometry(path: Path, series: Series) -> tuple[list[int], np.ndarray]:
    """The order of the slices and the volume's affine. Raises `DatasetError` with all faults."""
    if len(series.files) == 1:
        raise scan_error(series.files[0], "is alone in its series", "expected several slices")
    faults = [*_unlike(series), *_unfit(series)]
    if faults:
        raise DatasetError(faults)
    orientations, positions, faults = [], [], []
    for file, header in zip(series.files, series.headers, strict=True):
        try:
            orientations.append(_floats(file, header, "ImageOrientationPatient", 6))
            positions.append(_floats(file, header, "ImagePositionPatient", 3))
        except DatasetError as error:
            faults += error.faults
    if faults:
        raise DatasetError(faults)
    usual = np.median(orientations, axis=0)
    across, down = usual[:3], usual[3:]
    if not np.allclose([across @ across, down @ down, across @ down], [1, 1, 0], atol=1e-3):
        what = "its directions (ImageOrientationPatient) are not perpendicular unit vectors"
        raise scan_error(series.files[0], what, FETCH_AGAIN)
    for file, orientation in zip(series.files, orientations, strict=True):
        if np.abs(orientation - usual).max() > _SAME_DIRECTION:
            faults.append(Fault(file, "its orientation differs from the other slices'", _REMOVE))
    order = np.argsort(np.array(positions) @ np.cross(across, down), kind="stable").tolist()
    faults += _gaps(
        [series.files[i] for i in order], np.array(positions)[order], np.cross(across, down)
    )
    if faults:
        raise DatasetError(faults)
    first, last = (np.array(positions[i]) for i in (order[0], order[-1]))
    row_spacing, column_spacing = _floats(series.files[0], series.headers[0], "PixelSpacing", 2)
    affine = np.eye(4)
    affine[:3, 0] = across * column_spacing
    affine[:3, 1] = down * row_spacing
    affine[:3, 2] = (last - first) / (len(order) - 1)
    affine[:3, 3] = first
    return order, check_affine(path, from_lps(affine))


def _unlike(series: Series) -> list[Fault]:
    """Faults of slices that differ from the others, in `_SHARED` and in having a scaling."""
    faults = []
    names = [*_SHARED, *_SCALING]
    for name in names:
        values = [_shown(header, name) for header in series.headers]
        if name in _SCALING:
            values = ["missing" if value == "missing" else "there" for value in values]
        usual = Counter(values).most_common(1)[0][0]
        for file, value in zip(series.files, values, strict=True):
            if value != usual:
                found = f"its {name} is {value}, {usual} in most slices"
                if name.endswith("UID") and "missing" not in (value, usual):
                    found = f"its {name} differs from the other slices'"
                faults.append(Fault(file, found, _REMOVE))
    identities = [str(header.get("SOPInstanceUID", "")) for header in series.headers]
    for i, identity in enumerate(identities):
        if (first := identities.index(identity)) < i:
            found = f"is a copy of {series.files[first].name}, by its SOPInstanceUID"
            faults.append(Fault(series.files[i], found, "move one of them away"))
    return faults


def _shown(header: Any, name: str) -> str:
    source = header.file_meta if name == "TransferSyntaxUID" else header
    value = source.get(name)
    return "missing" if value is None else str(value)


def _unfit(series: Series) -> list[Fault]:
    """Faults of images whose values cannot be read as numbers on a grid."""
    file, header = series.files[0], series.headers[0]
    if str(header.get("PhotometricInterpretation")) != "MONOCHROME2":
        found = f"its colours are {header.get('PhotometricInterpretation')}"
        return [Fault(file, found, "expected grey values, MONOCHROME2")]
    if "ModalityLUTSequence" in header:
        return [Fault(file, "has a table of values (ModalityLUT)", "convert it to NIfTI")]
    if min(int(header.get("Rows") or 0), int(header.get("Columns") or 0)) < 1:
        return [Fault(file, "has no Rows or no Columns", FETCH_AGAIN)]
    if min(_floats(file, header, "PixelSpacing", 2)) <= 0:
        return [Fault(file, f"its PixelSpacing is {header.PixelSpacing}", "correct the header")]
    return []


def _floats(file: Path, header: Any, name: str, count: int) -> np.ndarray:
    """The numbers of an element. Raises `DatasetError`."""
    try:
        with without_remarks():
            found = np.array([float(x) for x in header[name].value or ()])
    except (KeyError, TypeError, ValueError):
        found = np.empty(0)
    if len(found) != count or not np.isfinite(found).all():
        remedy = f"expected {count} numbers: {FETCH_AGAIN}, or convert it with its vendor's tool"
        raise scan_error(file, f"has no valid {name}", remedy)
    return found


def _gaps(files: Sequence[Path], positions: np.ndarray, normal: np.ndarray) -> list[Fault]:
    """Faults of slices, in order, that are doubled, missing or off the line of the others."""
    steps = np.diff(positions @ normal)
    faults = []
    for i in np.flatnonzero(steps < _SAME_PLACE).tolist():
        found = f"lies at the place of {files[i].name}"
        remedy = "move one away; give each of several images of a place its own series"
        faults.append(Fault(files[i + 1], found, remedy))
    if faults:
        return faults
    usual = float(np.median(steps))
    allowed = max(_ROUNDING_MM, _ROUNDING * usual)
    for i in np.flatnonzero(np.abs(steps - usual) > allowed).tolist():
        between = (
            f"between it and {files[i + 1].name} are {steps[i]:.6g} mm, usually {usual:.6g} mm"
        )
        missing = round(float(steps[i]) / usual) - 1
        found = f"{missing} slices are missing: {between}" if missing > 0 else between
        faults.append(Fault(files[i], found, "add what is missing, or leave the series out"))
    if faults:
        return faults
    line = np.linspace(positions[0], positions[-1], len(positions))
    return [
        Fault(file, f"lies {apart:.3g} mm from its place in the series", _REMOVE)
        for file, apart in zip(files, np.linalg.norm(positions - line, axis=1), strict=True)
        if apart > allowed
    ]


def _decode(file: Path, stored: bytes, header: Any) -> np.ndarray:
    """A slice's values [column, row], scaled. Raises `DatasetError` if they are not all there."""
    pydicom = import_extra("pydicom")
    try:
        with without_remarks():
            whole = pydicom.dcmread(io.BytesIO(stored))
            pixels = whole.get("PixelData")
            syntax = whole.file_meta.TransferSyntaxUID
            if syntax.is_encapsulated and pixels is not None:
                _check_frame(file, pixels)
            elif pixels is not None:
                _check_length(file, len(pixels), header)
            if pixels is not None and (syntax in _OWN_CODECS or not syntax.is_encapsulated):
                slope, intercept = (whole.get(name, usual) for name, usual in _SCALING.items())
                return whole.pixel_array.T * float(slope) + float(intercept)
    except DatasetError:
        raise
    except Exception as error:  # pydicom's parsers raise any exception for a damaged file
        found = f"its values cannot be read ({_short(error)})"
        raise scan_error(file, found, FETCH_AGAIN) from error
    if pixels is None:
        raise scan_error(file, "has no values (PixelData)", FETCH_AGAIN)
    return _decompress(file, header)


def _check_length(file: Path, length: int, header: Any) -> None:
    expected = int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8
    if length not in (expected, expected + expected % 2):
        found = f"holds {length} bytes of values; its header says {expected}"
        raise scan_error(file, found, FETCH_AGAIN)


def _check_frame(file: Path, pixels: bytes) -> None:
    """Decoders fill up an image that breaks off: its end must be there."""
    from pydicom import encaps

    frames = [frame.rstrip(b"\0") for frame in encaps.generate_frames(pixels, number_of_frames=1)]
    is_jpeg = frames[:1] and frames[0].startswith((b"\xff\xd8", b"\xff\x4f"))
    if len(frames) != 1 or (is_jpeg and not frames[0].endswith(b"\xff\xd9")):
        raise scan_error(file, "its compressed values are truncated", FETCH_AGAIN)


def _decompress(file: Path, header: Any) -> np.ndarray:
    sitk = import_extra("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        image = sitk.ReadImage(str(file), imageIO="GDCMImageIO")
    except UnicodeError as error:
        raise scan_error(file, "its path is not UTF-8", "rename it") from error
    except (RuntimeError, TypeError) as error:
        raise scan_error(file, "its values cannot be decoded", FETCH_AGAIN) from error
    array = sitk.GetArrayFromImage(image)
    if array.shape != (1, int(header.Rows), int(header.Columns)):
        raise scan_error(file, f"its values have the shape {array.shape}", FETCH_AGAIN)
    return array[0].T
