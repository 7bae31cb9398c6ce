"""Verified reading of MetaImage: `.mha`, or a header `.mhd` and its file of values.

A header must give type, size, spacing, offset and directions: the library that most tools use takes
defaults for what is missing, and so mirrors or shrinks a scan whose header has a typing error. The
values must fill the grid to the byte, and a compressed stream must match its checksum.
`AnatomicalOrientation` repeats the directions and is ignored, as ITK does. Source: MetaIO's
description of the format.
"""

import hashlib
import zlib
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
    from_lps,
    numbers,
    read_bytes,
    scan_error,
)

_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_DIRECTIONS = ("TransformMatrix", "Rotation", "Orientation")
_ORIGIN = ("Offset", "Position", "Origin")
_SPACING = ("ElementSpacing", "ElementSize")
_BYTE_ORDER = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_VALUES = "ElementDataFile"
_HERE = "local"  # instead of a file's name
_ONLY = {  # values that change how the rest is read
    "ObjectType": ("Image",),
    "NDims": ("3",),
    "BinaryData": ("True",),
    "ElementNumberOfChannels": ("1",),
    "HeaderSize": ("0",),
    "ElementToIntensityFunctionSlope": ("1",),
    "ElementToIntensityFunctionOffset": ("0",),
    "DistanceUnits": ("mm", "?"),
}


def read_metaimage(path: Path) -> Scan:
    """Reads a `.mha` or `.mhd` of three dimensions. Raises `DatasetError` with one fault."""
    stored = read_bytes(path)
    fields, header_bytes = _parse(path, stored)
    grid = _grid(path, fields)
    digest = hashlib.sha256(stored)
    content = stored[header_bytes:]
    if fields[_VALUES].lower() != _HERE:
        values = data_file(path, _VALUES, fields[_VALUES])
        if content:
            raise scan_error(path, f"has {len(content)} bytes after its header", FETCH_AGAIN)
        content = read_bytes(values)
        digest.update(content)
    if _flag(path, fields, "CompressedData"):
        content = _inflate(path, fields, content, grid)
    array = as_array(path, content, grid.dtype, grid.shape)
    return Scan(array, grid.affine, digest.hexdigest())


def metaimage_grid(path: Path) -> Grid:
    """The grid in a header. Raises `DatasetError` with one fault."""
    return _grid(path, _parse(path, read_bytes(path))[0])


def metaimage_files(path: Path) -> tuple[Path, ...]:
    """The file itself, and that of its values if they lie in another one."""
    name = _parse(path, read_bytes(path))[0][_VALUES]
    return (path,) if name.lower() == _HERE else (path, data_file(path, _VALUES, name))


def _parse(path: Path, content: bytes) -> tuple[dict[str, str], int]:
    """The fields of a header, and its length in bytes."""
    fields: dict[str, str] = {}
    place = 0
    while _VALUES not in fields:
        end = content.find(b"\n", place)
        end = len(content) if end < 0 else end
        name, equals, value = content[place:end].decode("utf-8", "replace").partition("=")
        name = name.strip()
        if not equals or not name or not name.isprintable() or place >= len(content):
            found = "is not a MetaImage file" if not fields else "its header breaks off"
            raise scan_error(path, f"{found} (before {_VALUES})", FETCH_AGAIN)
        if name in fields:
            raise scan_error(path, f"has two fields {name}", CORRECT)
        fields[name] = value.strip()
        place = end + 1
    return fields, place


def _grid(path: Path, fields: dict[str, str]) -> Grid:
    for name, known in _ONLY.items():
        required = name in ("NDims", "ObjectType", "BinaryData")
        if fields.get(name, "" if required else known[0]) not in known:
            found = f"{name} {fields[name]!r}" if name in fields else f"no {name}"
            remedy = "expected one 3-d volume of plain binary values in mm"
            raise scan_error(path, f"has {found}", remedy)
    kind = fields.get("ElementType", "")
    if kind not in _TYPES:
        found = f"its ElementType is {kind!r}"
        raise scan_error(path, found, "save it as integers or floats of one channel")
    order = ">" if _flag(path, fields, *_BYTE_ORDER) else "<"
    sizes = numbers(path, "DimSize", fields.get("DimSize", ""), 3)
    spacing = numbers(path, _SPACING[0], _first(fields, _SPACING), 3)
    directions = numbers(path, _DIRECTIONS[0], _first(fields, _DIRECTIONS), 9).reshape(3, 3)
    if (sizes < 1).any() or (sizes != np.rint(sizes)).any():
        raise scan_error(path, f"its DimSize is {fields['DimSize']!r}", FETCH_AGAIN)
    if (spacing <= 0).any():
        raise scan_error(path, f"its spacing is {_first(fields, _SPACING)} mm", CORRECT)
    if not np.allclose(directions @ directions.T, np.eye(3), atol=1e-3):
        found = "its directions (TransformMatrix) are not perpendicular unit vectors"
        raise scan_error(path, found, CORRECT)
    affine = np.eye(4)
    affine[:3, :3] = directions.T * spacing  # the file lists one axis after the other
    affine[:3, 3] = numbers(path, _ORIGIN[0], _first(fields, _ORIGIN), 3)
    x, y, z = map(int, sizes)
    return Grid((x, y, z), check_affine(path, from_lps(affine)), np.dtype(order + _TYPES[kind]))


def _first(fields: dict[str, str], names: tuple[str, ...]) -> str:
    """The value of a field that has several names; empty where none is there."""
    return next((fields[name] for name in names if name in fields), "")


def _flag(path: Path, fields: dict[str, str], *names: str) -> bool:
    """A field of True or False; it must be there except on values that are not compressed."""
    value = _first(fields, names) or ("False" if names == ("CompressedData",) else "")
    if value not in ("True", "False"):
        raise scan_error(path, f"its {names[0]} is {value!r}", f"{CORRECT}: True or False")
    return value == "True"


def _inflate(path: Path, fields: dict[str, str], content: bytes, grid: Grid) -> bytes:
    """Decompresses the values, zlib or gzip, to no more than the grid holds and a byte."""
    said = fields.get("CompressedDataSize", str(len(content)))
    if said != str(len(content)):
        found = f"holds {len(content)} compressed bytes; its header says {said}"
        raise scan_error(path, found, FETCH_AGAIN)
    size = int(np.prod(grid.shape, dtype=object)) * grid.dtype.itemsize
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        values = stream.decompress(content, size + 1)
    except zlib.error as error:
        raise scan_error(path, f"its zlib stream is damaged ({error})", FETCH_AGAIN) from error
    if len(values) <= size and (not stream.eof or stream.unused_data):
        what = "followed by other bytes" if stream.eof else "truncated"
        raise scan_error(path, f"its zlib stream is {what}", FETCH_AGAIN)
    return values
