"""Import of the release's checkpoints: names, faults, layouts, and the command on a real file."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import flax
import numpy as np
import pytest

from kafjax.models import build_model, example_inputs, variable_shapes
from kafjax.torch_import import dead_weights, import_state_dict, release_name
from tests.release_weights import (
    by_release_names,
    draw_state_dict,
    golden_model_config,
    load_golden,
)

GOLDEN_NETWORKS = ("unet", "kaf_unet", "pretrain")
ROOT = Path(__file__).parents[1]


def release_state_dict(golden: str) -> tuple[dict[str, np.ndarray], Any]:
    """A golden network's weights and its `config.model`."""
    facts, _ = load_golden(golden)
    config = golden_model_config(facts, "float32")
    return draw_state_dict(facts["state_dict"], facts["config"]["salt"]), config


@pytest.mark.parametrize("golden", GOLDEN_NETWORKS)
def test_every_entry_is_imported_or_dead_or_a_counter(golden: str) -> None:
    state_dict, config = release_state_dict(golden)
    used = by_release_names(import_state_dict(state_dict, config)["params"])
    used |= by_release_names(import_state_dict(state_dict, config)["batch_stats"])
    dead = dead_weights(state_dict)
    counters = [name for name in state_dict if name.endswith("num_batches_tracked")]
    assert used.keys() | set(dead) | set(counters) == state_dict.keys()
    assert not used.keys() & set(dead)


@pytest.mark.parametrize("golden", GOLDEN_NETWORKS)
def test_an_import_only_moves_numbers(golden: str) -> None:
    state_dict, config = release_state_dict(golden)
    variables = import_state_dict(state_dict, config)
    for collection in ("params", "batch_stats"):
        for name, array in by_release_names(variables[collection]).items():
            original = np.sort(state_dict[name].astype(np.float64), axis=None)
            np.testing.assert_array_equal(np.sort(array, axis=None), original, err_msg=name)


def test_an_import_has_the_models_structure_and_types() -> None:
    state_dict, config = release_state_dict("pretrain")
    found = flax.traverse_util.flatten_dict(import_state_dict(state_dict, config), sep="/")
    shapes = variable_shapes(build_model(config), *example_inputs("pretraining"))
    expected = flax.traverse_util.flatten_dict(shapes, sep="/")
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in found.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }


def test_dead_weights_are_named() -> None:
    state_dict, _ = release_state_dict("kaf_unet")
    expected = [
        f"encoder.graph_{level}.superglue.{part}"
        for level in range(1, 5)
        for part in ("bin_score", "final_proj.weight", "final_proj.bias")
    ]
    assert sorted(dead_weights(state_dict)) == sorted(expected)
    more = set(dead_weights(release_state_dict("pretrain")[0])) - set(expected)
    assert more
    assert all(name.startswith("graph_local_head.") for name in more)
    assert dead_weights(release_state_dict("unet")[0]) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("params/encoder/level_0/block/conv_1/conv/kernel", "encoder.contr_1_1.0.weight"),
        ("batch_stats/encoder/level_3/block/norm_2/var", "encoder.contr_4_2.1.running_var"),
        ("params/encoder/center_2/conv/bias", "encoder.center.2.bias"),
        ("params/decoder/up_3/kernel", "decoder.upscale5.weight"),
        ("params/decoder/level_0/norm_1/scale", "decoder.expand_1_1.1.weight"),
        (
            "params/encoder/level_1/kaf/attention/layers/layer/key/dense/bias",
            "encoder.graph_2.superglue.gnn.layers.$.attn.proj.1.bias",
        ),
        ("params/matcher/layer_3/merge/dense/bias", "superglue.gnn.layers.3.attn.merge.bias"),
    ],
)
def test_variables_have_the_releases_names(path: str, name: str) -> None:
    assert release_name(path) == name


def test_heads_are_brought_side_by_side() -> None:
    state_dict, config = release_state_dict("kaf_unet")
    variables = import_state_dict(state_dict, config)
    layer = variables["params"]["encoder"]["level_0"]["kaf"]["attention"]["layers"]["layer"]
    prefix = "encoder.graph_1.superglue.gnn.layers.1.attn"
    query = state_dict[f"{prefix}.proj.0.weight"][..., 0]  # [out, in]
    merge = state_dict[f"{prefix}.merge.weight"][..., 0]
    for head in range(4):
        for channel in (0, 17, 63):
            ours, theirs = 64 * head + channel, 4 * channel + head
            np.testing.assert_array_equal(
                layer["query"]["dense"]["kernel"][1][:, ours], query[theirs]
            )
            np.testing.assert_array_equal(
                layer["merge"]["dense"]["kernel"][1][ours], merge[:, theirs]
            )


def test_a_prefix_of_parallel_training_is_ignored() -> None:
    state_dict, config = release_state_dict("unet")
    prefixed = {f"module.{name}": array for name, array in state_dict.items()}
    plain, found = (
        flax.traverse_util.flatten_dict(import_state_dict(entries, config))
        for entries in (state_dict, prefixed)
    )
    assert plain.keys() == found.keys()
    assert all(np.array_equal(plain[path], found[path]) for path in plain)


def test_all_faults_are_listed_at_once_with_the_shapes_expected() -> None:
    state_dict, config = release_state_dict("kaf_unet")
    del state_dict["encoder.contr_1_1.0.weight"]
    del state_dict["encoder.graph_3.superglue.gnn.layers.1.attn.proj.2.bias"]
    state_dict["decoder.head.0.weight"] = np.zeros((7, 8, 1, 1))
    state_dict["encoder.surprise"] = np.zeros((2, 3))
    with pytest.raises(ValueError, match="4 entries do not fit kaf_unet") as error:
        import_state_dict(state_dict, config)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(lines) == [
        "missing: encoder.contr_1_1.0.weight [8, 1, 3, 3]",
        "missing: encoder.graph_3.superglue.gnn.layers.1.attn.proj.2.bias [256]",
        "shape: decoder.head.0.weight is [7, 8, 1, 1], expected [4, 16, 1, 1]",
        "unknown: encoder.surprise [2, 3]",
    ]


def test_a_depth_that_differs_is_a_list_of_missing_layers() -> None:
    state_dict, config = release_state_dict("kaf_unet")
    config.num_attention_layers = 5
    with pytest.raises(ValueError, match=r"missing: encoder\.graph_1\..*layers\.4\."):
        import_state_dict(state_dict, config)


def test_there_is_no_import_of_fcn() -> None:
    state_dict, config = release_state_dict("kaf_unet")
    config.name = "kaf_fcn"
    with pytest.raises(ValueError, match="kaf_fcn"):
        import_state_dict(state_dict, config)


CONFIG = """
import ml_collections
def get_config():
    return ml_collections.ConfigDict({"seed": 0, "model": %r})
"""


def run_import(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kafjax.torch_import", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def command_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with `latest.pth`, wrapped and prefixed, and the command's arguments for it."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("release")
    state_dict, config = release_state_dict("unet")
    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in state_dict.items()}
    torch.save({"epoch": 100, "net": tensors}, folder / "latest.pth")
    (folder / "config.py").write_text(CONFIG % config.to_dict())
    arguments = [f"--input={folder / 'latest.pth'}", f"--config={folder / 'config.py'}"]
    return folder, arguments


def test_the_command_writes_a_workdir_that_others_read(
    command_files: tuple[Path, list[str]],
) -> None:
    from kafjax.checkpoint.checkpointer import load_variables

    folder, arguments = command_files
    run = run_import([*arguments, f"--output={folder / 'out'}"])
    assert run.returncode == 0, run.stderr
    assert f"--config.init_from={folder / 'out'}" in run.stdout
    loaded = flax.traverse_util.flatten_dict(load_variables(folder / "out"))
    expected = flax.traverse_util.flatten_dict(import_state_dict(*release_state_dict("unet")))
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[path], expected[path]) for path in expected)


def test_the_command_overwrites_nothing(command_files: tuple[Path, list[str]]) -> None:
    folder, arguments = command_files
    workdir = folder / "taken"
    (workdir / "checkpoints").mkdir(parents=True)
    run = run_import([*arguments, f"--output={workdir}"])
    assert run.returncode == 2
    assert "holds checkpoints already" in run.stderr
    assert list((workdir / "checkpoints").iterdir()) == []


def test_a_misfit_is_refused_before_anything_is_written(
    command_files: tuple[Path, list[str]],
) -> None:
    folder, arguments = command_files
    run = run_import([*arguments, f"--output={folder / 'none'}", "--config.model.filters=6"])
    assert run.returncode == 2
    assert "entries do not fit unet" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (folder / "none").exists()


def test_checkpoints_are_unwrapped_and_anything_else_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from kafjax.torch_import import read_state_dict

    values = {"weight": torch.ones(2), "half": torch.ones(2, dtype=torch.bfloat16)}
    for wrapped in (values, {"state_dict": values}, {"epoch": 3, "model": {"net": values}}):
        torch.save(wrapped, tmp_path / "weights.pth")
        found = read_state_dict(tmp_path / "weights.pth")
        assert {name: array.dtype for name, array in found.items()} == {
            "weight": np.float32,
            "half": np.float32,
        }
    for content, message in (([1, 2], "found a list"), ({"epoch": 3}, "with epoch")):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            read_state_dict(tmp_path / "other.pth")
    torch.save(Path("anything"), tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    for name in ("code.pth", "text.pth"):
        with pytest.raises(ValueError, match="nothing but tensors"):
            read_state_dict(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        read_state_dict(tmp_path / "absent.pth")


def test_a_missing_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kafjax.torch_import import read_state_dict

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"kafjax\[torch\]"):
        read_state_dict(tmp_path / "latest.pth")
