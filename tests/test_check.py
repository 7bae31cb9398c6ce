"""The check of a raw dataset: all its faults and its fingerprint, and nothing written."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from data_prep import sift
from data_prep.acdc import AcdcReader
from data_prep.check import (
    as_json,
    as_text,
    fingerprint,
    suggest_max_keypoints,
    suggest_patch,
    survey_dataset,
)
from data_prep.main import main
from data_prep.nnunet import open_nnunet
from data_prep.readers import READERS
from tests.raw_layouts import save, write_acdc, write_nnunet

CHD = READERS["chd"]


@pytest.fixture(scope="module")
def survey(phantom_raw):
    found, faults = survey_dataset(CHD, phantom_raw, num_workers=0)
    assert faults == []
    return found


def files(raw_dir, kind):
    return [
        np.asarray(nib.load(path).dataobj) for path in sorted(raw_dir.glob(f"ct_*_{kind}.nii.gz"))
    ]


def test_the_fingerprint_is_what_the_files_hold(phantom_raw, survey):
    found = fingerprint(survey)
    images, labels = files(phantom_raw, "image"), files(phantom_raw, "label")
    assert (found["num_volumes"], found["num_labelled"], found["num_slices"]) == (4, 4, 48)
    assert found["size"]["rows"] == {"min": 64, "median": 64, "max": 64}
    assert found["size"]["slices"] == {"min": 12, "median": 12, "max": 12}
    assert found["spacing_mm"]["columns"]["median"] == 4.125
    assert found["dtypes"] == ["int16"]
    for percentile in (0, 1, 50, 99, 100):
        values = [np.percentile(image, percentile) for image in images]
        spread = found["intensity"][f"percentile_{percentile}"]
        np.testing.assert_allclose(
            [spread["min"], spread["median"], spread["max"]],
            [min(values), np.median(values), max(values)],
            rtol=1e-5,
        )
    assert [of["name"] for of in found["classes"]] == list(CHD.classes)
    for i, of in enumerate(found["classes"]):
        assert of["voxels"] == sum((label == i).sum() for label in labels)
        assert of["slices"] == sum((label == i).any((0, 1)).sum() for label in labels)
        assert of["volumes"] == sum((label == i).any() for label in labels)


def test_keypoints_are_those_of_evenly_spaced_slices(phantom_raw, survey):
    source = CHD.find(phantom_raw)[0][2]
    image = CHD.prepare(CHD.read(source)).volume.image
    counts = [
        len(sift.find_keypoints(image[:, :, k], max_keypoints=9999))
        for k in (0, 2, 3, 5, 6, 8, 9, 11)
    ]
    assert list(survey.volumes["ct_1003"].keypoints) == counts
    assert fingerprint(survey)["keypoints_per_slice"]["sampled_slices"] == 32


def test_suggestions():
    assert [suggest_max_keypoints(n) for n in ([0], [64], [65, 3], [5000])] == [64, 64, 128, 1024]
    assert suggest_max_keypoints([100] * 99 + [900]) == 128
    assert suggest_patch([(30, 33), (32, 20)]) == (32, 64)
    assert suggest_patch([(500, 700)]) == (512, 512)


def test_the_text_says_what_the_fingerprint_holds(survey):
    text = as_text(survey)
    for part in (
        "4 sound volumes, 4 of them labelled, 48 slices, int16",
        "7 pulmonary_artery",
        "in 32 slices, at most 8 of a volume",
        "--max_keypoints 64: enough for 100.0% of them",
        "--config.data.patch_size='(64, 64)' in training: holds the slices of 4 of 4 volumes whole",
    ):
        assert part in text


def test_a_class_that_no_volume_shows_is_marked(tmp_path):
    write_nnunet(tmp_path, labels={"background": 0, "a": 1, "b": 2, "valve": 3})
    reader = open_nnunet(tmp_path)
    survey, _ = survey_dataset(reader, tmp_path, num_workers=0)
    (line,) = [line for line in as_text(survey).splitlines() if "valve" in line]
    assert line.endswith("in none of 2")


def test_acdc_is_measured_on_its_new_grid(tmp_path):
    raw_dir = write_acdc(tmp_path, 1)
    survey, _ = survey_dataset(AcdcReader(cine=True), raw_dir, num_workers=0)
    found = fingerprint(survey)
    assert (found["num_volumes"], found["num_labelled"]) == (5, 2)
    assert (found["size"]["rows"]["max"], found["size"]["columns"]["max"]) == (49, 48)
    assert found["suggestion"]["patch_size"] == [64, 64]


def check(capsys, *arguments):
    """Exit status, standard output and the lines of standard error."""
    status = main([*map(str, arguments), "--check", "--num_workers", "0"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.splitlines()


def test_every_fault_and_the_sound_rest_are_reported_and_nothing_is_written(
    phantom_raw, tmp_path, capsys
):
    raw_dir, data_dir = tmp_path / "raw", tmp_path / "data"
    shutil.copytree(phantom_raw, raw_dir)
    (raw_dir / "ct_1001_label.nii.gz").unlink()
    (raw_dir / "ct_1002_image.nii.gz").write_bytes(b"")
    shutil.copy(raw_dir / "ct_1003_image.nii.gz", raw_dir / "ct_1100_image.nii.gz")
    label = np.asarray(nib.load(raw_dir / "ct_1003_label.nii.gz").dataobj)
    save(raw_dir / "ct_1004_label.nii.gz", label.astype(np.int16) - 1, (4.125, 4.125, 13))
    before = sorted(path.name for path in raw_dir.iterdir())
    arguments = ["--dataset", "chd", "--raw_dir", raw_dir, "--data_dir", data_dir]
    status, out, errors = check(capsys, *arguments, "--json", tmp_path / "found.json")
    note, *errors = errors
    assert note.startswith(f"note: {raw_dir / 'ct_1100_image.nii.gz'}: has the same values as ct_")
    assert status == 2
    assert "3 sound volumes" in out
    assert "equal images: ct_1003, ct_1100\n" in out
    assert [line.split(": ")[1].rpartition("/")[2] for line in errors] == [
        "ct_1001_image.nii.gz",
        "ct_1002_image.nii.gz",
        "ct_1004_label.nii.gz",
        "ct_1004_label.nii.gz",
        "ct_1100_image.nii.gz",
    ]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [f"error: {f['file']}: {f['found']}; {f['remedy']}" for f in found["faults"]] == errors
    assert [f"note: {f['file']}: {f['found']}; {f['remedy']}" for f in found["findings"]] == [note]
    assert found["fingerprint"]["equal_images"] == [["ct_1003", "ct_1100"]]
    assert set(found["volumes"]) == {"ct_1001", "ct_1003", "ct_1100"}
    assert not data_dir.exists()
    assert sorted(path.name for path in raw_dir.iterdir()) == before


def test_a_sound_dataset_has_status_zero_and_plain_json(phantom_raw, tmp_path, capsys, survey):
    arguments = (
        "--dataset",
        "phantom",
        "--raw_dir",
        phantom_raw,
        "--json",
        tmp_path / "found.json",
    )
    status, out, errors = check(capsys, *arguments)
    assert (status, errors) == (0, [])
    assert out == as_text(survey) + "\n"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == as_json(survey, [])
    assert found["fingerprint"] == fingerprint(survey)


def test_a_faulty_description_does_not_hide_the_volumes(tmp_path, capsys):
    write_nnunet(tmp_path, labels=None)
    status, out, errors = check(capsys, "--dataset", "nnunet", "--raw_dir", tmp_path)
    assert status == 2
    assert [line.split(": ")[2] for line in errors] == [
        'has no labels; expected for example {"background"'
    ]
    assert "2 sound volumes" in out
    assert "No labels of known classes." in out


def test_phantoms_are_not_written_for_a_check(tmp_path, capsys):
    status, out, errors = check(capsys, "--dataset", "phantom", "--data_dir", tmp_path / "data")
    assert status == 2
    assert "no sound volume" in out
    assert len(errors) == 1
    assert not (tmp_path / "data").exists()


def test_columns_stay_apart_for_the_small_numbers_of_normalised_images(tmp_path):
    write_nnunet(tmp_path, channels=("MR",))
    for path in (tmp_path / "imagesTr").iterdir():
        values = np.asarray(nib.load(path).dataobj).astype(np.float64)
        values = 1e-6 * (values - values.mean()) / values.std()
        save(path, values.astype(np.float32))
    survey, _ = survey_dataset(open_nnunet(tmp_path), tmp_path, num_workers=0)
    lines = [line for line in as_text(survey).splitlines() if line.startswith("intensity, perc")]
    for line, spread in zip(lines, fingerprint(survey)["intensity"].values(), strict=True):
        assert len(line) == 57
        found = [float(number) for number in line.split()[3:]]
        np.testing.assert_allclose(found, list(spread.values()), rtol=5e-3)


def test_json_needs_check(tmp_path, capsys):
    arguments = ["--dataset", "chd", "--raw_dir", str(tmp_path), "--json", "a.json"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "error: --json is for --check\n"


def test_json_that_cannot_be_written_is_one_line(phantom_raw, tmp_path, capsys):
    path = tmp_path / "none" / "found.json"
    status, _, errors = check(capsys, "--dataset", "chd", "--raw_dir", phantom_raw, "--json", path)
    assert (status, errors) == (1, [f"error: {path}: No such file or directory"])


def test_unlabelled_volumes_of_another_modality_are_found(tmp_path):
    write_nnunet(tmp_path, unlabelled=("case_003", "case_004"), channels=("scan",))
    path = tmp_path / "imagesTr" / "case_004_0000.nii.gz"
    image = np.asarray(nib.load(path).dataobj)
    save(path, (image - image.min()).astype(np.int16))  # no longer in HU
    _, faults = survey_dataset(open_nnunet(tmp_path), tmp_path, num_workers=0)
    (found,) = faults
    assert (found.path.name, found.stops) == ("case_004_0000.nii.gz", False)
    assert "are unlike those of every labelled volume" in found.found
