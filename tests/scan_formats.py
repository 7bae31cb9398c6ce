"""Writes one volume in every format, by other libraries than kafjax reads it with where possible.

Arrays are [i, j, k] with an affine to NIfTI's millimetres, as nibabel has them. The volume is
asymmetric: no permutation or flip of its axes leaves it as it is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SIZE = (8, 9, 5)
SPACING = (1.5, 1.75, 4.0)  # mm
PATIENT = "Zaphod^Beeblebrox"
PRIVATE = (PATIENT, "19520311", "20240229", "WARD SEVEN", "secret remark")
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def phantom(size: tuple[int, int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An int16 image of noise, brighter along each axis, and labels 0 to 2 of three blocks."""
    rng = np.random.default_rng(0)
    i, j, k = np.indices(size)
    image = (rng.integers(-900, 900, size) + 40 * i + 15 * j + 7 * k).astype(np.int16)
    labels = np.zeros(size, np.uint8)
    labels[:3, 1:5, 1:3] = 1
    labels[4:7, 5:, 2:] = 2
    return image, labels


def affine_of(directions: np.ndarray | None = None) -> np.ndarray:
    """The phantom's affine; the columns of `directions` are its axes' unit vectors."""
    affine = np.eye(4)
    affine[:3, :3] = (np.diag([-1, -1, 1]) if directions is None else directions) * SPACING
    affine[:3, 3] = (12, -7, 30)
    return affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def write_itk(path: Path, array: np.ndarray, affine: np.ndarray, *, compress: bool = True) -> Path:
    """NRRD or MetaImage, by SimpleITK."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    SimpleITK.WriteImage(image, str(path), compress)
    return path


def write_dicom(
    folder: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    scaling: Sequence[tuple[float, float]] = ((1, -1024),),
    number: int = 3,
    order: Sequence[int] | None = None,
    change: Callable[[Any, int], None] = lambda header, k: None,
    **elements: Any,
) -> Path:
    """A CT series, a file for each index of the last axis.

    Args:
      folder: created.
      array: values after scaling.
      affine: of the array.
      scaling: slope and intercept of each slice in turn.
      number: of the series.
      order: numbers the slices in their files' names.
      change: of a slice's dataset before it is written, with its index.
      **elements: of all slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    across, down = lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]
    study, series, frame = (generate_uid(entropy_srcs=[str(folder), str(number), s]) for s in "abc")
    for k in range(array.shape[2]):
        slope, intercept = scaling[k % len(scaling)]
        stored = np.rint((array[:, :, k].T - float(intercept)) / slope)
        header = pydicom.Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.file_meta.MediaStorageSOPClassUID = CTImageStorage
        identity = generate_uid(entropy_srcs=[str(folder), str(number), str(k)])
        header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = identity
        header.SOPClassUID = CTImageStorage
        header.Modality = "CT"
        header.PatientName, header.PatientID = PATIENT, "4242"
        header.PatientBirthDate, header.PatientSex = "19520311", "M"
        header.StudyDate = header.SeriesDate = header.ContentDate = "20240229"
        header.StudyTime = "101112"
        header.StudyID, header.AccessionNumber, header.ReferringPhysicianName = "1", "", ""
        header.StudyDescription, header.SeriesDescription = "WARD SEVEN", "secret remark"
        header.StudyInstanceUID, header.SeriesInstanceUID = study, series
        header.FrameOfReferenceUID, header.PositionReferenceIndicator = frame, ""
        header.SeriesNumber, header.InstanceNumber = number, k + 1
        header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.ImageOrientationPatient = [*map(_text, across), *map(_text, down)]
        header.ImagePositionPatient = list(map(_text, lps[:3, 3] + k * lps[:3, 2]))
        header.PixelSpacing = [_text(spacing[1]), _text(spacing[0])]
        header.SliceThickness = _text(spacing[2])
        header.Rows, header.Columns = stored.shape
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        signed = bool(stored.min() < 0)
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelRepresentation = int(signed)
        header.RescaleSlope, header.RescaleIntercept = _text(slope), _text(intercept)
        header.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()
        for name, value in elements.items():
            setattr(header, name, value)
        change(header, k)
        name = f"IM{(k if order is None else order[k]):04d}.dcm"
        header.save_as(folder / name, enforce_file_format=True)
    return folder


def _text(number: float) -> str:
    return f"{number:.10g}"
