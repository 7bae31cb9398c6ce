"""Phantoms: files, anatomy, contrast, continuity, variation, and that SIFT finds enough."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_prep import sift
from data_prep.phantom import anatomy, drawing
from data_prep.phantom import subjects as phantom
from data_prep.phantom.anatomy import AORTA, LA, LV, MYOCARDIUM, PULMONARY, RA, RV

BLOOD = (LV, RV, LA, RA, AORTA, PULMONARY)


@pytest.fixture(scope="module")
def subjects():
    return [phantom.render((96, 96, 40), number=number) for number in range(1001, 1005)]


def centre(label, structure):
    """Mean voxel (x, y, z) of a structure."""
    return np.argwhere(label == structure).mean(0)


def test_files_have_the_chd_layout_and_a_real_header(phantom_raw):
    names = sorted(path.name for path in phantom_raw.glob("*.nii.gz"))
    kinds = ("image", "label")
    assert names == [f"ct_{n}_{kind}.nii.gz" for n in range(1001, 1005) for kind in kinds]
    image, label = (nib.load(phantom_raw / f"ct_1001_{kind}.nii.gz") for kind in kinds)
    assert image.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    assert image.shape == label.shape == (64, 64, 12)
    np.testing.assert_array_equal(image.affine, label.affine)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    np.testing.assert_allclose(image.header.get_zooms(), (4.125, 4.125, 13.0))
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["qform_code"] == image.header["sform_code"] == 1


def test_same_seed_writes_the_same_bytes(tmp_path):
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        phantom.write_subjects(tmp_path / folder, 2, size=(32, 40, 5), seed=seed)
    a, b, c = (
        [path.read_bytes() for path in sorted((tmp_path / folder).glob("*.nii.gz"))]
        for folder in "abc"
    )
    assert a == b
    assert len(set(a + c)) == 8


def test_every_structure_is_there_and_in_its_place(subjects):
    for _, label in subjects:
        assert np.unique(label).tolist() == list(range(8))
        place = {structure: centre(label, structure) for structure in range(1, 8)}
        assert place[LV][0] > place[RV][0] > place[RA][0]  # left to right
        assert place[LA][1] > place[LV][1] > place[RV][1]  # back to front
        assert place[PULMONARY][2] > max(place[c][2] for c in (LV, RV, LA, RA))
        assert np.linalg.norm(place[MYOCARDIUM] - place[LV]) < 15
        # The aorta passes below the heart, before the spine, and above it.
        aorta = np.argwhere(label == AORTA)[:, 2]
        assert aorta.min() == 0
        assert aorta.max() >= 34


def test_myocardium_wraps_the_left_ventricle(subjects):
    for _, label in subjects:
        cavity = label == LV
        rim = ndimage.binary_dilation(cavity, iterations=1) & ~cavity
        assert (label[rim] == MYOCARDIUM).mean() > 0.6


def test_chambers_cannot_be_told_by_brightness(subjects):
    for image, label in subjects:
        inner = [ndimage.binary_erosion(label == structure) for structure in BLOOD]
        means = [image[mask].mean() for mask in inner]
        spread = image[inner[0]].std()
        assert max(means) - min(means) < 2 * spread
        myocardium = image[ndimage.binary_erosion(label == MYOCARDIUM)].mean()
        assert min(means) - myocardium > 100


def test_lungs_bone_and_air_are_there(subjects):
    for image, label in subjects:
        around = image[label == 0]
        assert 0.1 < ((around > -950) & (around < -700)).mean() < 0.5  # lungs
        assert (around > 350).mean() > 0.01  # bone and unlabelled blood
        assert (around < -970).mean() > 0.05  # air outside
        assert image.dtype == np.int16
        assert image.min() >= -1024


def test_structures_go_on_from_slice_to_slice():
    _, label = phantom.render((96, 96, 80))
    for structure in range(1, 8):
        mask = label == structure
        counts = mask.sum((0, 1))
        both = (mask[:, :, 1:] & mask[:, :, :-1]).sum((0, 1))
        overlap = 2 * both / np.maximum(counts[1:] + counts[:-1], 1)
        large = np.minimum(counts[1:], counts[:-1]) > 60
        assert large.sum() > 3
        assert overlap[large].mean() > 0.75


def test_subjects_differ_in_shape_pose_and_contrast(subjects):
    volumes = [np.bincount(label.ravel(), minlength=8)[1:] for _, label in subjects]
    assert (np.std(volumes, 0) / np.mean(volumes, 0)).min() > 0.03
    centres = [centre(label, LV) for _, label in subjects]
    assert np.std(centres, 0).max() > 1
    blood = [np.median(image[label == LV]) for image, label in subjects]
    assert max(blood) - min(blood) > 20


@pytest.mark.parametrize("seed", range(6))
def test_sift_finds_a_hundred_keypoints_on_a_mid_slice(seed):
    image, _ = phantom.render((256, 256, 5), seed=seed)
    middle = image[:, :, 2].T
    middle = np.clip(middle, *np.percentile(image, [1, 99]))
    assert sift.find_keypoints(middle, max_keypoints=10_000).num_found >= 100


def test_finished_subjects_are_kept_and_missing_ones_made_again(tmp_path):
    images = phantom.write_subjects(tmp_path, 2, size=(32, 32, 4))
    expected = images[1].read_bytes()
    kept = images[0].stat().st_mtime_ns
    images[1].unlink()
    names = []
    phantom.write_subjects(tmp_path, 2, size=(32, 32, 4), progress=names.append)
    assert images[1].read_bytes() == expected
    assert images[0].stat().st_mtime_ns == kept
    assert names == ["ct_1001", "ct_1002"]


def test_other_phantoms_are_replaced_only_when_asked(tmp_path):
    phantom.write_subjects(tmp_path, 2, size=(32, 32, 4))
    with pytest.raises(ValueError, match=r"'num_subjects': 2.*'num_subjects': 1.*--overwrite"):
        phantom.write_subjects(tmp_path, 1, size=(32, 32, 4))
    phantom.write_subjects(tmp_path, 1, size=(32, 32, 4), overwrite=True)
    assert len(list(tmp_path.glob("*.nii.gz"))) == 2


def test_real_volumes_are_never_replaced(tmp_path):
    (tmp_path / "ct_1001_image.nii.gz").write_bytes(b"a patient")
    with pytest.raises(ValueError, match=r"not phantoms, such as ct_1001_image\.nii\.gz"):
        phantom.write_subjects(tmp_path, 1, size=(32, 32, 4), overwrite=True)
    assert (tmp_path / "ct_1001_image.nii.gz").read_bytes() == b"a patient"
    assert not (tmp_path / "phantom.json").exists()


def test_the_recipe_is_written_beside_the_phantoms(phantom_raw):
    recipe = json.loads((phantom_raw / "phantom.json").read_text())
    assert recipe == {"num_subjects": 4, "size": [64, 64, 12], "seed": 0}


@pytest.mark.parametrize(("count", "size"), [(0, (64, 64, 8)), (1, (64, 64, 201)), (1, (8, 64, 8))])
def test_impossible_arguments_are_refused(tmp_path, count, size):
    with pytest.raises(ValueError, match="must"):
        phantom.write_subjects(tmp_path / "raw", count, size=size)
    assert not (tmp_path / "raw").exists()


def test_tube_distance_equals_the_nearest_of_many_balls():
    rng = np.random.default_rng(0)
    tube = anatomy.Tube(rng.normal(0, 8, (4, 3)), np.full(4, 3.0))
    share = np.linspace(0, 1, 2001)[:, None]
    line = np.concatenate([(1 - share) * a + share * b for a, b in zip(*_ends(tube), strict=True)])
    points = rng.normal(0, 5, (3, 60)).astype(np.float32)
    expected = np.linalg.norm(points.T[:, None] - line, axis=2).min(1) - 3
    np.testing.assert_allclose(tube.distance(points), expected, atol=0.02)


def _ends(tube):
    return tube.waypoints[:-1], tube.waypoints[1:]


def test_ellipsoid_distance_is_exact_for_a_ball_and_good_near_the_surface():
    rng = np.random.default_rng(1)
    points = rng.normal(0, 10, (3, 50)).astype(np.float32)
    ball = anatomy.Ellipsoid(np.array([1.0, 2, 3]), np.eye(3), np.full(3, 5.0))
    expected = np.linalg.norm(points.T - (1, 2, 3), axis=1) - 5
    np.testing.assert_allclose(ball.distance(points), expected, rtol=1e-3, atol=1e-3)

    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0].T
    body = anatomy.Ellipsoid(np.zeros(3), axes, np.array([40.0, 20, 25]))
    directions = rng.normal(size=(50, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    surface = directions * body.radii
    normals = directions / body.radii
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    for offset in (-1.5, 0.0, 1.5):
        near = ((surface + offset * normals) @ axes).T.astype(np.float32)
        np.testing.assert_allclose(body.distance(near), offset, atol=0.15)


def test_displacements_equal_scipys_spline():
    rng = np.random.default_rng(2)
    grid = rng.normal(size=(3, 5, 6, 7)).astype(np.float32)
    canvas = drawing.Canvas.of((20, 16, 3), pixel=4.0, slice_spacing=9.0, bottom=-20.0)
    moved = canvas.points((grid,), canvas.z[1])
    columns, rows = np.meshgrid(canvas.x, canvas.y)
    place = np.stack([np.full(rows.shape, canvas.z[1]), rows, columns])
    low, high = np.array(anatomy.SPAN)[::-1].T
    nodes = (place - low[:, None, None]) / (high - low)[:, None, None]
    nodes = nodes * (np.array(grid.shape[1:]) - 1)[:, None, None]
    for axis, still in enumerate((columns, rows, place[0])):
        shift = ndimage.map_coordinates(grid[axis], nodes, order=3, prefilter=False)
        np.testing.assert_allclose(moved[axis] - still, shift, atol=1e-4)
