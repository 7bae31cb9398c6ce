"""A workdir's record of its dataset's preparation, and runs that do not match."""

import json
from pathlib import Path

import pytest

from kafjax.configs import phantom_finetune
from kafjax.data.dataset import open_dataset
from kafjax.workdir.preparation import check_alike, read_preparation, write_preparation

CHD = {
    "kind": "chd",
    "classes": ["background", "ventricle"],
    "max_keypoints": 4,
    "keypoint_selection": "random",
    "seed": 3,
}


def write_config(workdir: Path, data_dir: str) -> None:
    config = phantom_finetune.get_config()
    config.data.update({"dir": data_dir, "max_keypoints": 64})
    config.model.num_classes = 8
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))


def test_workdir_alone_tells_how_to_prepare(phantom_dataset: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    here = str(phantom_dataset.parents[1])
    write_config(workdir, here)
    beside = read_preparation(workdir)
    write_config(workdir, "gone")
    with pytest.raises(
        ValueError, match=r"has no preparation.json(.|\n)*give its folder as --data_"
    ):
        read_preparation(workdir)
    asked = read_preparation(workdir, data_dir=here)
    write_preparation(workdir, open_dataset(here, "phantom").metadata)
    assert sorted(path.name for path in workdir.iterdir()) == ["config.json", "preparation.json"]
    assert read_preparation(workdir) == asked == beside
    assert (asked["kind"], asked["max_keypoints"], asked["seed"]) == ("chd", 64, 0)
    assert "volumes" not in asked

    (workdir / "preparation.json").write_text("{")
    with pytest.raises(ValueError, match="not a dataset's metadata"):
        read_preparation(workdir)
    (workdir / "preparation.json").write_text('{"kind": "chd"}')
    with pytest.raises(ValueError, match="lacks classes, max_keypoints"):
        read_preparation(workdir)
    write_preparation(workdir, {**asked, "max_keypoints": 9, "classes": ["background"]})
    with pytest.raises(ValueError, match=r"max_keypoints: 9 there, 64(.|\n)*classes: 1 there, 8"):
        read_preparation(workdir)


def test_runs_of_other_preparations_are_not_averaged() -> None:
    other = {**CHD, "seed": 4, "kind": "nnunet", "intensity": "ct", "libraries": {}, "reach": 2}
    with pytest.raises(ValueError, match="prepared differently") as error:
        check_alike({"a": CHD, "b": CHD, "c": other})
    assert str(error.value).splitlines()[1:] == [
        "  intensity: None in a, 'ct' in c",
        "  kind: 'chd' in a, 'nnunet' in c",
        "  seed: 3 in a, 4 in c",
    ]
    check_alike({"a": CHD, "b": {**CHD, "libraries": {"numpy": "2"}}})
