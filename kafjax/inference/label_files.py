"""Writes labels, and probabilities, on a scan's grid, in the format that the file's name gives.

    .nii.gz .nii    NIfTI
    .nrrd           NRRD; `.seg.nrrd` also has names and colours, as a segmentation of 3D Slicer
    .mha            MetaImage
    .dcm            DICOM segmentations, one segment for each class, which refer to their series

Nothing of the scan's header but the grid is copied: no name, date or free text, no window of
intensities, intent or extension. With `keep_header` a NIfTI file keeps its scan's header, and DICOM
segmentations keep patient and study. Without it these are empty; the UIDs of study, series and
slices stay, without which no viewer finds the scan. Files hold no time, except those of DICOM, and
so the same labels give the same bytes.

Arrays are in the axis order of the scan. Names are those of classes 1, 2, ...; in DICOM these are
the segments' numbers, and in the other formats each class has the number of the dataset's labels.
"""

import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

import kafjax
from data_prep import dicom
from data_prep.formats import is_series
from data_prep.nifti import open_header
from data_prep.scan import Grid, from_lps, scan_error
from kafjax.drawing.overlay import class_colours
from kafjax.errors import import_extra
from kafjax.files import replacing, write_text

OUTPUT_ENDINGS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".dcm")
# Level 1 takes a third of the time of the default and hardly more space.
_DEFLATE_LEVEL = 1
_NRRD_TYPES = {"uint8": "uint8", "uint16": "uint16", "uint32": "uint32"}
_META_TYPES = {"uint8": "MET_UCHAR", "uint16": "MET_USHORT", "uint32": "MET_UINT"}
# All that a segmentation needs of its source's slices, and the empty values of the rest.
_KEPT_OF_SLICES = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality"),
    *("FrameOfReferenceUID", "Rows", "Columns", "PixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient", "SliceThickness", "InstanceNumber"),
    *("SpacingBetweenSlices", "ImageType"),
)
_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"),
    *("StudyID", "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator"),
)
_SERIES_NUMBER = 1000  # seldom a scanner's


@dataclass(frozen=True)
class Classes:
    """Names of the classes 1, 2, ..., and the numbers that label files have for them."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]

    @property
    def colours(self) -> list[list[int]]:
        """RGB, 0 to 255."""
        return class_colours(len(self.names) + 1)[1:].tolist()


def write_labels(
    path: Path,
    array: np.ndarray,
    *,
    scan: Path,
    grid: Grid,
    classes: Classes,
    keep_header: bool = False,
) -> None:
    """Writes a file of labels atomically; its folder is created.

    Args:
      path: ends in one of `OUTPUT_ENDINGS`.
      array: unsigned labels on the scan's grid, with its axes.
      scan: the file or series that the labels are of.
      grid: of the scan.
      classes: of the labels.
      keep_header: see the module.

    Raises:
      DatasetError: a format that cannot hold this grid, or segmentations of a scan that is no
        DICOM series.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".dcm"):
        content = _segmentation(array, scan, classes, keep_header=keep_header)
    elif path.name.endswith(".nrrd"):
        segments = _segments(classes, array) if path.name.endswith(".seg.nrrd") else {}
        content = _nrrd(array, grid.affine, segments)
    elif path.name.endswith(".mha"):
        content = _metaimage(array, scan, grid.affine)
    else:
        write_like(path, array, _header_for(scan, grid, keep_header=keep_header))
        return
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_probabilities(
    path: Path, array: np.ndarray, *, scan: Path, grid: Grid, keep_header: bool = False
) -> None:
    """Writes [x, y, z, d], float32, as NIfTI; see `write_labels`."""
    write_like(path, array, _header_for(scan, grid, keep_header=keep_header))


def write_descriptions(path: Path, classes: Classes) -> None:
    """Writes the classes as label descriptions that ITK-SNAP opens."""
    lines = ["# ITK-SnAP Label Description File", "# IDX R G B opacity visible mesh label"]
    lines.append('0 0 0 0 0 0 0 "Clear Label"')
    for number, colour, name in zip(classes.numbers, classes.colours, classes.names, strict=True):
        plain = name.replace('"', "'")
        lines.append(f'{number} {" ".join(map(str, colour))} 1 1 1 "{plain}"')
    write_text(path, "\n".join(lines) + "\n")


def write_like(path: Path, array: np.ndarray, like: Any) -> None:
    """Writes a NIfTI file atomically, with an image's header except type and scaling.

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


def _header_for(scan: Path, grid: Grid, *, keep_header: bool) -> Any:
    """An image whose header has a scan's grid, and nothing else of it unless asked to."""
    empty = np.broadcast_to(np.uint8(0), grid.shape)
    if not scan.name.lower().endswith((".nii", ".nii.gz")):
        made = nib.Nifti1Image(empty, grid.affine)
        made.header.set_xyzt_units("mm")
        made.set_sform(grid.affine, "scanner")
        return made
    source = open_header(scan)
    if keep_header:
        return source
    kind = type(source)
    header = kind.header_class(endianness=source.header.endianness)
    header.set_data_shape(grid.shape)
    header["pixdim"][:4] = source.header["pixdim"][:4]
    axes = [f"srow_{axis}" for axis in "xyz"] + [f"qoffset_{axis}" for axis in "xyz"]
    for field in ("sform_code", "qform_code", "quatern_b", "quatern_c", "quatern_d", *axes):
        header[field] = source.header[field]
    header.set_xyzt_units(source.header.get_xyzt_units()[0])
    return kind(empty, source.affine, header)


def _nrrd(array: np.ndarray, affine: np.ndarray, keys: Mapping[str, str]) -> bytes:
    lps = from_lps(affine)
    fields = {
        "type": _NRRD_TYPES[array.dtype.name],
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, array.shape)),
        "space directions": " ".join(_vector(lps[:3, axis]) for axis in range(3)),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "gzip",
        "space origin": _vector(lps[:3, 3]),
    }
    lines = ["NRRD0004", *(f"{name}: {value}" for name, value in fields.items())]
    lines += [f"{name}:={value}" for name, value in keys.items()]
    values = gzip.compress(_raw(array), _DEFLATE_LEVEL, mtime=0)
    return ("\n".join(lines) + "\n\n").encode() + values


def _segments(classes: Classes, array: np.ndarray) -> dict[str, str]:
    """3D Slicer's keys of a segmentation, all in one layer."""
    keys = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",  # until Slicer 5.2
        "Segmentation_SourceRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    extent = " ".join(f"0 {edge - 1}" for edge in array.shape)
    for i, (name, number, colour) in enumerate(
        zip(classes.names, classes.numbers, classes.colours, strict=True)
    ):
        keys |= {
            f"Segment{i}_ID": f"Segment_{i + 1}",
            f"Segment{i}_Name": " ".join(name.split()),
            f"Segment{i}_NameAutoGenerated": "0",
            f"Segment{i}_Color": " ".join(f"{channel / 255:.6g}" for channel in colour),
            f"Segment{i}_ColorAutoGenerated": "0",
            f"Segment{i}_LabelValue": str(number),
            f"Segment{i}_Layer": "0",
            f"Segment{i}_Extent": extent,
            f"Segment{i}_Tags": "",
        }
    return keys


def _metaimage(array: np.ndarray, scan: Path, affine: np.ndarray) -> bytes:
    lps = from_lps(affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / spacing
    if not np.allclose(directions.T @ directions, np.eye(3), atol=1e-4):
        remedy = "give an output of .nii.gz, .nrrd or .dcm"
        raise scan_error(scan, "its axes are not perpendicular, as .mha needs them", remedy)
    values = zlib.compress(_raw(array), _DEFLATE_LEVEL)
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "True",
        "CompressedDataSize": str(len(values)),
        "TransformMatrix": _list(directions.T.ravel()),
        "Offset": _list(lps[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": _list(spacing),
        "DimSize": " ".join(map(str, array.shape)),
        "ElementType": _META_TYPES[array.dtype.name],
        "ElementDataFile": "LOCAL",
    }
    header = "".join(f"{name} = {value}\n" for name, value in fields.items())
    return header.encode() + values


def _raw(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes("F")


def _vector(numbers: Sequence[float] | np.ndarray) -> str:
    return "(" + ",".join(repr(float(x) + 0.0) for x in numbers) + ")"


def _list(numbers: Sequence[float] | np.ndarray) -> str:
    return " ".join(repr(float(x) + 0.0) for x in numbers)


def _segmentation(array: np.ndarray, scan: Path, classes: Classes, *, keep_header: bool) -> bytes:
    """DICOM segmentations of a series, with a segment for each class."""
    if not is_series(scan):
        remedy = "give an output of .nii.gz, .seg.nrrd or .mha"
        raise scan_error(scan, "is no DICOM series, which .dcm refers to", remedy)
    hd, pydicom = import_extra("highdicom"), import_extra("pydicom")
    files = dicom.sorted_files(scan)
    numbers = np.searchsorted([0, *classes.numbers], array).astype(np.uint8)
    stream = io.BytesIO()
    try:
        with dicom.without_remarks():
            slices = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
            hd.seg.Segmentation(
                source_images=slices if keep_header else list(map(_anonymous, slices)),
                pixel_array=np.ascontiguousarray(np.transpose(numbers, (2, 1, 0))),
                segmentation_type="BINARY",
                segment_descriptions=_segment_descriptions(classes),
                series_instance_uid=hd.UID(),
                series_number=_SERIES_NUMBER,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer="kafjax",
                manufacturer_model_name="kafjax",
                software_versions=kafjax.__version__,
                device_serial_number="0",
                content_label="SEGMENTATION",
            ).save_as(stream)
    except (AttributeError, KeyError, TypeError, ValueError, NotImplementedError) as error:
        found = f"its slices lack what segmentations refer to ({type(error).__name__})"
        raise scan_error(scan, found, "give an output of .nii.gz or .seg.nrrd") from error
    return stream.getvalue()


def _segment_descriptions(classes: Classes) -> list[Any]:
    hd = import_extra("highdicom")
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name="kafjax", version=kafjax.__version__, family=codes.cid7162.ArtificialIntelligence
    )
    return [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],  # no longer in DICOM
            # What a class is, beyond its name, is not known.
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            display_color=hd.color.CIELabColor.from_rgb(*colour),
        )
        for number, (name, colour) in enumerate(
            zip(classes.names, classes.colours, strict=True), start=1
        )
    ]


def _anonymous(header: Any) -> Any:
    """What a segmentation refers to in a slice; patient and study are empty."""
    pydicom = import_extra("pydicom")
    kept = pydicom.Dataset()
    kept.file_meta = header.file_meta
    for name in _KEPT_OF_SLICES:
        if name in header:
            kept[name] = header[name]
    for name in _EMPTY:
        setattr(kept, name, "")
    return kept
