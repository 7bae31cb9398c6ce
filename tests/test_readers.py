"""Raw files to volumes: orientation and the way back, every fault, the CHD rules."""

import gzip
import itertools
import shutil

import nibabel as nib
import numpy as np
import pytest
from nibabel import orientations

from data_prep.faults import DatasetError
from data_prep.findings import equal_images, findings_of
from data_prep.nifti import from_slices, read_nifti, to_slices
from data_prep.readers import READERS
from data_prep.volumes import Source, Volume, inspect

CHD = READERS["chd"]
AFFINE = np.array([[-0.7, 0, 0, 31], [0, -0.8, 0, 22], [0, 0, 2.5, -60], [0, 0, 0, 1.0]])


def save(path, array, affine=AFFINE, **header):
    image = nib.Nifti1Image(array, affine)
    for field, value in header.items():
        image.header[field] = value
    nib.save(image, path)
    return path


def random_image(seed=0, shape=(6, 7, 5)):
    return np.random.default_rng(seed).integers(-1000, 1000, shape, np.int16)


def random_label(seed=0, shape=(6, 7, 5)):
    return np.random.default_rng(seed).integers(0, 8, shape, np.uint8)


def save_pair(folder, number, *, image=None, label=None, affine=AFFINE, label_affine=AFFINE):
    image = random_image(number) if image is None else image
    label = random_label(number) if label is None else label
    save(folder / f"ct_{number}_image.nii.gz", image, affine)
    save(folder / f"ct_{number}_label.nii.gz", label, label_affine)
    return Source(
        f"ct_{number}", folder / f"ct_{number}_image.nii.gz", folder / f"ct_{number}_label.nii.gz"
    )


def faults_of(source):
    with pytest.raises(DatasetError) as error:
        inspect(CHD, source)
    return error.value.faults


# Orientation.


def all_orientations():
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            yield np.array(list(zip(axes, flips, strict=True)))


@pytest.mark.parametrize("turn", list(all_orientations()), ids=str)
def test_every_orientation_reads_as_the_same_slices_and_goes_back(tmp_path, turn):
    upright = random_image()
    there = orientations.apply_orientation(upright, turn)
    affine = AFFINE @ orientations.inv_ornt_aff(turn, upright.shape)
    stored = read_nifti(save(tmp_path / "a.nii.gz", there, affine))
    slices, slices_affine = to_slices(stored.array, stored.affine)
    # The upright file holds [x to the left, y to the back, z up]: rows are y, columns x.
    np.testing.assert_array_equal(slices, upright.transpose(1, 0, 2))
    np.testing.assert_allclose(
        slices_affine @ (2, 4, 1, 1), AFFINE @ (4, 2, 1, 1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(from_slices(slices, stored.affine), there)


def test_an_oblique_volume_keeps_its_places_and_goes_back(tmp_path):
    angle = np.deg2rad(17)
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    array = random_image()
    stored = read_nifti(save(tmp_path / "a.nii", array, rotation @ AFFINE))
    slices, affine = to_slices(stored.array, stored.affine)
    for row, col, k in ((0, 0, 0), (3, 2, 4), (6, 5, 1)):
        assert slices[row, col, k] == array[col, row, k]
        here, there = affine @ (row, col, k, 1), rotation @ AFFINE @ (col, row, k, 1)
        np.testing.assert_allclose(here, there, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(from_slices(slices, stored.affine), array)


def test_spacing_is_in_row_col_slice_order(tmp_path):
    volume = CHD.read(save_pair(tmp_path, 1001))
    np.testing.assert_allclose(volume.spacing, (0.8, 0.7, 2.5), rtol=1e-6)
    assert volume.image.shape == volume.label.shape == (7, 6, 5)


# Values.


@pytest.mark.parametrize(
    ("stored", "slope", "inter", "dtype"),
    [
        ("int16", 1, 0, "int16"),
        ("uint16", 1, 0, "uint16"),
        ("uint8", 1, 0, "uint8"),
        ("float64", 1, 0, "float32"),
        ("int16", 1, -1024, "int16"),
        ("int16", 1000, 0, "int32"),
        ("int16", 0.37, 5, "float32"),
    ],
)
def test_types_are_kept_where_values_allow(tmp_path, stored, slope, inter, dtype):
    raw = np.random.default_rng(0).integers(0, 250, (4, 5, 6)).astype(stored)
    image = nib.Nifti1Image(raw, AFFINE)
    image.header.set_slope_inter(slope, inter)
    image.to_filename(tmp_path / "a.nii.gz")
    if (slope, inter) != (1, 0):  # nibabel scales what it writes: put the raw values back
        content = bytearray(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
        content[352:] = raw.tobytes(order="F")
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(content)))
    array = read_nifti(tmp_path / "a.nii.gz").array
    assert array.dtype == dtype
    np.testing.assert_allclose(array, raw.astype(np.float64) * slope + inter, rtol=1e-6)


def test_whole_labels_stored_as_floats_are_labels(tmp_path):
    label = random_label()
    source = save_pair(tmp_path, 1001, label=label.astype(np.float32))
    np.testing.assert_array_equal(CHD.read(source).label, label.transpose(1, 0, 2))


def test_chd_labels_above_seven_become_background(tmp_path):
    label = random_label().astype(np.int16)
    label[0, :, :] = [8, 9, 300, 7, 12]
    read = CHD.read(save_pair(tmp_path, 1001, label=label)).label
    expected = np.where(label > 7, 0, label).transpose(1, 0, 2)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, expected)


# Faults of one volume.


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    image = random_image(shape=(12, 12, 8))
    path = save(tmp_path / "a.nii.gz", image)
    good, rng, noticed = path.read_bytes(), np.random.default_rng(0), 0
    for position in rng.integers(0, len(good) * 8, 80):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << (position % 8)
        path.write_bytes(bytes(bad))
        try:
            read = read_nifti(path)
        except DatasetError:
            noticed += 1
        else:  # a flip in gzip's own header, such as the time
            np.testing.assert_array_equal(read.array, image)
    assert noticed >= 75


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -9])
def test_a_truncated_file_is_a_fault(tmp_path, kept):
    source = save_pair(tmp_path, 1001)
    source.image.write_bytes(source.image.read_bytes()[:kept])
    (fault,) = faults_of(source)
    assert fault.path == source.image
    assert any(word in fault.found for word in ("truncated", "empty", "damaged"))
    assert "copy or download" in fault.remedy


def spoil(name, source):
    image, label = random_image(1001), random_label(1001)
    if name == "not gzip":
        source.image.write_bytes(b"not a gzip stream")
    elif name == "not NIfTI":
        source.image.write_bytes(gzip.compress(b"hello" * 100))
    elif name == "short values":
        content = gzip.decompress(source.image.read_bytes())[:-50]
        source.image.write_bytes(gzip.compress(content))
    elif name == "2-d":
        save(source.image, image[:, :, 0])
    elif name == "4-d":
        save(source.image, np.stack([image] * 3, -1))
    elif name == "NaN":
        values = image.astype(np.float32)
        values[1, 2, 3], values[0, 0, 0] = np.nan, np.inf
        save(source.image, values)
    elif name == "constant":
        save(source.image, np.full_like(image, -1024))
    elif name == "nearly constant":
        values = np.zeros_like(image)
        values[0, 0, 0] = 9
        save(source.image, values)
    elif name == "RGB":
        save(source.image, np.zeros(image.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    elif name == "other shape":
        save(source.label, label[:, :, :-1])
    elif name == "other affine":
        moved = AFFINE.copy()
        moved[0, 3] += 0.5
        save(source.label, label, moved)
    elif name == "negative label":
        save(source.label, label.astype(np.int16) - 1)
    elif name == "fractional label":
        save(source.label, label.astype(np.float32) / 2)
    elif name == "singular affine":
        content = bytearray(gzip.decompress(source.image.read_bytes()))
        content[280:296] = bytes(16)  # the header's srow_x
        source.image.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("not gzip", "gzip stream is damaged"),
        ("not NIfTI", "not a NIfTI file"),
        ("short values", "values cannot be read"),
        ("2-d", r"2-d, shape \(6, 7\)"),
        ("4-d", r"4-d, shape \(6, 7, 5, 3\)"),
        ("NaN", "2 values are NaN or infinite"),
        ("constant", "every value is -1024"),
        ("nearly constant", "constant between its 1st and 99th percentile"),
        ("RGB", "holds"),
        ("other shape", r"shape \(6, 7, 4\), but the image has \(6, 7, 5\)"),
        ("other affine", "affine differs from the image's by up to 0.5 mm"),
        ("negative label", "negative labels, down to -1"),
        ("fractional label", "not whole numbers"),
        ("singular affine", "affine is singular"),
    ],
)
def test_each_fault_names_file_finding_and_remedy(tmp_path, name, found):
    source = save_pair(tmp_path, 1001)
    spoil(name, source)
    (fault,) = faults_of(source)
    on_label = "label" in name or name.startswith("other")
    assert fault.path.name == (source.label if on_label else source.image).name
    assert fault.remedy
    with pytest.raises(DatasetError, match=found):
        inspect(CHD, source)


def test_faults_of_image_and_label_are_reported_together(tmp_path):
    source = save_pair(tmp_path, 1001)
    spoil("constant", source)
    spoil("negative label", source)
    assert [fault.path for fault in faults_of(source)] == [source.image, source.label]
    source.image.write_bytes(b"")
    assert [fault.path for fault in faults_of(source)] == [source.image, source.label]


def test_a_label_whose_voxels_fit_is_not_to_be_resampled(tmp_path):
    """Resampling by the wrong header would throw labels away and pass the next check."""
    source = save_pair(tmp_path, 1001, label_affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    (fault,) = faults_of(source)
    assert fault.remedy.startswith("do not resample it: its shape is the image's")
    assert "save it with the image's affine" in fault.remedy
    # The remedy, followed, keeps every label.
    label = np.asarray(nib.load(source.label).dataobj)
    save(source.label, label, nib.load(source.image).affine)
    np.testing.assert_array_equal(CHD.read(source).label, label.transpose(1, 0, 2))


def test_a_label_that_is_the_image_is_a_fault(tmp_path):
    source = save_pair(tmp_path, 1001, image=random_label().astype(np.int16))
    shutil.copy(source.image, source.label)
    (fault,) = faults_of(source)
    assert (fault.path, fault.found) == (source.label, "is the image itself")


def test_a_rounding_difference_of_affines_is_no_fault(tmp_path):
    nudged = AFFINE.copy()
    nudged[:3, 3] += 1e-4
    inspect(CHD, save_pair(tmp_path, 1001, label_affine=nudged))


# Faults of a folder.


def test_numbers_may_have_gaps_and_are_in_order(tmp_path):
    for number in (1101, 1003, 999):
        save_pair(tmp_path, number)
    (tmp_path / "README.txt").write_text("notes")
    (tmp_path / "._ct_1003_image.nii.gz").write_bytes(b"of another system")
    sources, (note,) = CHD.find(tmp_path)
    assert [source.id for source in sources] == ["ct_999", "ct_1003", "ct_1101"]
    assert (note.path.name, note.found, note.stops) == ("README.txt", "is not used", False)


def test_all_faults_of_names_are_found_at_once(tmp_path):
    for number in (1001, 1002, 1003, 1004):
        save_pair(tmp_path, number)
    (tmp_path / "ct_1001_label.nii.gz").unlink()
    (tmp_path / "ct_1002_image.nii.gz").unlink()
    shutil.copy(tmp_path / "ct_1003_image.nii.gz", tmp_path / "ct_01003_image.nii.gz")
    shutil.copy(tmp_path / "ct_1003_image.nii.gz", tmp_path / "ct_1003_image copy.nii.gz")
    sources, faults = CHD.find(tmp_path)
    found = {fault.path.name: fault.found for fault in faults}
    assert found == {
        "ct_1001_image.nii.gz": "has no label next to it",
        "ct_1002_label.nii.gz": "has no image next to it",
        "ct_1003_image.nii.gz": "is a second file of ct_1003",
        "ct_1003_image copy.nii.gz": "its name does not fit this layout",
    }
    assert [source.id for source in sources] == ["ct_1001", "ct_1003", "ct_1004"]


def test_a_missing_or_empty_folder_is_a_fault(tmp_path):
    for folder, found in ((tmp_path / "none", "is not a folder"), (tmp_path, "holds no volume")):
        sources, (fault,) = CHD.find(folder)
        assert (sources, fault.path, fault.found) == ([], folder, found)


def test_equal_images_are_a_finding_however_they_are_stored(tmp_path):
    first, second, third = (save_pair(tmp_path, number) for number in (1001, 1002, 1003))
    other = save_pair(tmp_path, 1004)
    content = gzip.decompress(first.image.read_bytes())
    second.image.write_bytes(gzip.compress(content, compresslevel=9, mtime=7))
    save(third.image, random_image(1001).astype(np.float32))
    sources = [first, second, third, other]
    facts = {source.id: inspect(CHD, source) for source in sources}
    assert equal_images(facts.values()) == [["ct_1001", "ct_1002", "ct_1003"]]
    findings = findings_of(CHD, sources, facts)
    assert [finding.path for finding in findings] == [second.image, third.image]
    for finding in findings:
        assert not finding.stops
        assert finding.found == "has the same values as ct_1001_image.nii.gz"
        assert "ct_1001" in finding.remedy


# The CHD rules.


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
def test_chd_clips_to_percentiles_and_truncates(dtype):
    rng = np.random.default_rng(3)
    raw = rng.normal(0 if dtype != "uint16" else 5000, 300, (9, 10, 11)).astype(dtype)
    low, high = np.percentile(raw, [1, 99])
    expected = np.clip(raw.astype(np.float64), low, high).astype(dtype)
    prepared = CHD.prepare(Volume("ct_1", raw, None, (1.0, 1.0, 1.0), np.eye(4), {"a": ""}))
    assert prepared.volume.image.dtype == dtype
    np.testing.assert_array_equal(prepared.volume.image, expected)
    np.testing.assert_allclose(prepared.mean, expected.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(prepared.std, expected.std(dtype=np.float64), rtol=1e-6)


def test_chd_reach_is_five_percent_and_at_least_one():
    expected = {1: 1, 12: 1, 19: 1, 20: 1, 39: 1, 40: 2, 100: 5, 140: 7, 199: 9, 200: 10, 275: 13}
    assert {n: CHD.reach(n) for n in expected} == expected


def test_facts_describe_the_volume(tmp_path):
    facts = inspect(CHD, save_pair(tmp_path, 1001))
    assert (facts.id, facts.size, facts.num_slices) == ("ct_1001", (7, 6), 5)
    assert (facts.dtype, facts.labelled) == ("int16", True)
    assert sorted(facts.sha256) == ["ct_1001_image.nii.gz", "ct_1001_label.nii.gz"]
