"""Labels read back, by other libraries, are where they were, named, and say nothing private."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from highdicom.seg import segread

from data_prep.faults import DatasetError
from data_prep.formats import open_grid, read_labels, read_scan
from data_prep.nifti import to_slices
from kafjax.drawing.colours import CLASSES
from kafjax.errors import UserError
from kafjax.inference import prediction
from kafjax.inference.folders import evaluate_folders
from kafjax.inference.label_files import (
    OUTPUT_ENDINGS,
    Classes,
    write_descriptions,
    write_labels,
)
from kafjax.inference.prediction import VolumePredictor, predict_files
from tests.scan_formats import (
    PRIVATE,
    affine_of,
    phantom,
    write_dicom,
    write_itk,
    write_nifti,
)
from tests.test_formats import OBLIQUE, ORIENTATIONS, turned, write_all
from tests.test_prediction import Corner, predictor_of

KIDNEYS = Classes(("left kidney", "right kidney"), (1, 2))
# Voxels that distinguish every permutation and flip, and a value of each class and the background.
VOXELS = ((0, 1, 1), (2, 4, 2), (4, 5, 2), (6, 8, 4), (0, 0, 0), (7, 8, 4))


def itk_values(path: Path, affine: np.ndarray) -> list[int]:
    """The values at `VOXELS` of the scan, by their places in millimetres."""
    image = SimpleITK.ReadImage(str(path))
    found = []
    for voxel in VOXELS:
        x, y, z = (affine @ [*voxel, 1])[:3]
        found.append(image[image.TransformPhysicalPointToIndex((-x, -y, z))])
    return found


def nifti_values(path: Path, affine: np.ndarray) -> list[int]:
    image: Any = nib.load(path)
    places = [np.linalg.inv(image.affine) @ affine @ [*voxel, 1] for voxel in VOXELS]
    return [int(image.dataobj[tuple(np.rint(place[:3]).astype(int))]) for place in places]


def dicom_values(path: Path, affine: np.ndarray) -> list[int]:
    """By each frame's position, as a viewer shows them; absent frames are background."""
    found = []
    dataset = pydicom.dcmread(path)
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    turn = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    down, right = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    for voxel in VOXELS:
        place = (affine @ [*voxel, 1])[:3] * (-1, -1, 1)
        value = 0
        for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
            away = place - np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
            if abs(away @ np.cross(turn[:3], turn[3:])) < 0.1:
                column, row = away @ turn[:3] / right, away @ turn[3:] / down
                if frame[round(row), round(column)]:
                    identity = group.SegmentIdentificationSequence[0]
                    value = identity.ReferencedSegmentNumber
        found.append(value)
    return found


READERS: dict[str, Callable[[Path, np.ndarray], list[int]]] = {
    ".nii.gz": nifti_values,
    ".nii": nifti_values,
    ".seg.nrrd": itk_values,
    ".nrrd": itk_values,
    ".mha": itk_values,
    ".dcm": dicom_values,
}


@pytest.mark.parametrize("turn", [*range(0, 48, 9), 47])
def test_labels_lie_on_the_scan_for_other_libraries(turn: int, tmp_path: Path) -> None:
    image, labels = phantom()
    stored, affine = turned(image, ORIENTATIONS[turn], affine_of(OBLIQUE))
    files = write_all(tmp_path / "in", stored, affine)
    expected = [int(labels[voxel]) for voxel in VOXELS]
    assert expected == [1, 1, 2, 2, 0, 0]
    for format, scan in files.items():
        grid, there = open_grid(scan), read_scan(scan)
        # The labels, on the axes that the scan has in its file.
        source = write_nifti(tmp_path / "labels.nii", labels, affine_of(OBLIQUE))
        on_axes = read_labels(source, there).array
        for ending, values in READERS.items():
            path = tmp_path / format / f"labels{ending}"
            if ending == ".dcm" and format != "dicom":
                with pytest.raises(DatasetError, match="is no DICOM series"):
                    write_labels(path, on_axes, scan=scan, grid=grid, classes=KIDNEYS)
                continue
            write_labels(path, on_axes, scan=scan, grid=grid, classes=KIDNEYS)
            assert values(path, affine_of(OBLIQUE)) == expected, (format, ending)
            again = read_labels(path, there)
            np.testing.assert_array_equal(again.array, on_axes)
            np.testing.assert_allclose(again.affine, there.affine, atol=1e-4)


def test_a_segmentation_for_slicer_has_names_colours_and_numbers(tmp_path: Path) -> None:
    classes = Classes(("a", "b", "c"), (2, 5, 9))
    _, labels = phantom()
    scan = write_nifti(tmp_path / "a.nii", labels, affine_of())
    path = tmp_path / "a.seg.nrrd"
    array = np.array([0, 2, 5], np.uint8)[labels]
    write_labels(path, array, scan=scan, grid=open_grid(scan), classes=classes)
    image = SimpleITK.ReadImage(str(path))
    keys = {name: image.GetMetaData(name) for name in image.GetMetaDataKeys()}
    for i, (name, number, colour) in enumerate(zip("abc", (2, 5, 9), CLASSES, strict=False)):
        assert keys[f"Segment{i}_Name"] == name
        assert keys[f"Segment{i}_LabelValue"] == str(number)
        assert keys[f"Segment{i}_Layer"] == "0"
        assert keys[f"Segment{i}_ID"] == f"Segment_{i + 1}"
        rgb = [round(float(x) * 255) for x in keys[f"Segment{i}_Color"].split()]
        assert bytes(rgb).hex().upper() == colour[1:]
    assert set(np.unique(SimpleITK.GetArrayFromImage(image))) == {0, 2, 5}
    first = path.read_bytes()
    write_labels(path, array, scan=scan, grid=open_grid(scan), classes=classes)
    assert path.read_bytes() == first


def test_dicom_segmentations_refer_to_their_slices(tmp_path: Path) -> None:
    image, labels = phantom()
    scan = write_dicom(tmp_path / "d", image, affine_of(), order=[3, 1, 4, 0, 2])
    path = tmp_path / "seg.dcm"
    write_labels(path, labels, scan=scan, grid=open_grid(scan), classes=KIDNEYS)
    found: Any = segread(path)
    described = {i: found.get_segment_description(i).segment_label for i in found.segment_numbers}
    assert described == {1: "left kidney", 2: "right kidney"}
    slices = {str(pydicom.dcmread(file).SOPInstanceUID): file for file in scan.iterdir()}
    study, series, _ = found.get_source_image_uids()[0]
    first = pydicom.dcmread(next(iter(slices.values())))
    assert (study, found.StudyInstanceUID) == (first.StudyInstanceUID,) * 2
    assert (series, found.FrameOfReferenceUID) == (
        first.SeriesInstanceUID,
        first.FrameOfReferenceUID,
    )
    for group in found.PerFrameFunctionalGroupsSequence:
        (source,) = group.DerivationImageSequence[0].SourceImageSequence
        referred = pydicom.dcmread(slices[source.ReferencedSOPInstanceUID])
        assert group.PlanePositionSequence[0].ImagePositionPatient == referred.ImagePositionPatient
    volume = found.get_volume(combine_segments=True)
    shown = np.zeros_like(labels)
    to_voxel = np.linalg.inv(affine_of()) @ np.diag([-1, -1, 1, 1]) @ volume.affine
    for index in np.argwhere(volume.array):
        voxel = np.rint(to_voxel @ [*index, 1]).astype(int)[:3]
        shown[tuple(voxel)] = volume.array[tuple(index)]
    np.testing.assert_array_equal(shown, labels)
    assert (found.PatientName, found.PatientID, found.StudyDate) == ("", "", "")
    write_labels(path, labels, scan=scan, grid=open_grid(scan), classes=KIDNEYS, keep_header=True)
    assert segread(path).PatientName == PRIVATE[0]


def test_a_scan_without_any_class_has_segmentations_too(tmp_path: Path) -> None:
    image, labels = phantom()
    scan = write_dicom(tmp_path / "d", image, affine_of())
    path = tmp_path / "seg.dcm"
    write_labels(path, labels * 0, scan=scan, grid=open_grid(scan), classes=KIDNEYS)
    assert not read_labels(path, open_grid(scan)).array.any()


def test_label_descriptions_are_as_itk_snap_reads_them(tmp_path: Path) -> None:
    write_descriptions(tmp_path / "labels.txt", Classes(("a b", 'c"d'), (1, 7)))
    lines = (tmp_path / "labels.txt").read_text().splitlines()
    rows = [line.split(maxsplit=7) for line in lines if not line.startswith("#")]
    assert rows == [
        ["0", "0", "0", "0", "0", "0", "0", '"Clear Label"'],
        ["1", "230", "159", "0", "1", "1", "1", '"a b"'],
        ["7", "86", "180", "233", "1", "1", "1", '"c\'d"'],
    ]


def test_a_grid_that_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    image, labels = phantom()
    affine = affine_of()
    affine[:3, 2] += (0, 1.25, 0)
    scan = write_dicom(tmp_path / "d", image, affine)
    grid = open_grid(scan)
    with pytest.raises(DatasetError, match=r"its axes are not perpendicular, as \.mha needs"):
        write_labels(tmp_path / "a.mha", labels, scan=scan, grid=grid, classes=KIDNEYS)
    for ending in (".nii", ".nrrd", ".dcm"):
        path = tmp_path / f"a{ending}"
        write_labels(path, labels, scan=scan, grid=grid, classes=KIDNEYS)
        found = read_labels(path, grid)
        np.testing.assert_array_equal(found.array, labels)
        np.testing.assert_allclose(found.affine, affine, atol=1e-5)


# Nothing private.


def private_scans(folder: Path) -> dict[str, Path]:
    """A scan of each format whose header says who it is of, when and why, wherever it can."""
    name, born, seen, ward, remark = PRIVATE
    image, _ = phantom((32, 28, 5))
    nifti: Any = nib.Nifti1Image(image, affine_of())
    nifti.header["descrip"], nifti.header["aux_file"] = f"{name} {seen}".encode(), remark.encode()
    nifti.header["intent_name"], nifti.header["db_name"] = ward.encode(), born.encode()
    nifti.header["cal_max"], nifti.header["cal_min"] = 1234.5, -1234.5
    nifti.header.set_intent("z score", name=ward)
    nifti.header.extensions.append(
        nib.nifti1.Nifti1Extension("comment", " ".join(PRIVATE).encode())
    )
    folder.mkdir()
    nib.save(nifti, folder / "a.nii.gz")
    nrrd = write_itk(folder / "b.nrrd", image, affine_of())
    text = " ".join(PRIVATE).encode()
    line = b"content: " + text + b"\nPatient:=" + text + b"\n# " + text + b"\nencoding"
    nrrd.write_bytes(nrrd.read_bytes().replace(b"encoding", line, 1))
    mha = write_itk(folder / "c.mha", image, affine_of())
    line = b"Comment = " + text + b"\nNDims"
    mha.write_bytes(mha.read_bytes().replace(b"NDims", line, 1))
    dicom = write_dicom(folder / "d", image, affine_of(), PatientComments=" ".join(PRIVATE))
    return {"nifti": folder / "a.nii.gz", "nrrd": nrrd, "mha": mha, "dicom": dicom}


def contents(path: Path) -> bytes:
    """A file's bytes, and those of every gzip or zlib stream in it."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content += gzip.decompress(content)
    for start in (b"\x1f\x8b", b"x\x01", b"x\x9c"):
        if (place := content.find(start)) >= 0:
            try:
                content += zlib.decompressobj(wbits=47).decompress(content[place:])
            except zlib.error:
                continue
    return content


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> VolumePredictor:
    predictor = predictor_of(Corner())
    monkeypatch.setattr(prediction, "_read_preparations", lambda *_: predictor.preparation)
    monkeypatch.setattr(prediction, "load_volume_predictor", lambda *_, **__: predictor)
    return predictor


def test_no_output_holds_anything_of_the_patient(
    fake_run: VolumePredictor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scans = private_scans(tmp_path / "in")
    for path in scans.values():
        held = b"".join(f.read_bytes() for f in ([path] if path.is_file() else path.iterdir()))
        whole = contents(path) if path.is_file() else held
        assert all(word.encode() in whole for word in PRIVATE), path  # the test can fail
    folder, results = tmp_path / "in", []
    for ending in (None, *OUTPUT_ENDINGS):
        place = tmp_path / f"out{ending}"
        place.mkdir()
        options: dict[str, Any] = {
            "ending": ending,
            "probabilities": ending is None,
            "label_text": place / "labels.txt",
        }
        if ending == ".dcm":
            predict_files([], folder / "d", place / "d.dcm", label_text=options["label_text"])
        else:
            predict_files([], folder, place, **options)
        results += [path for path in place.rglob("*") if path.is_file()]
    names = {path.name for path in results if path.parent.name == "outNone"}
    assert names >= {"a.nii.gz", "b.nrrd", "c.mha", "d.dcm", "d_probabilities.nii.gz", "labels.txt"}
    said = "".join(capfd.readouterr()).encode()
    for path in results:
        for word in PRIVATE:
            assert word.encode() not in contents(path), path
    assert not any(word.encode() in said for word in PRIVATE)
    expected = to_slices(*_labels_and_affine(tmp_path / "outNone" / "a.nii.gz"))[0]
    assert set(np.unique(expected)) == {0, 1, 2, 3}
    for path in results:
        if path.name.endswith(OUTPUT_ENDINGS) and "probabilities" not in path.name:
            scan = next(scan for scan in scans.values() if scan.name[0] == path.name[0])
            found = read_labels(path, open_grid(scan))
            np.testing.assert_array_equal(to_slices(found.array, found.affine)[0], expected)
    header = nib.load(tmp_path / "outNone" / "a.nii.gz").header
    assert (header["cal_max"], header["cal_min"], header["intent_code"]) == (0, 0, 0)
    evaluated = evaluate_folders(tmp_path / "outNone", tmp_path / "out.nii", output=tmp_path / "e")
    assert evaluated is not None and evaluated["pooled_dice"]["mean"] == 1


def _labels_and_affine(path: Path) -> tuple[np.ndarray, np.ndarray]:
    scan = read_scan(path)
    return scan.array, scan.affine


def test_the_header_is_kept_on_request(fake_run: VolumePredictor, tmp_path: Path) -> None:
    scans = private_scans(tmp_path / "in")
    predict_files([], scans["nifti"], tmp_path / "a.nii.gz", keep_header=True)
    assert PRIVATE[0].encode() in contents(tmp_path / "a.nii.gz")
    predict_files([], scans["dicom"], tmp_path / "d.dcm", keep_header=True)
    assert pydicom.dcmread(tmp_path / "d.dcm").PatientName == PRIVATE[0]


def test_a_folder_of_series_goes_on_after_a_damaged_one(
    fake_run: VolumePredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, _ = phantom((32, 28, 5))
    for name in "abc":
        write_dicom(tmp_path / "in" / name, image, affine_of())
    cut = tmp_path / "in" / "b" / "IM0003.dcm"
    cut.write_bytes(cut.read_bytes()[:-9])
    write_dicom(tmp_path / "in" / "c", image[:, :, :1], affine_of(OBLIQUE), number=8, order=[9])
    with pytest.raises(UserError) as caught:
        predict_files([], tmp_path / "in", tmp_path / "out")
    (_, line) = str(caught.value).splitlines()
    assert str(cut) in line and "holds 1783 bytes of values; its header says 1792" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.dcm", "c.dcm"]
    assert f"note: {tmp_path / 'in' / 'c' / 'IM0009.dcm'}: is alone" in capsys.readouterr().err
    # A file of a series, a folder of one, and folders in folders.
    for source in (tmp_path / "in" / "a", tmp_path / "in" / "a" / "IM0002.dcm"):
        predict_files([], source, tmp_path / "one.seg.nrrd", overwrite=True)
    deep = tmp_path / "deep" / "patient"
    deep.mkdir(parents=True)
    (tmp_path / "in" / "a").rename(deep / "study")
    predict_files([], tmp_path / "deep", tmp_path / "deep.dcm")
    with pytest.raises(UserError, match="is no DICOM series"):
        write_itk(tmp_path / "x.mha", image, affine_of())
        predict_files([], tmp_path / "x.mha", tmp_path / "x.dcm")


def test_results_in_the_scans_folder_are_no_scans(
    fake_run: VolumePredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, _ = phantom((32, 28, 5))
    write_dicom(tmp_path / "a", image, affine_of())
    for _ in range(2):
        predict_files([], tmp_path, tmp_path)
    assert "Skipped 1 of 1 files: results exist." in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.dcm"]
