"""Verified reading of NRRD: `.nrrd`, or a header `.nhdr` and its file of values.

A header must give type, size, directions, origin and the space that they are in, and hold no field
that the format lacks: readers that take defaults for a misspelt one mirror or shrink the scan. The
values must fill the grid to the byte, and a compressed stream must match its checksum. Source: the
definition of NRRD, version 5.
"""

import bz2
import hashlib
import re
from pathlib import Path

import numpy as np

from data_prep.scan import (
    CORRECT,
    FETCH_AGAIN,
    Grid,
    Scan,
    as_array,
    check_affine,
    data_file,
    decompress,
    numbers,
    read_bytes,
    scan_error,
)

# The definition's names of the types.
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_TYPE_OF = {name: code for code, names in _TYPES.items() for name in names}
# Signs of x, y and z in NIfTI's millimetres.
_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
_ORDERS = {"little": "<", "big": ">"}
_PLAIN = ("space", "domain")  # kinds of axes
_NEEDED = ("type", "dimension", "sizes", "encoding", "space directions", "space origin")
_KNOWN = {
    *_NEEDED,
    *("space", "endian", "datafile", "byteskip", "lineskip", "kinds", "spaceunits", "centers"),
    *("blocksize", "content", "max", "min", "oldmax", "oldmin", "number", "sampleunits"),
    *("axismins", "axismaxs", "labels", "units", "spacings", "thicknesses", "measurementframe"),
    *("centerings", "spacedimension"),
}
_SAME = {_name.replace(" ", ""): _name for _name in _NEEDED}
_VECTOR = re.compile(r"\(([^()]*)\)")


def read_nrrd(path: Path) -> Scan:
    """Reads a `.nrrd` or `.nhdr` of three dimensions. Raises `DatasetError` with one fault."""
    stored = read_bytes(path)
    fields, header_bytes = _parse(path, stored)
    grid = _grid(path, fields)
    digest, content = hashlib.sha256(stored), stored[header_bytes:]
    if name := fields.get("datafile"):
        if content:
            raise scan_error(path, f"has {len(content)} bytes after its header", FETCH_AGAIN)
        content = read_bytes(data_file(path, "data file", name))
        digest.update(content)
    encoding = fields["encoding"].lower()
    if encoding in ("gzip", "gz"):
        content = decompress(path, content)
    elif encoding in ("bzip2", "bz2"):
        try:
            content = bz2.decompress(content)
        except (OSError, ValueError) as error:
            raise scan_error(path, f"its bzip2 stream is damaged ({error})", FETCH_AGAIN) from error
    elif encoding != "raw":
        raise scan_error(path, f"its encoding is {encoding!r}", "save it as raw or gzip")
    array = as_array(path, content, grid.dtype, grid.shape)
    return Scan(array, grid.affine, digest.hexdigest())


def nrrd_grid(path: Path) -> Grid:
    """The grid in a header. Raises `DatasetError` with one fault."""
    return _grid(path, _parse(path, read_bytes(path))[0])


def nrrd_files(path: Path) -> tuple[Path, ...]:
    """The file itself, and that of its values if they lie in another one."""
    name = _parse(path, read_bytes(path))[0].get("datafile")
    return (path, data_file(path, "data file", name)) if name else (path,)


def _parse(path: Path, content: bytes) -> tuple[dict[str, str], int]:
    """The fields of a header, its keys and comments left out, and its length in bytes."""
    if not re.match(rb"NRRD000[1-5]\r?\n", content):
        raise scan_error(path, "is not a NRRD file", "save it as NRRD again, or fetch it again")
    fields: dict[str, str] = {}
    place = content.index(b"\n") + 1
    while place < len(content):
        end = content.find(b"\n", place)
        end = len(content) if end < 0 else end
        line = content[place:end].decode("utf-8", "replace").rstrip("\r")
        place = end + 1
        if not line:
            break
        if line.startswith("#") or re.match(r"[^:]+:=", line):
            continue
        name, colon, value = line.partition(": ")
        plain = name.lower().replace(" ", "")
        name = _SAME.get(plain, plain)
        if not colon or name not in _KNOWN:
            found = f"its header has a line {line[:40]!r}, which is no field of NRRD"
            raise scan_error(path, found, f"{CORRECT}, or {FETCH_AGAIN}")
        if name in fields:
            raise scan_error(path, f"has two fields {name!r}", CORRECT)
        fields[name] = value.strip()
    return fields, place


def _grid(path: Path, fields: dict[str, str]) -> Grid:
    _check(path, fields)
    code = _TYPE_OF.get(fields["type"].lower())
    if code is None:
        found = f"its type is {fields['type']!r}"
        raise scan_error(path, found, "save it as integers or floats")
    order = _ORDERS.get(fields.get("endian", "little" if code[1] == "1" else "").lower())
    if order is None:
        found = f"its endian is {fields.get('endian')!r}"
        raise scan_error(path, found, f"{CORRECT}: little or big")
    sizes = numbers(path, "sizes", fields["sizes"], 3)
    if (sizes < 1).any() or (sizes != np.rint(sizes)).any():
        raise scan_error(path, f"its sizes are {fields['sizes']!r}", FETCH_AGAIN)
    affine = np.eye(4)
    affine[:3, :3] = _vectors(path, "space directions", fields, 3).T
    affine[:3, 3] = _vectors(path, "space origin", fields, 1)[0]
    if (np.linalg.norm(affine[:3, :3], axis=0) == 0).any():
        raise scan_error(path, "has a spacing of 0 (space directions)", CORRECT)
    affine = np.diag([*_SPACES[fields["space"].lower()], 1]) @ affine
    x, y, z = map(int, sizes)
    return Grid((x, y, z), check_affine(path, affine), np.dtype(order + code))


def _check(path: Path, fields: dict[str, str]) -> None:
    if fields.get("dimension", "3") != "3":
        layers = fields.get("kinds", "").startswith("list")
        remedy = "expected one 3-d volume; save each frame or channel as its own file"
        if layers:
            remedy = "its segments overlap in layers; save them as one layer"
        raise scan_error(path, f"has dimension {fields['dimension']}", remedy)
    if missing := [name for name in _NEEDED if name not in fields]:
        remedy = "save it with its orientation, spacing and origin, as 3D Slicer and ITK do"
        raise scan_error(path, f"has no {' and no '.join(missing)}", remedy)
    if (space := fields.get("space", "").lower()) not in _SPACES:
        remedy = f"{CORRECT}: expected one of {', '.join(n for n in _SPACES if '-' in n)}"
        raise scan_error(path, f"its space is {space!r}" if space else "has no space", remedy)
    if any(kind not in _PLAIN for kind in fields.get("kinds", "space").split()):
        found = f"its axes are {fields['kinds']!r}"
        raise scan_error(path, found, "expected one volume of three spatial axes")
    units = set(re.findall('"([^"]*)"', fields.get("spaceunits", "")))
    if units - {"mm", "millimeter", "millimeters", ""}:
        raise scan_error(path, f"its space units are {fields['spaceunits']}", "expected mm")
    for name in ("byteskip", "lineskip"):
        if fields.get(name, "0") != "0":
            raise scan_error(path, f"its {name} is {fields[name]}", "save it as a single file")


def _vectors(path: Path, field: str, fields: dict[str, str], count: int) -> np.ndarray:
    text = fields[field]
    inside = _VECTOR.findall(text)
    if len(inside) != count or _VECTOR.sub("", text).strip():
        found = f"its {field} is {text!r}"
        raise scan_error(path, found, f"{CORRECT}: expected {count} vectors")
    return np.array([numbers(path, field, vector.replace(",", " "), 3) for vector in inside])
