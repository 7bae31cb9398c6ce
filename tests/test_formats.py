"""One volume is the same whatever its format, axis order and slice order; faults have a line."""

import itertools
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from nibabel import orientations
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from data_prep.builder import Options
from data_prep.dicom import _find_series, find_series
from data_prep.faults import DatasetError
from data_prep.folder import open_folder
from data_prep.formats import digest, open_grid, read_labels, read_scan
from data_prep.nifti import to_slices
from data_prep.prepare import prepare_dataset
from kafjax.errors import UserError
from tests.scan_formats import (
    SIZE,
    affine_of,
    phantom,
    write_dicom,
    write_itk,
    write_nifti,
)

ORIENTATIONS = [
    np.array([*zip(axes, flips, strict=True)], float)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
OBLIQUE = np.linalg.qr(np.array([[9.0, 1, 2], [-1, 8, 1], [1, 2, 9]]))[0]


def turned(array: np.ndarray, turn: np.ndarray, affine: np.ndarray) -> tuple[Any, np.ndarray]:
    """The same volume with its axes in another order and direction."""
    new = affine @ orientations.inv_ornt_aff(turn, array.shape)
    return np.ascontiguousarray(orientations.apply_orientation(array, turn)), new


def write_all(folder: Path, array: np.ndarray, affine: np.ndarray) -> dict[str, Path]:
    """A file or folder of each format, all with the name `a`, in folders of the formats' names."""
    for name in ("nifti", "nrrd", "mha", "dicom"):
        (folder / name).mkdir(parents=True)
    order = np.random.default_rng(1).permutation(array.shape[2]).tolist()
    return {
        "nifti": write_nifti(folder / "nifti" / "a.nii.gz", array, affine),
        "nrrd": write_itk(folder / "nrrd" / "a.nrrd", array, affine),
        "mha": write_itk(folder / "mha" / "a.mha", array, affine),
        "dicom": write_dicom(folder / "dicom" / "a", array, affine, order=order),
    }


def write_pairs(folder: Path, array: np.ndarray, affine: np.ndarray) -> dict[str, Path]:
    """Headers with a file of values each."""
    return {
        name: write_itk(folder / name, array, affine, compress=name.startswith("a"))
        for name in ("a.nhdr", "b.nhdr", "a.mhd", "b.mhd")
    }


def fault_of(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read_scan(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path.parent)) and ";" in line for line in lines)
    return "\n".join(lines)


def fault_with(path: Path, old: bytes, new: bytes) -> str:
    """The fault of a file in which some bytes, which it has, are replaced."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return fault_of(path)


@pytest.mark.parametrize("turn", range(len(ORIENTATIONS)))
def test_a_volume_is_the_same_in_each_format_and_orientation(turn: int, tmp_path: Path) -> None:
    image, _ = phantom()
    expected, expected_affine = to_slices(image, affine_of())
    stored, affine = turned(image, ORIENTATIONS[turn], affine_of())
    for format, path in write_all(tmp_path / "all", stored, affine).items():
        scan = read_scan(path)
        found, found_affine = to_slices(scan.array, scan.affine)
        assert found.dtype == np.int16, format
        np.testing.assert_array_equal(found, expected, format)
        np.testing.assert_allclose(found_affine, expected_affine, atol=1e-6, err_msg=format)
        grid = open_grid(path)
        assert grid.shape == scan.array.shape
        np.testing.assert_array_equal(grid.affine, scan.affine)
        assert digest(path) == scan.sha256


def test_records_are_the_same_to_the_byte(tmp_path: Path) -> None:
    image, labels = phantom((32, 28, 5))
    shards = {}
    for turn in (ORIENTATIONS[0], ORIENTATIONS[29]):
        there = tmp_path / str(turn[0])
        images = write_all(there, *turned(image, turn, affine_of()))
        (there / "labels").mkdir()
        write_itk(there / "labels" / "a.mha", *turned(labels, ORIENTATIONS[5], affine_of()))
        for format, path in images.items():
            prepare = partial(
                prepare_dataset,
                open_folder(path.parent, there / "labels"),
                path.parent,
                there / "data" / format,
                name="own",
                options=Options(max_keypoints=16),
                num_workers=0,
            )
            (shard,) = prepare().directory.glob("*.tfrecord*")
            shards[format, str(turn)] = shard.read_bytes()
            assert prepare().already_prepared
    assert len(shards) == 8 and len(set(shards.values())) == 1


def test_affines_are_those_of_simpleitk_and_nibabel(tmp_path: Path) -> None:
    """In oblique directions too; ITK's point of a voxel is x to the left, y to the back."""
    image, _ = phantom()
    files = write_all(tmp_path, image, affine_of(OBLIQUE))
    files |= write_pairs(tmp_path, image, affine_of(OBLIQUE))
    for format, path in files.items():
        scan = read_scan(path)
        np.testing.assert_allclose(
            np.abs(np.linalg.det(scan.affine[:3, :3])), 1.5 * 1.75 * 4, rtol=1e-5
        )
        if format == "dicom":
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
            there = reader.Execute()
        else:
            there = SimpleITK.ReadImage(str(path))
        for voxel in ((0, 0, 0), (7, 0, 0), (0, 8, 1), (3, 2, 4)):
            x, y, z = there.TransformIndexToPhysicalPoint(voxel)
            found = scan.affine @ [*voxel, 1]
            np.testing.assert_allclose(found[:3], [-x, -y, z], atol=1e-4, err_msg=format)
            assert scan.array[voxel] == there[voxel], format


def test_types_and_byte_orders_are_read_as_simpleitk_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8"):
        array = rng.integers(0, 100, SIZE).astype(dtype)
        for name in ("a.nrrd", "a.mha", "b.nhdr", "b.mhd"):
            path = write_itk(tmp_path / name, array, affine_of(), compress=name[0] == "a")
            found = read_scan(path).array
            np.testing.assert_array_equal(found, array)
            assert found.dtype == (np.float32 if dtype[0] == "f" else array.dtype)
    big = tmp_path / "big.nrrd"
    write_itk(tmp_path / "b.nhdr", phantom()[0], affine_of(), compress=False)
    header = (tmp_path / "b.nhdr").read_bytes().replace(b"little", b"big")
    header = b"\n".join(line for line in header.splitlines() if b"data file" not in line)
    big.write_bytes(header + b"\n\n" + phantom()[0].astype(">i2").tobytes("F"))
    np.testing.assert_array_equal(read_scan(big).array, phantom()[0])


@pytest.mark.parametrize("syntax", ["jpeg", "JPEG2000", "JPEGLS", "rle", "big", "deflated"])
def test_compressed_series_have_the_same_values(syntax: str, tmp_path: Path) -> None:
    image, _ = phantom()
    folder = write_dicom(tmp_path / "d", image, affine_of())
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        if syntax in ("jpeg", "JPEG2000", "JPEGLS"):
            _transcode(path, header, syntax)
        elif syntax == "rle":
            header.compress(RLELossless)
            header.save_as(path)
        else:
            if syntax == "big":
                header.PixelData = header.pixel_array.astype(">u2").tobytes()
                header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
            else:
                header.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
            pydicom.dcmwrite(path, header, enforce_file_format=True)
    np.testing.assert_array_equal(read_scan(folder).array, image)


def _transcode(path: Path, header: Any, syntax: str) -> None:
    """Takes a codec of ITK's writer into the original file, whose other elements stay."""
    if syntax == "JPEGLS":
        header.compress(JPEGLSLossless)
        header.save_as(path)
        return
    image = SimpleITK.GetImageFromArray(header.pixel_array[None])
    writer = SimpleITK.ImageFileWriter()
    writer.SetFileName(str(path.with_suffix(".tmp.dcm")))
    writer.UseCompressionOn()
    writer.SetCompressor(syntax.upper())
    writer.Execute(image)
    made = pydicom.dcmread(writer.GetFileName())
    assert made.file_meta.TransferSyntaxUID.is_compressed
    assert (syntax == "JPEG2000") == (made.file_meta.TransferSyntaxUID == JPEG2000Lossless)
    header.file_meta.TransferSyntaxUID = made.file_meta.TransferSyntaxUID
    header["PixelData"] = made["PixelData"]
    header.save_as(path)
    Path(writer.GetFileName()).unlink()


def test_each_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    image = np.arange(np.prod(SIZE)).reshape(SIZE).astype(np.float64) * 0.5
    scaling = [(0.5, 0), (0.25, -3), (0.5, -7), (1 / 8, -1), (0.5, 0)]
    folder = write_dicom(tmp_path / "d", image, affine_of(), scaling=scaling, Modality="PT")
    np.testing.assert_allclose(read_scan(folder).array, image)
    assert not find_series(folder)[1]
    odd = write_dicom(tmp_path / "ct", image, affine_of(), scaling=scaling)
    np.testing.assert_allclose(read_scan(odd).array, image)
    assert {fault.path.name for fault in find_series(odd)[1]} == {
        "IM0001.dcm",
        "IM0002.dcm",
        "IM0003.dcm",
    }


def test_a_tilted_gantry_shears_the_affine_and_moves_no_value(tmp_path: Path) -> None:
    image, _ = phantom()
    affine = affine_of()
    affine[:3, 2] += (0, 1.25, 0)
    scan = read_scan(write_dicom(tmp_path / "d", image, affine))
    np.testing.assert_array_equal(scan.array, image)
    np.testing.assert_allclose(scan.affine, affine, atol=1e-9)


def test_series_of_a_folder_are_told_apart(tmp_path: Path) -> None:
    image, _ = phantom()
    folder = write_dicom(tmp_path / "in" / "anna", image, affine_of(), number=3)
    (source,), _ = open_folder(folder.parent).find(folder.parent)
    assert source.id == "anna"
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"x{i}")  # names without ending, mixed with those of the second series
    write_dicom(folder, image + 1, affine_of(), number=5)
    write_dicom(folder, image[:, :, :1], affine_of(OBLIQUE), number=1, order=[99])
    (folder / "DICOMDIR").write_text("not read")
    sources, faults = open_folder(folder.parent).find(folder.parent)
    assert {source.id: source.image.name for source in sources} == {
        "anna_3": "x0",
        "anna_5": "IM0000.dcm",
    }
    assert {fault.path.name: fault.stops for fault in faults} == {
        "IM0099.dcm": False,
        "DICOMDIR": False,
    }
    np.testing.assert_array_equal(read_scan(folder / "x3").array, image)
    np.testing.assert_array_equal(read_scan(folder / "IM0002.dcm").array, image + 1)
    assert "holds 2 series (3: 5 images such as x0; 5: 5 images such as IM0000.dcm)" in fault_of(
        folder
    )
    assert digest(folder / "x3") == read_scan(folder / "x0").sha256


def test_labels_may_have_the_axes_of_another_tool(tmp_path: Path) -> None:
    image, labels = phantom()
    scan = read_scan(write_dicom(tmp_path / "d", image, affine_of()))
    for i, turn in enumerate(ORIENTATIONS):
        path = write_nifti(tmp_path / f"{i}.nii", *turned(labels, turn, affine_of()))
        found = read_labels(path, scan)
        np.testing.assert_array_equal(found.array, labels)
        np.testing.assert_allclose(found.affine, scan.affine, atol=1e-6)


@pytest.mark.parametrize("module", ["pydicom", "SimpleITK"])
def test_a_missing_extra_is_one_line(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dicom(tmp_path / "in" / "d", phantom()[0], affine_of())
    for path in folder.iterdir():
        _transcode(path, pydicom.dcmread(path), "jpeg")
    monkeypatch.setitem(sys.modules, module, None)
    _find_series.cache_clear()
    with pytest.raises(UserError, match=rf"{module} is missing; expected: pip install .*formats"):
        read_scan(folder)


def _drop(folder: Path) -> None:
    (folder / "IM0002.dcm").unlink()


def _double(folder: Path) -> None:
    header = pydicom.dcmread(folder / "IM0002.dcm")
    header.SOPInstanceUID = generate_uid()
    header.save_as(folder / "IM0009.dcm")


def _copy(folder: Path) -> None:
    shutil.copyfile(folder / "IM0002.dcm", folder / "IM0009.dcm")


def _cut(folder: Path) -> None:
    content = (folder / "IM0002.dcm").read_bytes()
    (folder / "IM0002.dcm").write_bytes(content[:-20])


def _beginning(folder: Path) -> None:
    (folder / "IM0002.dcm").write_bytes((folder / "IM0002.dcm").read_bytes()[:200])


def _empty(folder: Path) -> None:
    (folder / "IM0002.dcm").write_bytes(b"")


def _page(folder: Path) -> None:
    (folder / "IM0002.dcm").write_text("<html>403</html>")


def _edit(**elements: Any) -> Any:
    def change(folder: Path) -> None:
        header = pydicom.dcmread(folder / "IM0002.dcm")
        for name, value in elements.items():
            setattr(header, name, value)
        header.save_as(folder / "IM0002.dcm")

    return change


@pytest.mark.parametrize(
    ("change", "slice", "found"),
    [
        (_drop, "IM0001", "1 slices are missing: between it and IM0003.dcm are 8 mm, usually 4"),
        (_double, "IM0009", "lies at the place of IM0002.dcm"),
        (_copy, "IM0009", "is a copy of IM0002.dcm"),
        (_cut, "IM0002", "holds 124 bytes of values; its header says 144"),
        (_beginning, "IM0002", "damaged"),
        (_empty, "IM0002", "is not a DICOM file"),
        (_page, "IM0002", "is not a DICOM file"),
        (_edit(PixelSpacing=[1.5, 1.5]), "IM0002", "its PixelSpacing is [1.5, 1.5]"),
        (_edit(ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "IM0002", "its orientation differs"),
        (_edit(ImageOrientationPatient=[0, 1, 0]), "IM0002", "has no valid ImageOrientation"),
        (_edit(ImagePositionPatient=[-12, 8, 38]), "IM0002", "lies 1 mm from its place"),
        (_edit(ImagePositionPatient=None), "IM0002", "has no valid ImagePositionPatient"),
        (_edit(ImagePositionPatient=[-12, 7, 39]), "IM0001", "are 5 mm, usually 4 mm"),
        (_edit(BitsStored=12), "IM0002", "its BitsStored is 12, 16 in most slices"),
        (_edit(PhotometricInterpretation="MONOCHROME1"), "IM0002", "its PhotometricInter"),
        (_edit(FrameOfReferenceUID=generate_uid()), "IM0002", "its FrameOfReferenceUID differs"),
        (
            _edit(SeriesInstanceUID=generate_uid()),
            "IM0002",
            "is alone in its series, but has the grid",
        ),
        (_edit(RescaleIntercept=None), "IM0002", "its RescaleIntercept is missing"),
        (_edit(NumberOfFrames=4), "IM0002", "holds 4 frames"),
    ],
)
def test_a_damaged_series_names_the_slice(
    change: Any, slice: str, found: str, tmp_path: Path
) -> None:
    folder = write_dicom(tmp_path / "in" / "d", phantom()[0], affine_of())
    write_dicom(tmp_path / "in" / "sound", phantom()[0], affine_of())
    change(folder)
    lines = fault_of(folder)
    assert any(f"{slice}.dcm: " in line and found in line for line in lines.splitlines()), lines
    assert "Zaphod" not in lines
    reader = open_folder(folder.parent)
    sources, faults = reader.find(folder.parent)
    for source in sources:
        try:
            reader.read(source)
        except DatasetError as error:
            faults += error.faults
    named = {fault.path.name for fault in faults if fault.stops}
    assert f"{slice}.dcm" in named and not any("sound" in str(fault.path) for fault in faults)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"ElementSpacing = ", b"ElementSpacinc = ", "its ElementSpacing is ''"),
        (b"ElementSpacing = 1.5 ", b"ElementSpacing = 0 ", "its spacing is 0 1.75 4 mm"),
        (b"ElementSpacing = 1.5 ", b"ElementSpacing = nan ", "its ElementSpacing is 'nan"),
        (b"TransformMatrix", b"TransformMatrlx", "its TransformMatrix is ''"),
        (b"Offset", b"Offzet", "its Offset is ''"),
        (b"TransformMatrix = 1 0", b"TransformMatrix = 1 1", "not perpendicular"),
        (b"NDims = 3", b"NDims = 2", "has NDims '2'"),
        (b"DimSize = 8 9", b"DimSize = 8 8", "its header says 640"),
        (b"DimSize = 8 9 5", b"DimSize = 8 9 0", "its DimSize is '8 9 0'"),
        (b"MET_SHORT", b"MET_SHOOT", "its ElementType is 'MET_SHOOT'"),
        (b"ElementDataFile = LOCAL", b"ElementDataFile = ../a", "its ElementDataFile is '../a'"),
        (b"ElementDataFile = LOCAL", b"ElementDataFile = LOCAM", "LOCAM, is not there"),
        (b"OrderMSB = False", b"OrderMSB = Galse", "is 'Galse'"),
    ],
)
def test_a_header_of_metaimage_takes_no_default(
    old: bytes, new: bytes, found: str, tmp_path: Path
) -> None:
    path = write_itk(tmp_path / "a.mha", phantom()[0], affine_of(), compress=False)
    assert found in fault_with(path, old, new)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (b"space directions", b"spade directions", "'spade directions: "),
        (b"space: left-posterior-superior\n", b"", "has no space"),
        (b"left-posterior-superior", b"right-up-forward", "its space is 'right-up-forward'"),
        (b"space origin: (-12,7,30)\n", b"", "has no space origin"),
        (b"(1.5,0,0)", b"(0,0,0)", "has a spacing of 0"),
        (b"(1.5,0,0)", b"(1.5,0)", "its space directions is '1.5 0'"),
        (b"(1.5,0,0)", b"(nan,0,0)", "its space directions is"),
        (b"sizes: 8 9 5", b"sizes: 8 9 6", "holds 720 bytes of values; its header says 864"),
        (b"type: short", b"type: shart", "its type is 'shart'"),
        (b"endian: little", b"endian: fittle", "its endian is 'fittle'"),
        (b"dimension: 3", b"dimension: 4", "has dimension 4"),
        (b"encoding: gzip", b"encoding: hex", "its encoding is 'hex'"),
        (b"NRRD0004", b"NRRB0004", "is not a NRRD file"),
    ],
)
def test_a_header_of_nrrd_takes_no_default(
    old: bytes, new: bytes, found: str, tmp_path: Path
) -> None:
    path = write_itk(tmp_path / "a.nrrd", phantom()[0], affine_of())
    assert found in fault_with(path, old, new)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "b.nhdr", "b.mhd"])
def test_files_cut_anywhere_are_refused(name: str, tmp_path: Path) -> None:
    path = write_itk(tmp_path / name, phantom()[0], affine_of(), compress=name[0] == "a")
    values = path if name[0] == "a" else path.with_suffix(".raw")
    content = values.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 60)):
        values.write_bytes(content[:length])
        assert fault_of(path)
    values.write_bytes(content + b"x")
    assert fault_of(path)
