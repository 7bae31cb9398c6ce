"""Several sequences of a case, and neighbouring slices, as channels: from files to the network."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np
import pytest

from data_prep.builder import Options
from data_prep.check import as_text, fingerprint, survey_dataset
from data_prep.faults import DatasetError
from data_prep.nnunet import open_nnunet
from data_prep.prepare import prepare_dataset
from kafjax import intensity
from kafjax.configs import own_finetune, own_pretrain
from kafjax.data.dataset import SliceDataset, open_dataset
from kafjax.data.samples import make_pair
from kafjax.errors import UserError
from kafjax.inference.prediction_files import list_requests
from kafjax.intensity import IntensityConfig
from kafjax.models import build_model, example_inputs, variable_shapes
from kafjax.tasks.registry import make_task
from kafjax.training.preflight import complete_config, open_run_dataset
from kafjax.training.transfer import check_architecture
from kafjax.workdir.workdir import Workdir
from tests.raw_layouts import SPACING, heart, save, write_nnunet
from tests.small_models import model_config

OPTIONS = Options(max_keypoints=16)


def prepare(raw: Path, data_dir: Path, **options: Any) -> SliceDataset:
    reader = open_nnunet(raw, **options)
    prepare_dataset(reader, raw, data_dir, name="own", options=OPTIONS, num_workers=0)
    return open_dataset(data_dir, "own")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases of a CT and a mirrored, brighter T2 in float32."""
    folder = write_nnunet(tmp_path_factory.mktemp("raw"), channels=("CT", "T2"))
    for number, case in enumerate(("case_001", "case_002")):
        second = 50 + 3 * heart(number)[0][::-1].astype(np.float32)
        save(folder / "imagesTr" / f"{case}_0001.nii.gz", second)
    return folder


@pytest.fixture(scope="module")
def dataset(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> SliceDataset:
    return prepare(raw, tmp_path_factory.mktemp("data"), keypoint_channel="T2")


def test_records_hold_every_channel_with_its_own_normalisation(
    dataset: SliceDataset, raw: Path
) -> None:
    assert dataset.metadata["channel_names"] == ["CT", "T2"]
    assert dataset.metadata["intensity"] == ["ct", "zscore"]
    files = [nib.load(raw / "imagesTr" / f"case_002_000{c}.nii.gz") for c in (0, 1)]
    ct, t2 = (np.asanyarray(file.dataobj).astype(np.float64) for file in files)  # type: ignore[attr-defined]
    ct = np.clip(ct, *np.percentile(ct, [1, 99]).astype(int))
    expected = np.stack([(x - x.mean()) / x.std() for x in (ct, t2)], axis=-1)
    for i, one in enumerate(dataset.read_volume("case_002")):
        # Files are [x, y, z], slices [row, col] with rows along y.
        np.testing.assert_allclose(one.image, expected[:, :, i].swapaxes(0, 1), atol=1e-5)


def test_keypoints_are_those_of_the_chosen_channel(
    dataset: SliceDataset, raw: Path, tmp_path: Path
) -> None:
    alone = {name: prepare(raw, tmp_path / name, channel=name) for name in ("CT", "T2")}
    for record in range(len(dataset.reader)):
        one, t2, ct = (d.read(record) for d in (dataset, alone["T2"], alone["CT"]))
        np.testing.assert_array_equal(one.keypoints, t2.keypoints)
        np.testing.assert_array_equal(one.correspondences, t2.correspondences)
        np.testing.assert_array_equal(one.image, np.concatenate([ct.image, t2.image], -1))
    assert "channels" not in alone["CT"].metadata
    assert alone["CT"].metadata["channel"] == 0


def test_context_adds_the_neighbours_and_repeats_the_ends(dataset: SliceDataset) -> None:
    images = [one.image for one in dataset.read_volume("case_001")]
    seen = dataset.with_context(2)
    assert (dataset.num_channels, seen.num_channels) == (2, 10)
    whole = seen.read_volume("case_001")
    for i, record in enumerate(dataset.volumes["case_001"]):
        near = [min(max(i + o, 0), 5) for o in (0, -1, 1, -2, 2)]
        expected = np.concatenate([images[k] for k in near], axis=-1)
        np.testing.assert_array_equal(seen.read(record).image, expected)
        np.testing.assert_array_equal(whole[i].image, expected)
        np.testing.assert_array_equal(dataset.read(record).image, images[i])
    pair = make_pair(seen, 0, dataset.volumes["case_001"][2], patch_size=(48, 48), seed=0)
    assert pair["image"].shape == (2, 48, 48, 10)


def test_intensities_change_channel_by_channel() -> None:
    image = np.random.default_rng(0).standard_normal((20, 24, 3)).astype(np.float32)
    key = jax.random.key(3)
    config = IntensityConfig(contrast_probability=1.0, brightness_probability=1.0)
    for change in (
        jax.jit(lambda key, x: intensity.augment_intensity(key, x, config=config)),
        jax.jit(intensity.change_intensity),
    ):
        found = change(key, image)
        for c, own in enumerate(jax.random.split(key, 3)):
            np.testing.assert_allclose(found[..., c], change(own, image[..., c : c + 1])[..., 0])


@pytest.mark.parametrize("name", ["unet", "swin_unet"])
def test_only_first_kernels_know_the_channels(name: str) -> None:
    model = build_model(model_config(name))
    one, three = (
        jax.tree.leaves(variable_shapes(model, *example_inputs("segmentation", c))) for c in (1, 3)
    )
    changed = [(a.shape, b.shape) for a, b in zip(one, three, strict=True) if a != b]
    assert len(changed) == (2 if name == "swin_unet" else 1)  # its tokens, and its skip connection
    for (*window, inputs, features), shape in changed:
        assert (*window, 3 * inputs, features) == shape


def test_a_task_takes_its_channels_from_the_dataset(dataset: SliceDataset, tmp_path: Path) -> None:
    config = own_finetune.get_config("scratch")
    config.data.update({"dir": str(dataset.directory.parents[1]), "patch_size": (48, 48)})
    config.data.context = 1
    config.model.update({"name": "unet", "filters": 4})
    complete = complete_config(config, open_run_dataset(config))
    assert complete.model.num_channels == 6
    kernels = jax.tree.leaves(make_task(complete).init()["params"]["encoder"]["level_0"])
    assert any(kernel.shape == (3, 3, 6, 4) for kernel in kernels)
    config.model.num_channels = 2
    with pytest.raises(UserError, match=r"num_channels is 2, expected 6"):
        open_run_dataset(config)
    del config.model.num_channels
    config.data.context = 0
    other = complete_config(config, open_run_dataset(config))
    Workdir(tmp_path).write_config(complete.to_dict())
    with pytest.raises(UserError, match=r"model\.num_channels: 6 there, 2 here"):
        check_architecture(tmp_path, other)
    with pytest.raises(UserError, match=r"data\.context: 1 there, 0 here"):
        Workdir(tmp_path).check_config(other.to_dict())


def test_runs_of_older_versions_had_no_context(tmp_path: Path) -> None:
    config = own_finetune.get_config("scratch").to_dict()
    older = {**config, "data": {k: v for k, v in config["data"].items() if k != "context"}}
    Workdir(tmp_path).write_config(older)
    Workdir(tmp_path).check_config(config)


def test_the_check_shows_each_channel(raw: Path) -> None:
    survey, faults = survey_dataset(open_nnunet(raw), raw, num_workers=0)
    assert faults == []
    first, second = fingerprint(survey)["intensity"]
    largest = [3 * heart(number)[0].max() + 50 for number in (0, 1)]
    assert second["percentile_100"]["max"] == max(largest)
    assert "intensity 1, percentile 100" in as_text(survey)
    assert first["percentile_100"]["max"] == max(heart(number)[0].max() for number in (0, 1))


TASKS: dict[str, Any] = {
    "pretrain": (own_pretrain, "pcl"),
    "local_contrast": (own_pretrain, "glcl"),
    "copy_paste": (own_finetune, "scratch,copy_paste"),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_takes_channels(dataset: SliceDataset, name: str) -> None:
    module, variant = TASKS[name]
    config = module.get_config(variant)
    config.data.update({"dir": str(dataset.directory.parents[1]), "patch_size": (48, 48)})
    config.data.context = 1
    config.augment.intensity.probability = 1.0
    config.model.update({"name": "unet", "filters": 4})
    opened = open_run_dataset(config)
    task = make_task(complete_config(config, opened))
    sample = task.sample(opened, 3)
    assert sample["image"].shape[-3:] == (48, 48, 6)
    batch = {field: np.stack([value] * 4) for field, value in sample.items()}
    variables = task.init()
    (loss, _) = jax.eval_shape(task.loss, variables["params"], variables["batch_stats"], batch)
    assert loss.shape == ()


# Bad input.


def other_shape(folder: Path) -> None:
    save(folder / "case_001_0001.nii.gz", heart(0, (40, 36, 5))[0])


def other_place(folder: Path) -> None:
    save(folder / "case_001_0001.nii.gz", heart(0)[0], (1.5, 1.9, 10.0))


def turned(folder: Path) -> None:
    image = nib.Nifti1Image(heart(0)[0], np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0]))
    nib.save(image.as_reoriented([[1, -1], [0, 1], [2, -1]]), folder / "case_001_0001.nii.gz")


def constant(folder: Path) -> None:
    save(folder / "case_001_0001.nii.gz", np.full((40, 36, 6), 3, np.int16))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: (f / "case_001_0001.nii.gz").unlink(), "has no channel 1 next to it; add"),
        (lambda f: (f / "case_001_0000.nii.gz").unlink(), "has no channel 0 next to it; add"),
        (other_shape, "(40, 36, 5), but case_001_0000.nii.gz has (40, 36, 6); resample it"),
        (other_place, "differs from case_001_0000.nii.gz's by up to 7 mm"),
        (constant, "every value is 3"),
    ],
)
def test_bad_channels_are_one_line(tmp_path: Path, change: Any, expected: str) -> None:
    write_nnunet(tmp_path, channels=("CT", "T2"))
    change(tmp_path / "imagesTr")
    with pytest.raises(DatasetError) as error:
        prepare(tmp_path, tmp_path / "data")
    (fault,) = str(error.value).splitlines()
    assert "case_001_000" in fault
    assert expected in fault


def test_a_channel_with_turned_axes_lies_on_the_first_ones_grid(tmp_path: Path) -> None:
    write_nnunet(tmp_path, channels=("T1", "T2"))
    turned(tmp_path / "imagesTr")
    source, _ = open_nnunet(tmp_path).find(tmp_path)[0]
    first, second = open_nnunet(tmp_path).read(source).channels
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"channel": "T1,FLAIR"}, "has no channel FLAIR; expected one of 0 (T1), 1 (T2)"),
        ({"channel": "T1,0"}, "has a channel that is asked for twice"),
        ({"channel": "T1", "keypoint_channel": "T2"}, "channel 1 is for keypoints, but is none of"),
    ],
)
def test_channels_that_cannot_be_chosen(tmp_path: Path, options: Any, expected: str) -> None:
    write_nnunet(tmp_path, channels=("T1", "T2"))
    fault, *_ = open_nnunet(tmp_path, **options).faults
    assert expected in str(fault)


def test_scans_of_other_channels_than_the_runs_are_one_line_each(
    dataset: SliceDataset, tmp_path: Path
) -> None:
    facts = {k: v for k, v in dataset.metadata.items() if k != "volumes"}
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a_0000", "a_0001", "b_0000", "c_0001", "plain", "d_0000", "d_0001", "d_0002"):
        save(scans / f"{name}.nii.gz", heart(0, (8, 7, 3))[0])
    requests, left_out = list_requests(scans, tmp_path / "out", facts)
    assert [(r.labels.name, [p.name for p in r.source.images]) for r in requests] == [
        ("a.nii.gz", ["a_0000.nii.gz", "a_0001.nii.gz"]),
        ("d.nii.gz", ["d_0000.nii.gz", "d_0001.nii.gz"]),
    ]
    assert [str(fault).removeprefix(f"{scans}/") for fault in left_out] == [
        "b_0000.nii.gz: has no channel 1 next to it; add b_0001.nii.gz",
        "c_0001.nii.gz: has no channel 0 next to it; add c_0000.nii.gz",
        "plain.nii.gz: has no channel in its name, and the runs see 2; expected "
        "plain_0000.nii.gz and plain_0001.nii.gz",
    ]
    (one,), _ = list_requests(scans / "a_0000.nii.gz", tmp_path / "a.nii.gz", facts)
    assert dataclasses.replace(one.source, id="a") == requests[0].source
