"""ACDC: which frames are volumes, their grid and intensities, and all faults of the folders."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_prep.acdc import AcdcReader
from data_prep.builder import Options
from data_prep.faults import DatasetError
from data_prep.prepare import prepare_dataset
from data_prep.readers import reader_of
from data_prep.volumes import inspect
from kafjax.data.records import RecordReader, load_decoder
from kafjax.data.splits import subject_of
from tests.raw_layouts import SPACING, save, write_acdc

ACDC, CINE = AcdcReader(), AcdcReader(cine=True)


@pytest.fixture(scope="module")
def raw_dir(tmp_path_factory):
    return write_acdc(tmp_path_factory.mktemp("acdc"))


@pytest.fixture
def spoilt(raw_dir, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(raw_dir, tmp_path / "raw")


def found_faults(raw_dir, reader=ACDC):
    return {fault.path.name: fault.found for fault in reader.find(raw_dir)[1]}


def oracle(path, order, pixel):
    """A file [x, y, z] on a grid of about `pixel` mm as [row, col, slice], and its edges."""
    values = np.asarray(nib.load(path).dataobj).astype(np.float64)
    size = [
        int(np.floor(n * mm / pixel + 0.5)) for n, mm in zip(values.shape, SPACING, strict=False)
    ]
    grid = np.meshgrid(
        *[
            (np.arange(new) + 0.5) * old / new - 0.5
            for new, old in zip(size[:2], values.shape, strict=False)
        ],
        indexing="ij",
    )

    def at_grid(plane):
        return ndimage.map_coordinates(plane, grid, order=order, mode="nearest")

    if order == 1:
        shares = [
            [at_grid((plane == c) * 1.0) for c in range(4)] for plane in values.T.swapaxes(1, 2)
        ]
        resampled = np.argmax(shares, axis=1)
    else:
        resampled = np.array([at_grid(plane) for plane in values.T.swapaxes(1, 2)])
    edges = [n * mm / new for n, mm, new in zip(values.shape, SPACING, size[:2], strict=False)]
    return resampled.transpose(2, 1, 0), edges


# Volumes.


def test_the_two_labelled_frames_are_volumes(raw_dir):
    sources, faults = ACDC.find(raw_dir)
    assert faults == []
    assert [(source.id, source.frame) for source in sources] == [
        (f"patient00{n}_frame0{frame}", None) for n in (1, 2) for frame in (1, 4)
    ]
    assert sources[1].label.name == "patient001_frame04_gt.nii.gz"


@pytest.mark.parametrize(("index", "pixel"), [(0, 1.25), (3, 1.25), (3, 2.7)])
def test_volumes_equal_scipys_on_the_new_grid(raw_dir, index, pixel):
    reader = AcdcReader(pixel_spacing=pixel)
    source = reader.find(raw_dir)[0][index]
    prepared = reader.prepare(reader.read(source))
    volume = prepared.volume
    image, (column_mm, row_mm) = oracle(source.image, 3, pixel)
    label, _ = oracle(source.label, 1, pixel)
    assert (volume.image.dtype, volume.label.dtype) == (np.float32, np.uint8)
    np.testing.assert_allclose(volume.image, image, rtol=1e-4, atol=0.05)
    assert (volume.label == label).mean() > 0.999
    assert set(np.unique(volume.label)) == {0, 1, 2, 3}
    np.testing.assert_allclose(volume.spacing, (row_mm, column_mm, 10), rtol=1e-6)
    np.testing.assert_allclose(nib.affines.voxel_sizes(volume.affine), volume.spacing, rtol=1e-6)
    np.testing.assert_allclose(
        (prepared.mean, prepared.std), (image.mean(), image.std()), rtol=1e-4
    )


def test_the_radius_is_the_same_in_millimetres_on_every_grid():
    assert [AcdcReader(pixel_spacing=mm).radius for mm in (1.25, 2.5, 2)] == [30, 15, 19]
    metadata = {"kind": "acdc", "pixel_spacing": 2.5}
    assert reader_of(metadata) == AcdcReader(pixel_spacing=2.5)
    assert reader_of({"kind": "acdc"}) == ACDC


def test_reach_is_eighteen_percent_and_at_most_two():
    expected = {1: 1, 5: 1, 6: 1, 10: 1, 11: 1, 12: 2, 16: 2, 17: 2, 30: 2}
    assert {n: ACDC.reach(n) for n in expected} == expected


def test_patients_may_lie_in_training_and_testing(tmp_path):
    write_acdc(tmp_path / "training", 2)
    write_acdc(tmp_path / "testing", 1, first=101, labelled=False)
    sources, faults = ACDC.find(tmp_path)
    assert faults == []
    assert [source.id for source in sources if source.label is None] == [
        "patient101_frame01",
        "patient101_frame04",
    ]
    assert len(sources) == 6


def test_cine_adds_the_other_frames_without_labels(raw_dir):
    sources, faults = CINE.find(raw_dir)
    assert faults == []
    assert [(source.id[-7:], source.label is None) for source in sources[:5]] == [
        ("frame01", False),
        ("frame02", True),
        ("frame03", True),
        ("frame04", False),
        ("frame05", True),
    ]
    assert {subject_of(source.id) for source in sources} == {"patient001", "patient002"}
    cine = np.asarray(nib.load(sources[2].image).dataobj)
    volume = CINE.read(sources[2])
    np.testing.assert_array_equal(volume.image, cine[..., 2].transpose(1, 0, 2))
    assert list(volume.sha256) == ["patient001_4d.nii.gz"]


def test_slices_lie_across_the_coarsest_axis_however_the_file_is_turned(tmp_path, raw_dir):
    source = ACDC.find(raw_dir)[0][0]
    expected = ACDC.read(source).image
    image = nib.load(source.image)
    oblique = np.eye(4)  # a short axis: nearer to the front than to the head
    angle = np.deg2rad(60)
    oblique[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), oblique @ image.affine), tmp_path / "a.nii")
    nib.save(image.as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), tmp_path / "b.nii")
    for name in ("a.nii", "b.nii"):
        read = ACDC.read(type(source)("patient001_frame01", tmp_path / name)).image
        assert read.shape[2] == 6
        assert np.array_equal(np.sort(read, axis=None), np.sort(expected, axis=None))
    np.testing.assert_array_equal(read, expected)


def test_a_prepared_dataset_holds_floats_and_facts(raw_dir, tmp_path):
    directory = prepare_dataset(
        CINE, raw_dir, tmp_path, name="acdc_cine", options=Options(max_keypoints=64), num_workers=0
    ).directory
    records, decode = RecordReader(directory), load_decoder(directory)
    assert list(records.splits)[:2] == ["patient001_frame01", "patient001_frame02"]
    first, second = (decode(records[records.record_number(v, 2)]) for v in list(records.splits)[:2])
    assert first["image"].dtype == np.float32
    assert (first["has_label"], second["has_label"]) == (True, False)
    assert first["label"].any()
    assert not second["label"].any()
    volume = CINE.prepare(CINE.read(CINE.find(raw_dir)[0][0]))
    np.testing.assert_array_equal(first["image"][..., 0], volume.volume.image[:, :, 2])
    np.testing.assert_allclose((first["mean"], first["std"]), (volume.mean, volume.std), rtol=1e-6)
    metadata = json.loads((directory / "metadata.json").read_text())
    expected = {"kind": "acdc", "radius": 30, "reach": 1, "pixel_spacing": 1.25}
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["volumes"]["patient002_frame05"]["reach"] == 1


# Faults.


def test_all_faults_of_names_and_info_are_found_at_once(spoilt):
    write_acdc(spoilt / "training", 4, first=2)
    one, three, four, five = (
        spoilt / "patient001",
        *(spoilt / "training" / f"patient00{n}" for n in (3, 4, 5)),
    )
    (one / "patient001_frame04_gt.nii.gz").unlink()
    (one / "notes.nii.gz").write_bytes(b"")
    shutil.copy(one / "patient001_frame01.nii.gz", one / "patient001_frame01.nii")
    (three / "Info.cfg").write_text("ED: first\nGroup: NOR\n")
    (four / "Info.cfg").unlink()
    (five / "patient005_frame01.nii.gz").rename(five / "patient005_frame03.nii.gz")
    faults = ACDC.find(spoilt)[1]
    assert {(str(f.path.relative_to(spoilt)), f.found) for f in faults} == {
        ("training/patient002", "is a second folder of patient 2"),
        ("patient001", "has no patient001_frame04_gt.nii.gz"),
        ("patient001/notes.nii.gz", "its name does not match this patient's files"),
        ("patient001/patient001_frame01.nii.gz", "is a second patient001_frame01.nii"),
        ("training/patient003/Info.cfg", "ED is 'first'"),
        ("training/patient003/Info.cfg", "has no ES"),
        ("training/patient004/Info.cfg", "cannot be read (No such file or directory)"),
        ("training/patient005", "has no patient005_frame01.nii.gz"),
        (
            "training/patient005/patient005_frame03.nii.gz",
            "its frame is not one of Info.cfg's, 1 and 4",
        ),
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b"\n", b"\r"),
        lambda text: text.rstrip(b"\n"),
        lambda text: text.decode().encode("utf-16"),
        lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n").rstrip(b"\r\n"),
        lambda text: text + b"Name: M\xfcller\n",
    ],
    ids=["mark", "CRLF", "CR", "no end", "UTF-16", "all", "Latin-1"],
)
def test_info_of_any_system_is_read(spoilt, change):
    path = spoilt / "patient001" / "Info.cfg"
    path.write_bytes(change(b"ED: 1\nES: 4\n"))
    sources, faults = ACDC.find(spoilt)
    assert faults == []
    assert len(sources) == 4


def test_patients_that_are_named_otherwise_or_are_links_to_nothing_are_faults(spoilt):
    (spoilt / "patient002").rename(spoilt / "Patient002")
    (spoilt / "patient003").symlink_to("../elsewhere/patient003")
    (spoilt / "Training").mkdir()
    (spoilt / "patient001" / "Info.cfg").rename(spoilt / "patient001" / "info.cfg")
    (spoilt / "copies" / "patient004").mkdir(parents=True)
    shutil.copy(spoilt / "patient001" / "patient001_frame01.nii.gz", spoilt / "copies" / "a.nii.gz")
    found = {fault.path.name: (fault.found, fault.stops) for fault in ACDC.find(spoilt)[1]}
    assert found == {
        "Patient002": ("its name is not a patient's", True),
        "patient003": ("is a link to ../elsewhere/patient003, which does not exist", True),
        "Training": ("its name does not fit this layout", True),
        "info.cfg": ("its name does not fit this layout", True),
        "Info.cfg": ("cannot be read (No such file or directory)", True),
        "copies": ("is a folder that is not used, with 1 scans", False),
    }


def test_a_patient_twice_is_prepared_and_recorded(raw_dir, tmp_path):
    raw = shutil.copytree(raw_dir, tmp_path / "raw")
    for path in sorted((raw / "patient001").iterdir()):
        target = raw / "patient009" / path.name.replace("patient001", "patient009")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    names = ["patient001_frame01", "patient009_frame01", "patient001_frame04", "patient009_frame04"]
    pairs = [names[:2], names[2:]]

    def prepare(**options):
        return prepare_dataset(
            ACDC,
            raw,
            tmp_path / "data",
            name="acdc",
            options=Options(max_keypoints=16),
            num_workers=0,
            **options,
        )

    with pytest.raises(DatasetError, match=r"has the same values as patient001_frame01\.nii\.gz"):
        prepare(strict=True)
    assert not (tmp_path / "data").exists()
    for already in (False, True):
        summary = prepare()
        assert summary.already_prepared == already
        assert [finding.path.name for finding in summary.findings] == [
            f"{name}.nii.gz" for name in names[1::2]
        ]
        for finding, pair in zip(summary.findings, pairs, strict=True):
            assert all(name in str(finding) for name in pair)
    metadata = json.loads((summary.directory / "metadata.json").read_bytes())
    assert metadata["equal_images"] == pairs
    with pytest.raises(DatasetError, match="has the same values"):
        prepare(strict=True)
    assert summary.directory.exists()


def test_a_folder_without_patients_or_cine_is_a_fault(tmp_path, spoilt):
    assert found_faults(tmp_path / "none") == {"none": "is not a folder"}
    (tmp_path / "empty").mkdir()
    assert found_faults(tmp_path / "empty") == {"empty": "holds no patient's folder"}
    (spoilt / "patient002" / "patient002_4d.nii.gz").unlink()
    assert found_faults(spoilt) == {}
    assert found_faults(spoilt, CINE) == {"patient002": "has no patient002_4d.nii.gz"}


def test_a_damaged_cine_is_one_fault(spoilt):
    path = spoilt / "patient001" / "patient001_4d.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DatasetError) as error:
        prepare_dataset(
            CINE, spoilt, spoilt / "data", name="acdc", options=Options(), num_workers=0
        )
    (fault,) = error.value.faults
    assert (fault.path, fault.found) == (path, "its gzip stream is truncated")


def test_a_bad_frame_is_named(spoilt):
    path = spoilt / "patient001" / "patient001_4d.nii.gz"
    cine = np.asarray(nib.load(path).dataobj).copy()
    cine[..., 2] = 5
    save(path, cine)
    source = CINE.find(spoilt)[0][2]
    with pytest.raises(DatasetError, match="frame 3: every value is 5"):
        inspect(CINE, source)
    save(path, cine[..., 0])
    assert found_faults(spoilt, CINE) == {path.name: "3-d, shape (40, 36, 6)"}


@pytest.mark.parametrize("mm", [1e-2, 1e6])
def test_an_absurd_spacing_is_a_fault(spoilt, mm):
    path = spoilt / "patient001" / "patient001_frame01.nii.gz"
    save(path, np.asarray(nib.load(path).dataobj), (mm, mm, 10 * mm))
    source = ACDC.find(spoilt)[0][0]
    with pytest.raises(DatasetError, match=r"pixels of .* mm; correct the header"):
        inspect(ACDC, type(source)(source.id, source.image))


def test_labels_above_three_are_a_fault(spoilt):
    path = spoilt / "patient002" / "patient002_frame01_gt.nii.gz"
    label = np.asarray(nib.load(path).dataobj).copy()
    label[0, 0, 0] = 4
    save(path, label)
    with pytest.raises(DatasetError, match="labels up to 4; expected whole numbers from 0 to 3"):
        inspect(ACDC, ACDC.find(spoilt)[0][2])
