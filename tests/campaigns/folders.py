"""Raw folders with odd entries, text files of other systems, and headers out of the ordinary."""

import codecs
import gzip
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.faults import DatasetError
from data_prep.main import main as prepare
from data_prep.nifti import read_nifti
from data_prep.nnunet import open_nnunet
from data_prep.readers import READERS
from data_prep.volumes import Reader
from kafjax.files import read_checked, write_checked
from tests.campaigns.campaign import Settings, Tally
from tests.campaigns.tiny import call_command
from tests.raw_layouts import heart, save, write_acdc, write_nnunet

USUAL_FOLDERS = 100
USUAL_TEXTS = 100
USUAL_HEADERS = 200
_SIZE = (24, 20, 4)

_ODD_NAMES = (
    *("case_009_0000.nii.gz", "case_009.nii.gz", "case_001_0001.nii.gz", "amos_0001.nii.gz"),
    *("case_001_0000.nii", "case_001_0000.NII.GZ", "case_003_0000.nii.gz.part", "scan.mha"),
    *("patient001_frame01.nii", "patient001_frame09.nii.gz", "Patient009", "patient_010"),
    *("ct_1001_image.nii", "ct_01001_label.nii.gz", "CT_1009_image.nii.gz", "ct_1009_label.nii.gz"),
    *("ImagesTr", "info.cfg", "README.md", "notes", ".hidden.nii.gz", "splits_final.json"),
)
_HARMLESS_NAMES = (".DS_Store", "._case_001_0000.nii.gz", "Thumbs.db", "desktop.ini")
_KINDS = ("copy", "copy", "copy", "folder", "full folder", "link to nothing", "fifo")

# Other systems' ways of writing a text.
TEXTS: dict[str, Callable[[str], bytes]] = {
    "a byte order mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "no newline at the end": lambda text: text.rstrip("\n").encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "big-endian UTF-16, CRLF": lambda text: (
        codecs.BOM_UTF16_BE + text.replace("\n", "\r\n").encode("utf-16-be")
    ),
    "mark, CRLF, no newline": lambda text: (
        codecs.BOM_UTF8 + text.replace("\n", "\r\n").rstrip().encode()
    ),
}

# Fields of a NIfTI-1 header by offset and form, with values that are found in files.
_FIELDS: tuple[tuple[int, str, tuple[float, ...]], ...] = (
    *((80 + 4 * i, "f", (0, -1.5, np.nan, np.inf, 1.5)) for i in range(3)),
    (76, "f", (0, 1, -1, 5)),
    (112, "f", (0, 1, np.nan, np.inf, 2)),
    (116, "f", (0, np.nan, np.inf, -1024)),
    (252, "h", (0, 1, 2, 99, -1)),
    (254, "h", (0, 1, 4, 77, -5)),
    (72, "h", (0, 8, 16)),
    (123, "B", (0, 2, 10)),
)


def run_entries(settings: Settings) -> Iterator[Tally]:
    """Each odd entry of a raw folder is named, and no volume is lost silently."""
    rng = settings.generator("entries")
    tally = Tally("odd entries in raw folders of three layouts: each named, no volume lost")
    makers = list(_MAKERS)
    for i in range(settings.tries(USUAL_FOLDERS)):
        layout = makers[i % len(makers)]
        raw = settings.folder(f"entries/{i}") / "raw"
        places = _MAKERS[layout](raw)
        odd = [_add_odd(places, rng) for _ in range(int(rng.integers(1, 4)))]
        status, errors = call_command(
            prepare, "--dataset", layout, "--raw_dir", raw, "--check", "--num_workers", 0
        )
        tally.add(*_judge_entries([path for path in odd if path], status, errors, layout, raw))
    yield tally


def _chd(raw: Path) -> list[Path]:
    raw.mkdir()
    for number in (1001, 1002):
        image, label = heart(number, _SIZE)
        save(raw / f"ct_{number}_image.nii.gz", image)
        save(raw / f"ct_{number}_label.nii.gz", label)
    return [raw]


def _acdc(raw: Path) -> list[Path]:
    write_acdc(raw, 1, num_frames=4, size=_SIZE)
    return [raw, raw / "patient001"]


def _nnunet(raw: Path) -> list[Path]:
    write_nnunet(raw, unlabelled=("case_003",), size=_SIZE)
    return [raw, raw / "imagesTr", raw / "labelsTr"]


_MAKERS: dict[str, Callable[[Path], list[Path]]] = {"chd": _chd, "acdc": _acdc, "nnunet": _nnunet}


def _add_odd(places: list[Path], rng: np.random.Generator) -> Path | None:
    """Makes an entry, or puts something else in the place of a scan; None if the name is taken."""
    place = places[int(rng.integers(len(places)))]
    kind = _KINDS[int(rng.integers(len(_KINDS)))]
    scans = sorted(place.glob("*.nii.gz"))
    if scans and kind != "copy" and rng.random() < 0.4:
        path = scans[int(rng.integers(len(scans)))]
        if path.is_dir() or path.is_symlink():
            return None
        path.unlink()
    else:
        names = _HARMLESS_NAMES if rng.random() < 0.15 else _ODD_NAMES
        path = place / names[int(rng.integers(len(names)))]
    if os.path.lexists(path):
        return None
    if kind == "copy":
        content = next((scan.read_bytes() for scan in scans if scan.is_file()), b"text")
        path.write_bytes(content)
    elif kind == "link to nothing":
        path.symlink_to("../.git/annex/objects/nothing")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
        if kind == "full folder":
            (path / path.name).write_bytes(b"")
    return path


def _judge_entries(
    odd: list[Path], status: int, errors: str, layout: str, raw: Path
) -> tuple[str, str]:
    if "Traceback" in errors or status not in (0, 2):
        return "unclear", f"{layout}: {odd}: status {status}, {errors[-300:]}"
    known = {path for source in _reader(layout, raw).find(raw)[0] for path in source.files}
    for path in odd:
        said = f"{path}:" in errors or f"{path}," in errors or path in known
        if not said and path.name not in _HARMLESS_NAMES:
            return "silent", f"{layout}: {path} is skipped silently"
        if said and path.name in _HARMLESS_NAMES:
            return "unclear", f"{layout}: {path} is harmless, but is named"
    return ("caught", "") if errors else ("harmless", "")


def _reader(layout: str, raw: Path) -> Reader:
    return open_nnunet(raw) if layout == "nnunet" else READERS[layout]


def run_texts(settings: Settings) -> Iterator[Tally]:
    """What text files say is the same from every system."""
    rng = settings.generator("texts")
    tally = Tally("Info.cfg, dataset.json and a run's JSON as other systems write them")
    folder = settings.folder("texts")
    acdc, nnunet = write_acdc(folder / "acdc", 1, size=_SIZE), write_nnunet(folder / "nnunet")
    fields = {"kind": "chd", "classes": ["background", "Herz ä"], "n": 1.5}
    write_checked(folder / "preparation.json", fields)
    readers: dict[Path, Callable[[], object]] = {
        acdc / "patient001" / "Info.cfg": lambda: READERS["acdc"].find(acdc),
        nnunet / "dataset.json": lambda: (open_nnunet(nnunet), open_nnunet(nnunet).find(nnunet)),
        folder / "preparation.json": lambda: read_checked(folder / "preparation.json"),
    }
    wanted = {path: read() for path, read in readers.items()}
    texts = {path: path.read_text() for path in readers}
    for _ in range(settings.tries(USUAL_TEXTS)):
        path = list(readers)[int(rng.integers(len(readers)))]
        name = list(TEXTS)[int(rng.integers(len(TEXTS)))]
        path.write_bytes(TEXTS[name](texts[path]))
        try:
            same = readers[path]() == wanted[path]
            tally.expect(same, f"{path.name} with {name} reads otherwise", otherwise="silent")
        except Exception as error:
            tally.add("unclear", f"{path.name} with {name}: {type(error).__name__}: {error}")
        path.write_text(texts[path])
    yield tally


def run_headers(settings: Settings) -> Iterator[Tally]:
    """A header out of the ordinary is a fault with the file's name, or is read by the standard."""
    rng = settings.generator("headers")
    tally = Tally("NIfTI headers: spacing, form codes, scaling, units; stored in any way")
    folder = settings.folder("headers")
    values = rng.integers(-900, 900, (6, 5, 4)).astype(np.int16)
    for i in range(settings.tries(USUAL_HEADERS)):
        changed = bytearray(_make_file(values, rng))
        for _ in range(int(rng.integers(1, 4))):
            offset, form, choices = _FIELDS[int(rng.integers(len(_FIELDS)))]
            value = choices[int(rng.integers(len(choices)))]
            struct.pack_into("<" + form, changed, offset, value)
        path = folder / f"{i}{('.nii', '.nii.gz')[int(rng.integers(2))]}"
        compressed = rng.random() < 0.5
        path.write_bytes(gzip.compress(bytes(changed)) if compressed else bytes(changed))
        tally.add(*_judge_header(path, bytes(changed), values))
    yield tally


def _make_file(values: np.ndarray, rng: np.random.Generator) -> bytes:
    """A sound file whose sform or qform defines its grid."""
    affine = np.diag([-1.5, -1.5, 5.0, 1.0])
    image = nib.Nifti1Image(values, affine)
    if rng.random() < 0.5:
        image.set_qform(affine, 1)
        image.set_sform(None, 0)
    return bytes(image.to_bytes())


def _judge_header(path: Path, content: bytes, values: np.ndarray) -> tuple[str, str]:
    try:
        found = read_nifti(path)
    except DatasetError as error:
        named = all(fault.path == path and fault.remedy for fault in error.faults)
        return ("caught", "") if named else ("unclear", str(error))
    except Exception as error:
        return "unclear", f"{path.name}: {type(error).__name__}: {error}"
    expected, affine = _by_the_standard(content, values)
    right = affine is not None and np.allclose(found.affine, affine, atol=1e-4)
    right = right and np.allclose(found.array, expected, rtol=1e-6)
    return ("harmless", "") if right else ("silent", f"{path.name}: {found.affine.tolist()}")


def _by_the_standard(content: bytes, values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Values and affine by the text of the NIfTI-1 standard; None for an undefined grid."""
    slope, intercept = struct.unpack_from("<ff", content, 112)
    scaled = np.isfinite(slope) and slope != 0
    expected = values * np.float64(slope) + intercept if scaled else values
    qform, sform = struct.unpack_from("<hh", content, 252)
    if not (0 <= qform <= 5 and 0 <= sform <= 5):
        return expected, None
    if sform > 0:
        rows = np.reshape(struct.unpack_from("<12f", content, 280), (3, 4))
        return expected, np.vstack([rows, [0, 0, 0, 1]])
    sign, *spacing = struct.unpack_from("<4f", content, 76)
    if not all(np.isfinite(mm) and mm != 0 for mm in spacing):
        return expected, None
    spacing = [abs(mm) for mm in spacing]
    if qform == 0:
        # The standard defines only the spacing; nibabel's x runs to the left, about the centre.
        affine = np.diag([-spacing[0], *spacing[1:], 1])
        affine[:3, 3] = -affine[:3, :3] @ (np.array(values.shape) - 1) / 2
        return expected, affine
    b, c, d, *origin = struct.unpack_from("<6f", content, 256)
    a = np.sqrt(max(0.0, 1 - (b * b + c * c + d * d)))
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * [spacing[0], spacing[1], spacing[2] * (-1 if sign == -1 else 1)]
    affine[:3, 3] = origin
    return expected, affine
