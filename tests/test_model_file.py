"""A packed model predicts as its runs do, without them, and is refused if anything is wrong."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kafjax.configs import phantom_finetune
from kafjax.errors import UserError
from kafjax.files import checksum
from kafjax.inference.model_file import pack, read_model
from kafjax.inference.prediction import load_volume_predictor, predict_files
from kafjax.tasks.segmentation import Segmentation
from kafjax.workdir.preparation import write_preparation
from tests.runs import PREPARATION, ROOT, command_environment, write_run
from tests.scan_formats import affine_of, phantom, write_nifti


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that have just begun, without any dataset."""
    workdirs = []
    for seed in range(2):
        config = phantom_finetune.get_config()
        config.update_from_flattened_dict(
            {
                "model.name": "unet",
                "model.filters": 2,
                "model.num_classes": 8,
                "data.max_keypoints": 8,
                "data.dir": "/home/zaphod/data",
                "data.patch_size": (32, 32),
                "batch_size": 4,
                "seed": seed,
            }
        )
        workdirs.append(tmp_path_factory.mktemp(f"run{seed}"))
        write_run(workdirs[-1], config, Segmentation(config).init(), step=5)
        write_preparation(workdirs[-1], PREPARATION)
    return workdirs


@pytest.fixture(scope="module")
def model(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model.kafjax"
    pack(runs, path)
    return path


def test_a_packed_ensemble_predicts_as_its_runs(
    runs: list[Path], model: Path, tmp_path: Path
) -> None:
    scan = write_nifti(tmp_path / "a.nii.gz", phantom((32, 28, 3))[0], affine_of())
    places = {}
    for name, given in (("runs", runs), ("model", [model]), ("one", runs[:1])):
        places[name] = tmp_path / name / "a.nii.gz"
        predict_files(given, scan, places[name], probabilities=True)
    for suffix in ("", "_probabilities"):
        files = {n: p.with_name(f"a{suffix}.nii.gz").read_bytes() for n, p in places.items()}
        assert files["runs"] == files["model"] != files["one"]
    here, there = (load_volume_predictor(given) for given in (runs, [model]))
    for a, b in zip(here.predictors, there.predictors, strict=True):
        assert (a.step, b.step) == (5, 5)
        jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)


def test_the_same_runs_give_the_same_bytes_and_no_names(
    runs: list[Path], model: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again.kafjax"
    pack(list(map(str, runs)), again)
    content = again.read_bytes()
    assert content == model.read_bytes()
    for word in (b"zaphod", b"Zaphod", b"ct_1", str(runs[0]).encode(), b"optimizer_state"):
        assert word not in content
    index = json.loads(zipfile.ZipFile(model).read("model.json"))
    assert index["versions"]["jax"] == jax.__version__
    assert [member["config"]["seed"] for member in index["members"]] == [0, 1]
    with pytest.raises(UserError, match="has one checkpoint"):
        load_volume_predictor([model], step=3)


def rewritten(
    model: Path,
    path: Path,
    *,
    change: Callable[[dict[str, Any]], None] = lambda index: None,
    add: dict[str, bytes] | None = None,
    compress: bool = False,
) -> Path:
    """The model with a changed index, its checksum made right, and further files."""
    with zipfile.ZipFile(model) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    index = json.loads(files["model.json"])
    del index["checksum"]
    change(index)
    files["model.json"] = json.dumps({**index, "checksum": checksum(index)}).encode()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in {**files, **(add or {})}.items():
            archive.writestr(name, content)
    return path


def first(index: dict[str, Any]) -> Any:
    return next(iter(index["parts"].values()))


def rename(index: dict[str, Any], name: str) -> None:
    index["parts"][name] = index["parts"].pop(next(iter(index["parts"])))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"compress": True}, "which is compressed"),
        ({"add": {"../../evil": b"x"}}, "holds '../../evil', which is no part of it"),
        ({"add": {"x.pkl": b"x"}}, "holds 'x.pkl', which is no part of it"),
        ({"change": lambda i: rename(i, "../a")}, "lists '../a', which is no array"),
        ({"change": lambda i: rename(i, "0/params/../../a")}, "which is no array of a network"),
        ({"change": lambda i: rename(i, "9/params/a")}, "which is no array of a network"),
        ({"change": lambda i: rename(i, "0/params/a")}, "which is no part of it"),
        ({"change": lambda i: first(i).update(shape=[10**12])}, "has another size than it says"),
        ({"change": lambda i: first(i).update(dtype="object")}, "is of type 'object'"),
        ({"change": lambda i: first(i).update(shape=[-1])}, "and shape"),
        ({"change": lambda i: first(i).update(sha256="0" * 64)}, "its SHA-256 is another"),
        ({"change": lambda i: i.update(format=2)}, "is of format 2; this kafjax reads 1"),
        ({"change": lambda i: i.pop("members")}, "its model.json is damaged"),
    ],
)
def test_forged_models_are_refused(
    options: dict[str, Any], found: str, model: Path, tmp_path: Path
) -> None:
    path = rewritten(model, tmp_path / "forged.kafjax", **options)
    with pytest.raises(UserError, match=r"forged\.kafjax: ") as caught:
        read_model(path).predictors()
    assert found in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_damage_anywhere_is_refused_or_harmless(model: Path, tmp_path: Path) -> None:
    content, rng = model.read_bytes(), np.random.default_rng(0)
    expected = read_model(model)

    def arrays(path: Path) -> tuple[Any, Any]:
        read = read_model(path)
        return read.members, {name: array.tobytes() for name, array in read.arrays()}

    sound, refused = arrays(model), 0
    path = tmp_path / "damaged.kafjax"
    for i in range(120):
        if i % 3:
            damaged = bytearray(content)
            place = (
                rng.integers(len(content))
                if i % 2
                else rng.integers(len(content) - 3000, len(content))
            )
            damaged[place] ^= 1 << int(rng.integers(8))
        else:
            damaged = bytearray(content[: rng.integers(len(content))])
        path.write_bytes(damaged)
        try:
            assert arrays(path) == sound
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 90
    assert expected.preparation["kind"] == "chd"


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "is not a packed model"), (b"<html>", "is not a packed model"), (None, "no such file")],
)
def test_other_files_are_no_models(content: bytes | None, found: str, tmp_path: Path) -> None:
    path = tmp_path / "a.kafjax"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=found):
        predict_files([path], tmp_path, tmp_path / "out")
    stream = io.BytesIO()
    zipfile.ZipFile(stream, "w").close()
    path.write_bytes(stream.getvalue())
    with pytest.raises(UserError, match=r"has no model\.json"):
        read_model(path)


def test_what_cannot_be_packed_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a name that ends in \.kafjax"):
        pack(runs, tmp_path / "model.zip")
    with pytest.raises(UserError, match="expected the workdirs of runs"):
        pack([], tmp_path / "model.kafjax")
    with pytest.raises(UserError, match="has no config"):
        pack([tmp_path], tmp_path / "model.kafjax")
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    write_preparation(other, {**PREPARATION, "seed": 4})
    with pytest.raises(UserError, match="prepared differently"):
        pack([runs[0], other], tmp_path / "model.kafjax")
    assert not (tmp_path / "model.kafjax").exists()


@pytest.mark.slow
def test_the_commands_pack_and_predict_in_processes_of_their_own(
    runs: list[Path], tmp_path: Path
) -> None:
    scan = write_nifti(tmp_path / "a.nii.gz", phantom((32, 28, 3))[0], affine_of())
    packed = tmp_path / "model.kafjax"
    for line in (
        ["pack", *map(str, runs), str(packed)],
        [
            "predict",
            "--model",
            str(packed),
            "--input",
            str(scan),
            "--output",
            str(tmp_path / "b.nii"),
        ],
    ):
        subprocess.run(
            [sys.executable, "-m", "kafjax", *line],
            cwd=ROOT,
            env=command_environment(tmp_path / "bin"),
            check=True,
        )
    assert (tmp_path / "b.nii").exists()
