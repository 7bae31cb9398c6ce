"""nnU-Net's raw layout: what is a volume, by which rules, and all faults of the description."""

import codecs
import itertools
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep.builder import Options
from data_prep.faults import DatasetError
from data_prep.main import main
from data_prep.nnunet import open_nnunet, split_name
from data_prep.prepare import prepare_dataset
from data_prep.readers import READERS, reader_of
from data_prep.volumes import Source, Volume, inspect
from kafjax.data.records import RecordReader, load_decoder
from tests.raw_layouts import save, write_nnunet


def describe(folder, **changes):
    """Changes fields of `dataset.json`; None takes one out."""
    path = folder / "dataset.json"
    description = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in description.items() if v is not None}))


def faults_of(folder, **options):
    return [
        (fault.path.name, fault.found) for fault in open_nnunet(folder, **options).find(folder)[1]
    ]


# Volumes and rules.


def test_cases_with_and_without_labels_are_volumes(tmp_path):
    write_nnunet(tmp_path, unlabelled=("brain_7",), test=("other",))
    sources, faults = open_nnunet(tmp_path).find(tmp_path)
    assert faults == []
    assert [(s.id, s.image.name, s.label and s.label.name, s.case) for s in sources] == [
        ("brain_7", "brain_7_0000.nii.gz", None, None),
        ("case_001", "case_001_0000.nii.gz", "case_001.nii.gz", None),
        ("case_002", "case_002_0000.nii.gz", "case_002.nii.gz", None),
        ("other", "other_0000.nii.gz", None, None),
    ]


def test_a_folder_of_images_to_pretrain_on_suffices(tmp_path):
    write_nnunet(tmp_path, labelled=(), test=("a", "b"))
    shutil.rmtree(tmp_path / "imagesTr")
    shutil.rmtree(tmp_path / "labelsTr")
    sources, faults = open_nnunet(tmp_path).find(tmp_path)
    assert faults == []
    assert [source.id for source in sources] == ["a", "b"]


def test_classes_are_in_order_of_their_numbers(tmp_path):
    write_nnunet(tmp_path, labels={"liver": 2, "background": 0, "spleen": 1})
    assert open_nnunet(tmp_path).classes == ("background", "spleen", "liver")


@pytest.mark.parametrize(
    ("channel", "number", "intensity"),
    [("0", 0, "ct"), ("T2", 1, "zscore"), ("1", 1, "zscore"), ("ct", 2, "ct")],
)
def test_a_channel_is_chosen_by_number_or_name(tmp_path, channel, number, intensity):
    write_nnunet(tmp_path, channels=("CT", "T2", "ct"), ending=".nii")
    reader = open_nnunet(tmp_path, channel=channel)
    assert (reader.channels, reader.intensity) == ((number,), intensity)
    sources, faults = reader.find(tmp_path)
    assert faults == []
    assert {source.image.name[-9:] for source in sources} == {f"_000{number}.nii"}


def test_ct_is_clipped_as_chd_and_others_are_left_as_they_are(tmp_path):
    write_nnunet(tmp_path)
    image = np.random.default_rng(0).normal(0, 300, (9, 8, 7)).astype(np.int16)
    volume = Volume("a", image, None, (1.0, 1.0, 1.0), np.eye(4), {"a": ""})
    clipped = open_nnunet(tmp_path).prepare(volume)
    expected = READERS["chd"].prepare(volume)
    np.testing.assert_array_equal(clipped.volume.image, expected.volume.image)
    left = open_nnunet(tmp_path, intensity="zscore").prepare(volume)
    np.testing.assert_array_equal(left.volume.image, image)
    np.testing.assert_allclose((left.mean, left.std), (image.mean(), image.std()), rtol=1e-6)


def test_neighbours_are_as_far_as_in_chd(tmp_path):
    reader = open_nnunet(write_nnunet(tmp_path))
    assert [reader.reach(n) for n in range(1, 300)] == [
        READERS["chd"].reach(n) for n in range(1, 300)
    ]


# Names of splits.


def test_most_names_stay_and_no_two_become_one():
    assert [split_name(case) for case in ("BRATS_001", "la_003", "7")] == [
        "BRATS_001",
        "la_003",
        "7",
    ]
    assert split_name("case-01.a") == "case_x2d_01_x2e_a"
    assert split_name("all") != "all"
    letters = ["_", "x", "2", "d", "-", "é"]
    cases = ["".join(c) for n in range(1, 7) for c in itertools.product(letters, repeat=n)]
    names = {split_name(case) for case in cases}
    assert len(names) == len(cases)
    assert all(name.isascii() and name.replace("_", "").isalnum() for name in names)


def test_strange_names_are_splits_that_tfds_reads(tmp_path):
    cases = ("pat-01", "pat 01", "all", "Ä.b", "x_x2d_y")
    write_nnunet(tmp_path / "raw", labelled=cases[:2], unlabelled=cases[2:], size=(32, 32, 4))
    reader = open_nnunet(tmp_path / "raw", radius=7)
    directory = prepare_dataset(
        reader,
        tmp_path / "raw",
        tmp_path,
        name="mine",
        options=Options(max_keypoints=32),
        num_workers=0,
    ).directory
    info = tfds.builder_from_directory(directory).info
    volumes = dict(info.metadata)["volumes"]
    assert {volume.get("case", id) for id, volume in volumes.items()} == set(cases)
    assert {name: split.num_examples for name, split in info.splits.items()} == dict.fromkeys(
        map(split_name, cases), 4
    )
    records, decode = RecordReader(directory), load_decoder(directory)
    for case in cases:
        record = decode(records[records.record_number(split_name(case), 1)])
        assert record["has_label"] == (case in cases[:2])
        assert record["volume_id"].decode() == split_name(case)
    metadata = dict(info.metadata)
    expected = {
        "kind": "nnunet",
        "radius": 7,
        "channel": 0,
        "channel_name": "CT",
        "intensity": "ct",
    }
    assert {key: metadata[key] for key in expected} == expected
    again = reader_of(metadata)
    assert (again.classes, again.facts, again.radius) == (reader.classes, reader.facts, 7)


def test_readers_of_other_kinds_come_from_metadata_too():
    assert reader_of({"kind": "acdc"}) == READERS["acdc"]
    with pytest.raises(ValueError, match="kind 'mr'; expected one of"):
        reader_of({"kind": "mr"})


# Faults.


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"labels": {"background": 0, "tumour": [1, 2]}}, "has no regions_class_order"),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, "the ignore label is 1; expected 2"),
        ({"labels": {"background": 0, "a": 2}}, "labels are numbered 0, 2"),
        ({"labels": {"0": "background", "1": "a"}}, "nnUNetv2_convert_MSD_dataset"),
        ({"labels": {"background": 0, "a": True}}, "labels is"),
        ({"labels": {f"c{i}": i for i in range(257)}}, "has 257 labels"),
        ({"labels": {}}, "labels is {}"),
        ({"labels": None}, "has no labels"),
        ({"channel_names": None}, "has no channel_names"),
        ({"channel_names": None, "modality": {"0": "CT"}}, "nnUNetv2_convert_MSD_dataset"),
        ({"channel_names": {"1": "CT"}}, "channel_names is"),
        ({"file_ending": ".png"}, r"file_ending is '.png'; expected .nii.gz, .nii, .nrrd, "),
        ({"file_ending": None}, "has no file_ending"),
        ({"dataset": {"case_001": {}}}, "lists its files under 'dataset'"),
    ],
)
def test_each_fault_of_the_description_is_one_line(tmp_path, changes, found):
    describe(write_nnunet(tmp_path), **changes)
    reader = open_nnunet(tmp_path)
    (fault,) = reader.find(tmp_path)[1]
    assert fault.path == tmp_path / "dataset.json"
    with pytest.raises(DatasetError, match=found):
        raise DatasetError([fault])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("{", "is not JSON"),
        ("[]", "does not hold an object"),
    ],
)
def test_a_description_that_cannot_be_read_is_a_fault(tmp_path, content, found):
    path = write_nnunet(tmp_path) / "dataset.json"
    path.unlink()
    if content:
        path.write_text(content)
    ((name, what),) = faults_of(tmp_path)  # the volumes are found all the same
    assert name == "dataset.json"
    assert what.startswith(found)


def test_all_faults_of_description_names_and_volumes_come_at_once(tmp_path):
    write_nnunet(tmp_path, labelled=("a", "b", "c", "d"), test=("e",), channels=("CT", "T2"))
    describe(tmp_path, labels={"background": 0, "heart": [1, 2]})
    train, labels = tmp_path / "imagesTr", tmp_path / "labelsTr"
    (train / "a_0001.nii.gz").unlink()
    shutil.copy(train / "b_0000.nii.gz", train / "b.nii.gz")
    shutil.copy(train / "b_0000.nii.gz", train / "b_0007.nii.gz")
    shutil.copy(train / "c_0001.nii.gz", tmp_path / "imagesTs" / "c_0001.nii.gz")
    shutil.copy(labels / "a.nii.gz", labels / "z.nii.gz")
    shutil.copy(labels / "a.nii.gz", labels / "a.nii")
    (train / "notes.txt").write_text("no volume")
    save(labels / "d.nii.gz", np.full((40, 36, 6), 200, np.uint8), (1, 1, 1))
    with pytest.raises(DatasetError) as error:
        prepare_dataset(
            open_nnunet(tmp_path, channel="T2"),
            tmp_path,
            tmp_path / "data",
            name="mine",
            options=Options(),
            num_workers=0,
        )
    faults = [fault for fault in error.value.faults if fault.stops]
    assert [(fault.path.name, fault.found.split(",")[0]) for fault in faults] == [
        ("dataset.json", "has no regions_class_order"),
        ("a_0000.nii.gz", "has no channel 1 next to it"),
        ("b.nii.gz", "its name does not fit this layout"),
        ("b_0007.nii.gz", "belongs to channel 7"),
        ("c_0001.nii.gz", "is a second case 'c'"),
        ("a.nii", "its name does not fit this layout"),
        ("d.nii.gz", "its affine differs from the image's by up to 54.8 mm"),
        ("z.nii.gz", "has no image in imagesTr"),
    ]
    assert [f.path.name for f in error.value.faults if not f.stops] == ["notes.txt"]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be-mark"])
def test_a_description_of_any_system_is_read(tmp_path, encoding):
    write_nnunet(tmp_path, channels=("Käse",))
    path = tmp_path / "dataset.json"
    text = path.read_text().replace(", ", ",\r\n")
    content = codecs.BOM_UTF16_BE + text.encode("utf-16-be") if "mark" in encoding else None
    path.write_bytes(content or text.encode(encoding))
    reader = open_nnunet(tmp_path)
    assert reader.find(tmp_path)[1] == []
    assert (reader.channel_names, len(reader.classes)) == (("Käse",), 3)


def test_labels_named_as_images_are_one_line_with_both_names(tmp_path):
    write_nnunet(tmp_path, labelled=("a", "b"))
    labels = tmp_path / "labelsTr"
    (labels / "a.nii.gz").rename(labels / "a_0000.nii.gz")
    shutil.copy(labels / "b.nii.gz", labels / "b_seg.nii.gz")
    faults = open_nnunet(tmp_path).find(tmp_path)[1]
    assert [f"{f.path.name}: {f.found}; {f.remedy}" for f in faults] == [
        "a_0000.nii.gz: has the name of its image, imagesTr/a_0000.nii.gz; rename it to a.nii.gz",
        "b_seg.nii.gz: has no image in imagesTr; move it away: b_0000.nii.gz has labels, b.nii.gz",
    ]


def test_images_without_a_channel_are_known_by_their_labels(tmp_path):
    write_nnunet(tmp_path, labelled=("amos_0001", "plain"))
    train = tmp_path / "imagesTr"
    (train / "amos_0001_0000.nii.gz").rename(train / "amos_0001.nii.gz")
    (train / "plain_0000.nii.gz").rename(train / "plain.nii.gz")
    sources, faults = open_nnunet(tmp_path).find(tmp_path)
    assert sources == []
    assert [f"{f.path.name}: {f.found}; {f.remedy}" for f in faults] == [
        f"{stem}.nii.gz: has no channel in its name; rename it to {stem}_0000.nii.gz"
        for stem in ("amos_0001", "plain")
    ]


def test_links_to_nothing_folders_and_the_images_as_labels_are_faults(tmp_path):
    write_nnunet(tmp_path, labelled=("a", "b", "c"), unlabelled=("d",))
    image = tmp_path / "imagesTr" / "a_0000.nii.gz"
    image.unlink()
    image.symlink_to("../.git/annex/objects/a")
    label = tmp_path / "labelsTr" / "b.nii.gz"
    label.unlink()
    label.mkdir()
    (tmp_path / "more").mkdir()
    sources, faults = open_nnunet(tmp_path).find(tmp_path)
    assert [source.id for source in sources] == ["c", "d"]
    assert {(f.path.name, f.found, f.stops) for f in faults} == {
        ("a_0000.nii.gz", "is a link to ../.git/annex/objects/a, which does not exist", True),
        ("b.nii.gz", "is a folder with the name of a scan", True),
        ("more", "is a folder that is not used", False),
    }
    shutil.rmtree(tmp_path / "labelsTr")
    (tmp_path / "labelsTr").symlink_to("imagesTr")
    assert ("labelsTr", "is the same folder as imagesTr") in faults_of(tmp_path)


def test_volumes_cut_in_other_planes_are_a_finding_in_check_and_preparation(tmp_path, capsys):
    write_nnunet(tmp_path / "raw", labelled=("a", "b", "c"))
    path = tmp_path / "raw" / "imagesTr" / "s_0000.nii.gz"
    values = np.random.default_rng(0).integers(0, 99, (5, 40, 44), np.int16)
    nib.save(nib.Nifti1Image(values, np.diag([-8.0, -0.6, 0.6, 1])), path)
    arguments = ["--dataset", "nnunet", "--raw_dir", str(tmp_path / "raw"), "--num_workers", "0"]
    line = f"note: {path}: is cut in sagittal slices, most other volumes in axial ones; "
    assert main([*arguments, "--check"]) == 0
    out, err = capsys.readouterr()
    assert "cut in axial and sagittal slices" in out
    assert err.startswith(line)
    assert main([*arguments, "--check", "--strict"]) == 2
    assert capsys.readouterr().err.startswith(line.replace("note", "error"))
    data = ["--data_dir", str(tmp_path), "--max_keypoints", "16"]
    for _ in ("new", "already there"):
        assert main([*arguments, *data]) == 0
        assert capsys.readouterr().err.startswith(line)
    metadata = json.loads((tmp_path / "nnunet" / "1.0.0" / "metadata.json").read_bytes())
    assert metadata["planes"] == ["axial", "sagittal"]
    assert metadata["volumes"]["s"]["plane"] == "sagittal"


def test_long_names_of_any_script_are_splits_of_their_own():
    cases = [character * n for character in "a本" for n in (100, 121, 200)]
    names = {split_name(case) for case in (*cases, *(case + "b" for case in cases))}
    assert len(names) == 12
    assert max(map(len, names)) == 120
    assert split_name("a" * 120) == "a" * 120
    assert split_name("\udcff" * 40) != split_name("\udcfe" * 40)


def test_labels_beyond_the_classes_are_a_fault(tmp_path):
    write_nnunet(tmp_path, labels={"background": 0, "ventricles": 1})
    reader = open_nnunet(tmp_path)
    with pytest.raises(DatasetError, match="labels up to 2; expected whole numbers from 0 to 1"):
        inspect(reader, reader.find(tmp_path)[0][0])


def test_missing_folders_and_unknown_channels_are_faults(tmp_path):
    assert faults_of(tmp_path / "none") == [("none", "is not a folder")]
    write_nnunet(tmp_path, labelled=(), channels=("T1", "T2"))
    assert faults_of(tmp_path) == [(tmp_path.name, "holds no volume")]
    assert faults_of(tmp_path, channel="FLAIR")[0] == ("dataset.json", "has no channel FLAIR")
    assert faults_of(tmp_path, channel="2")[0] == ("dataset.json", "has no channel 2")
    with pytest.raises(ValueError, match="radius is 0"):
        open_nnunet(tmp_path, radius=0)


def test_sagittal_scans_are_cut_where_they_were_scanned(tmp_path):
    write_nnunet(tmp_path, labelled=("a",))
    path = tmp_path / "imagesTr" / "a_0000.nii.gz"
    values = np.random.default_rng(0).integers(0, 99, (5, 30, 34), np.int16)
    # x to the left in steps of 4 mm; y to the back; z to the head
    nib.save(nib.Nifti1Image(values, np.diag([-4.0, -0.6, 0.6, 1])), path)
    volume = open_nnunet(tmp_path).read(Source("a", path))
    np.testing.assert_array_equal(volume.image, values[:, :, ::-1].transpose(2, 1, 0))
    np.testing.assert_allclose(volume.spacing, (0.6, 0.6, 4), rtol=1e-6)


# The command.


def test_a_folder_is_prepared_under_a_name_of_its_own(tmp_path, capsys):
    write_nnunet(tmp_path / "raw", channels=("CT", "T2"), unlabelled=("u",))
    arguments = "--dataset nnunet --channel T2 --name heart --max_keypoints 64 --num_workers 0"
    arguments = [*arguments.split(), "--raw_dir", str(tmp_path / "raw")]
    assert main([*arguments, "--data_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"Prepared 3 volumes, 18 slices, in {tmp_path / 'heart' / '1.0.0'}" in out
    assert "with labels: 2 of 3 volumes\n" in out
    assert "channel_name: T2\nintensity: zscore\n" in out
    assert (
        "Next: kafjax train --config own_pretrain --config.data.name=heart "
        f"--config.data.dir={tmp_path}\n"
    ) in out
    assert main([*arguments, "--data_dir", str(tmp_path), "--channel", "CT"]) == 2
    found = capsys.readouterr().err
    for line in ("channel: 1 there, 0 asked for", "intensity: zscore there, ct asked for"):
        assert line in found
