"""Headers: what nibabel would mend in silence is a fault by name, and what is sound is silent."""

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.faults import DatasetError
from data_prep.nifti import count_frames, open_header, read_nifti

AFFINE = np.diag([-1.5, -1.7, 5.0, 1.0])
VALUES = np.random.default_rng(0).integers(-900, 900, (6, 5, 4)).astype(np.int16)
# Offsets in a NIfTI-1 header, by the standard.
PIXDIM, SLOPE, QFORM, SFORM, MAGIC = 76, 112, 252, 254, 344


def write(path: Path, kind: type = nib.Nifti1Image, *, qform: bool = False) -> Path:
    image = kind(VALUES, AFFINE)
    if qform:
        image.set_qform(AFFINE, 1)
        image.set_sform(None, 0)
    nib.save(image, path)
    return path


def patch(path: Path, offset: int, form: str, *values: float | bytes) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<" + form, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            [(PIXDIM + 4, "fff", 0, 0, 0), (SFORM, "h", 0)],
            r"no spacing \(pixdim 0, 0, 0, and no sf",
        ),
        ([(PIXDIM + 12, "f", 0), (SFORM, "h", 0)], r"has no spacing \(pixdim 1.5, 1.7, 0,"),
        ([(PIXDIM + 4, "f", np.nan), (SFORM, "h", 0)], "has no spacing"),
        ([(PIXDIM + 4, "f", 0), (QFORM, "hh", 1, 0)], "has no spacing"),
        ([(SFORM, "h", 17)], "its sform_code is 17; correct the header: expected 0 to 5"),
        ([(QFORM, "h", -3)], "its qform_code is -3"),
        ([(SLOPE, "ff", 1, np.nan)], r"intercept \(scl_inter\) is nan, though its slope is 1"),
        ([(SLOPE, "ff", 2, -np.inf)], r"intercept \(scl_inter\) is -inf"),
        ([(SLOPE, "ff", np.inf, 0)], r"slope \(scl_slope\) is inf"),
        ([(MAGIC, "4s", b"ni1\0")], "header of a pair of files"),
        ([(MAGIC, "4s", b"\0\0\0\0")], "is not NIfTI"),
        ([(0, "i", 500)], "neither 348 nor 540"),
        ([(70, "h", 9999)], "is not a NIfTI file"),
    ],
)
def test_a_fault_of_the_header_names_the_file(
    changes: list, found: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.nii.gz")
    for change in changes:
        patch(path, *change)
    for read in (read_nifti, open_header):
        with pytest.raises(DatasetError, match=found) as error:
            read(path)
        assert error.value.faults[0].path == path
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [
        (PIXDIM + 4, "f", -1.5),  # the sform holds
        (PIXDIM + 4, "fff", 0, 0, 0),
        (PIXDIM, "f", 0.0),
        (SLOPE, "ff", np.nan, np.nan),
        (SLOPE, "ff", 0, 7),
        (72, "h", 8),  # bitpix
    ],
)
def test_what_changes_neither_grid_nor_values_is_silent(
    change: tuple, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.nii.gz")
    patch(path, *change)
    found = read_nifti(path)
    np.testing.assert_array_equal(found.array, VALUES)
    np.testing.assert_allclose(found.affine, AFFINE)
    assert capfd.readouterr() == ("", "")


def test_a_negative_spacing_of_a_qform_is_its_amount(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.nii.gz", qform=True)
    patch(path, PIXDIM + 4, "f", -1.5)
    np.testing.assert_allclose(read_nifti(path).affine, AFFINE, atol=1e-6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("endianness", "<>")
def test_content_and_not_the_name_says_how_a_file_is_stored(
    kind: type,
    name: str,
    compressed: bool,
    endianness: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    header = kind.header_class(endianness=endianness)  # type: ignore[attr-defined]
    header.set_data_dtype(VALUES.dtype.newbyteorder(endianness))
    content = kind(VALUES, AFFINE, header).to_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if compressed else content)
    found, header = read_nifti(path), open_header(path)
    np.testing.assert_array_equal(found.array, VALUES)
    for affine in (found.affine, header.affine):
        np.testing.assert_allclose(affine, AFFINE, atol=1e-6)
    assert header.shape == VALUES.shape
    assert capfd.readouterr() == ("", "")


def test_frames_are_counted_in_a_file_that_is_not_as_its_name_says(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(nib.Nifti1Image(np.stack([VALUES] * 3, -1), AFFINE).to_bytes())
    assert count_frames(path) == 3
