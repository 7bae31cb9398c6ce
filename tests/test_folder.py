"""Plain folders of scans and labels: what is a volume, which classes, and all faults of both."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.builder import Options
from data_prep.faults import DatasetError
from data_prep.folder import FolderReader, open_folder
from data_prep.main import main
from data_prep.prepare import prepare_dataset
from data_prep.readers import reader_of
from data_prep.subjects import read_subjects
from kafjax.data.dataset import labelled_volumes, open_dataset, volumes_for_test
from kafjax.data.splits import Split
from kafjax.errors import UserError
from kafjax.training.preflight import split_run
from tests.raw_layouts import heart, save, write_nnunet
from tests.runs import tiny_config


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three scans; two have labels 0, 3 and 7."""
    scans, labels = tmp_path / "scans", tmp_path / "labels"
    scans.mkdir()
    labels.mkdir()
    for number, name in enumerate(("anna", "ben_0000", "carl-2")):
        image, label = heart(number)
        save(scans / f"{name}.nii.gz", image)
        if number < 2:
            classes = np.array([0, 3, 3, 0, 0, 7, 0, 0], np.int16)[label]
            save(labels / f"{name.removesuffix('_0000')}.nii.gz", classes)
    return scans, labels


def faults_of(reader: FolderReader, scans: Path) -> dict[str, str]:
    return {fault.path.name: fault.found for fault in reader.find(scans)[1]}


def test_scans_have_the_labels_of_their_name(folders: tuple[Path, Path]) -> None:
    scans, labels = folders
    reader = open_folder(scans, labels)
    sources, faults = reader.find(scans)
    assert faults == []
    assert [(s.id, s.case, s.label and s.label.name) for s in sources] == [
        ("anna", None, "anna.nii.gz"),
        ("ben_0000", None, "ben.nii.gz"),
        ("carl_x2d_2", "carl-2", None),
    ]
    assert reader.classes == ("background", "class_3", "class_7")
    assert reader.intensity == "ct"  # phantoms are in HU
    assert open_folder(scans).classes == ("background",)


def test_numbers_become_classes_and_go_back(folders: tuple[Path, Path]) -> None:
    scans, labels = folders
    reader = open_folder(scans, labels, classes=("ventricle", "muscle"))
    assert reader.classes == ("background", "ventricle", "muscle")
    raw = np.array([0, 7, 3])
    assert reader.map_labels(raw).tolist() == [0, 2, 1]
    assert reader.raw_labels(reader.map_labels(raw)).tolist() == raw.tolist()
    with pytest.raises(ValueError, match="label 5; expected one of 0, 3, 7"):
        reader.map_labels(np.array([5]))
    for classes in (("one",), ("a", "b", "c")):
        faults = faults_of(open_folder(scans, labels, classes=classes), scans)
        assert faults == {"labels": f"--classes has {len(classes)} names"}


def test_metadata_give_the_reader_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    scans, labels = folders
    reader = open_folder(scans, labels, radius=7)
    done = prepare_dataset(
        reader, scans, tmp_path, name="own", options=Options(max_keypoints=16), num_workers=0
    )
    assert (done.num_volumes, done.num_labelled) == (3, 2)
    again = reader_of(json.loads((done.directory / "metadata.json").read_bytes()))
    assert isinstance(again, FolderReader)
    for name in ("classes", "radius", "intensity", "label_values"):
        assert getattr(again, name) == getattr(reader, name)
    dataset = open_dataset(tmp_path, "own")
    found = dataset.read(dataset.volumes["anna"][2], with_label=True).label
    expected = np.array([0, 1, 1, 0, 0, 2, 0, 0])[heart(0)[1][:, :, 2].T]
    np.testing.assert_array_equal(found, expected)

    # Its labels have the scan's name.
    save(scans / "anna.nii.gz", heart(9)[0])
    with pytest.raises(UserError, match="anna: its files have changed"):
        prepare_dataset(
            reader, scans, tmp_path, name="own", options=Options(max_keypoints=16), num_workers=0
        )


def test_every_fault_of_both_folders_has_a_line(folders: tuple[Path, Path]) -> None:
    scans, labels = folders
    save(labels / "dora.nii.gz", heart(4)[1])
    save(labels / "ben_0000.nii", heart(1)[1])
    save(scans / "anna.nii", heart(0)[0])
    (scans / "notes.dcm").write_text("")
    reader = open_folder(scans, labels)
    assert faults_of(reader, scans) == {
        "dora.nii.gz": "has no scan of its name",
        "ben_0000.nii": "is a second label file of ben_0000.nii.gz",
        "anna.nii.gz": "has the name of anna.nii",
        "scans": "holds 1 DICOM files itself, such as notes.dcm",
    }


def test_folders_that_cannot_be_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    scans, labels = folders
    same = faults_of(open_folder(scans, scans), scans)
    assert same == {"scans": "is the folder of the scans too"}
    none = faults_of(open_folder(tmp_path / "a", tmp_path / "b"), tmp_path / "a")
    assert none == {"a": "is not a folder", "b": "is not a folder"}
    (tmp_path / "empty").mkdir()
    assert faults_of(open_folder(tmp_path / "empty"), tmp_path / "empty") == {
        "empty": "holds no scan"
    }
    for path in labels.iterdir():
        save(path, np.zeros((40, 36, 6), np.uint8))
    found = faults_of(open_folder(scans, labels), scans)
    assert found == {"labels": "holds no label but the background"}
    many = np.arange(40 * 36 * 6).reshape(40, 36, 6).astype(np.int32)
    save(labels / "anna.nii.gz", many)
    assert "different values" in faults_of(open_folder(scans, labels), scans)["labels"]


def test_labels_inside_the_folder_of_scans_are_no_stray_folder(folders: tuple[Path, Path]) -> None:
    scans, labels = folders
    inside = labels.rename(scans / "labels")
    sources, faults = open_folder(scans, inside).find(scans)
    assert faults == []
    assert sum(source.label is not None for source in sources) == 2


def test_second_channels_are_pointed_out(folders: tuple[Path, Path]) -> None:
    scans, labels = folders
    save(scans / "ben_0001.nii.gz", heart(5)[0])
    (fault,) = open_folder(scans, labels).find(scans)[1]
    assert not fault.stops
    assert "channel 0 of ben has the labels" in fault.found


# A table of subjects, and a test set.


def test_a_table_of_subjects_is_recorded_and_keeps_them_together(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    scans, labels = folders
    save(scans / "dora.nii.gz", heart(3)[0])
    save(labels / "dora.nii.gz", np.array([0, 3, 3, 0, 0, 7, 0, 0], np.int16)[heart(3)[1]])
    table = tmp_path / "subjects.tsv"
    table.write_text("subject\tvolume\nann\tanna\nann\tdora.nii.gz\n\ncarla\tcarl-2\n")
    arguments = f"--dataset folder --raw_dir {scans} --labels {labels} --data_dir {tmp_path}"
    command = [*arguments.split(), "--max_keypoints", "16", "--num_workers", "0", "--name", "own"]
    assert main([*command, "--subjects", str(table)]) == 0
    dataset = open_dataset(tmp_path, "own")
    assert dataset.metadata["subjects"] == {"anna": "ann", "dora": "ann", "carl_x2d_2": "carla"}
    config = tiny_config(tmp_path / "own" / "1.0.0")
    config.data.update({"fold": 0, "num_folds": 2, "num_labeled": None})
    sides = [{*side} for side in split_run(config, dataset)]
    assert {"anna", "dora"} in sides
    assert {"ben_0000"} in sides
    assert main(command) == 2  # the same without the table


def test_every_wrong_line_of_a_table_is_named(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    table = tmp_path / "subjects.csv"
    table.write_text("volume,subject\na,\nb,1\nb,2\n")
    with pytest.raises(ValueError, match=r"line 2: expected.*\n.*line 4: b was of 1 before"):
        read_subjects(table)
    table.write_text("name,subject\na,b\n")
    with pytest.raises(ValueError, match="no column volume"):
        read_subjects(table)
    scans, _ = folders
    with pytest.raises(DatasetError, match="holds no volume 'zoe'"):
        prepare_dataset(
            open_folder(scans),
            scans,
            tmp_path,
            name="own",
            options=Options(max_keypoints=16),
            num_workers=0,
            subjects={"zoe": "z", "anna": "a"},
        )


def test_a_test_set_is_on_no_side_unless_asked(tmp_path: Path) -> None:
    raw = write_nnunet(tmp_path / "raw", unlabelled=("loose",), test=("t1", "t2"))
    (raw / "labelsTs").mkdir()
    save(raw / "labelsTs" / "t1.nii.gz", np.minimum(heart(9)[1], 2).astype(np.uint8))
    arguments = f"--dataset nnunet --raw_dir {raw} --data_dir {tmp_path} --name own"
    assert main([*arguments.split(), "--max_keypoints", "16", "--num_workers", "0"]) == 0
    dataset = open_dataset(tmp_path, "own")
    assert volumes_for_test(dataset) == ("t1", "t2")
    assert labelled_volumes(dataset) == ("case_001", "case_002", "t1")
    config = tiny_config(tmp_path / "own" / "1.0.0")
    assert split_run(config, dataset).train == ("case_001", "case_002", "loose")
    config.data.include_test = True
    assert split_run(config, dataset).train == tuple(dataset.volumes)
    config.data.update({"fold": None, "num_labeled": None})
    del config.data["include_test"]
    assert split_run(config, dataset) == Split(("case_001", "case_002"), ())
