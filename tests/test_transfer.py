"""The encoder of one run in another: what is taken, what is not, and what does not fit."""

import json
from pathlib import Path
from typing import Any

import flax
import ml_collections
import numpy as np
import pytest

from kafjax.configs import phantom_finetune, phantom_pretrain
from kafjax.tasks.local_contrast import LocalContrast
from kafjax.tasks.pretraining import Pretraining
from kafjax.tasks.segmentation import Segmentation
from kafjax.training.transfer import check_architecture, start_from, transfer_encoder
from tests.runs import write_run

TINY = {"model.filters": 4, "model.num_attention_layers": 2}


def tiny(source: Any, **overrides: Any) -> ml_collections.ConfigDict:
    """A module's config, or a config, made tiny."""
    config = source.get_config() if hasattr(source, "get_config") else source
    config.update_from_flattened_dict({**TINY, **overrides})
    return config


def flat(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(variables, sep="/")


def count(arrays: dict[str, np.ndarray], module: str) -> int:
    return sum(a.size for name, a in arrays.items() if f"/{module}/" in name)


@pytest.fixture(scope="module")
def pretrained() -> dict[str, Any]:
    return Pretraining(tiny(phantom_pretrain, seed=1)).init()


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    return Segmentation(tiny(phantom_finetune, **{"model.num_classes": 8})).init()


def test_encoder_and_its_statistics_are_taken_and_the_decoder_is_not(pretrained, fresh) -> None:
    changed = {n: a + 1 if n.startswith("batch_stats") else a for n, a in flat(pretrained).items()}
    changed_tree = flax.traverse_util.unflatten_dict(changed, sep="/")
    variables, report = transfer_encoder(fresh, changed_tree)
    found, before = flat(variables), flat(fresh)
    assert list(found) == list(before)
    for name, array in found.items():
        source = changed if "/encoder/" in name else before
        np.testing.assert_array_equal(array, source[name], err_msg=name)
    assert any("/encoder/" in name and name.startswith("batch_stats") for name in found)
    assert any("/kaf/" in name for name in found)
    assert report.loaded == {"encoder": count(before, "encoder")}
    assert report.fresh == {"decoder": count(before, "decoder")}
    assert set(report.unused) == {"cnn_head", "kaf_head", "fuse_levels", "matcher"}
    assert "starts fresh:  decoder" in str(report)


def test_numbers_take_the_new_networks_type(pretrained, fresh) -> None:
    wide = flax.traverse_util.unflatten_dict(
        {name: array.astype(np.float64) for name, array in flat(pretrained).items()}, sep="/"
    )
    found = flat(transfer_encoder(fresh, wide)[0])
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def test_all_that_does_not_fit_is_listed_at_once(pretrained, fresh) -> None:
    arrays = flat(pretrained)
    kernel = arrays["params/encoder/center_1/conv/kernel"]
    del arrays["params/encoder/center_2/conv/bias"]
    arrays["params/encoder/level_7/new"] = np.zeros((2, 3))
    arrays["params/encoder/center_1/conv/kernel"] = kernel[:1]
    with pytest.raises(ValueError) as error:
        transfer_encoder(fresh, flax.traverse_util.unflatten_dict(arrays, sep="/"))
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "the pretrained encoder does not fit, 3 of its arrays:",
        "missing: params/encoder/center_2/conv/bias [128]",
        "unknown: params/encoder/level_7/new [2, 3]",
        f"shape: params/encoder/center_1/conv/kernel is {[1, *kernel.shape[1:]]}, "
        f"expected {list(kernel.shape)}",
    ]


def test_a_run_starts_from_a_workdir(pretrained, fresh, tmp_path: Path) -> None:
    write_run(tmp_path, tiny(phantom_pretrain, seed=1), pretrained)
    variables, _ = start_from(tmp_path, tiny(phantom_finetune), fresh)
    for name, array in flat(variables).items():
        source = flat(pretrained) if "/encoder/" in name else flat(fresh)
        np.testing.assert_array_equal(array, source[name], err_msg=name)


def test_other_networks_are_refused_with_all_differences(tmp_path: Path) -> None:
    config = tiny(
        phantom_pretrain,
        **{"model.name": "unet", "model.filters": 6, "data.name": "chd"},
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match="the run of another network") as error:
        check_architecture(tmp_path, tiny(phantom_finetune))
    assert str(error.value).splitlines()[1:] == [
        "  model.filters: 6 there, 4 here",
        "  model.name: 'unet' there, 'kaf_unet' here",
    ]


def test_networks_without_attention_may_differ_in_its_layers(tmp_path: Path) -> None:
    there = tiny(phantom_pretrain, **{"model.name": "unet", "model.num_attention_layers": 4})
    (tmp_path / "config.json").write_text(json.dumps(there.to_dict()))
    check_architecture(tmp_path, tiny(phantom_finetune, **{"model.name": "unet"}))
    there.model.name = "kaf_unet"
    (tmp_path / "config.json").write_text(json.dumps(there.to_dict()))
    with pytest.raises(ValueError, match="num_attention_layers: 4 there, 2 here"):
        check_architecture(tmp_path, tiny(phantom_finetune))


def test_pretraining_on_other_data_is_legal_and_reported(pretrained, fresh, tmp_path: Path) -> None:
    there = {"data.name": "acdc_cine", "data.radius": 30, "data.max_keypoints": 512}
    write_run(tmp_path, tiny(phantom_pretrain, **there), pretrained)
    here = {"data.radius": 20, "data.max_keypoints": 64}
    _, report = start_from(tmp_path, tiny(phantom_finetune, **here), fresh)
    assert str(report).splitlines()[-4:] == [
        "  pretrained on other data:",
        "  data.max_keypoints: 512 there, 64 here",
        "  data.name: 'acdc_cine' there, 'phantom' here",
        "  data.radius: 30 there, 20 here",
    ]


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; expected the workdir of a run"):
        check_architecture(tmp_path, tiny(phantom_finetune))
    (tmp_path / "config.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"model\.name: 'absent' there"):
        check_architecture(tmp_path, tiny(phantom_finetune))


def test_a_run_that_is_not_told_where_to_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"init_from is not given; .*NAME_finetune:scratch"):
        check_architecture(None, tiny(phantom_finetune))


def test_of_local_contrast_the_decoders_blocks_come_too(fresh, tmp_path) -> None:
    local = tiny(phantom_pretrain.get_config("glcl"), seed=1, **{"model.name": "kaf_unet"})
    trained = LocalContrast(local).init()
    write_run(tmp_path, local, trained)
    variables, report = start_from(tmp_path, tiny(phantom_finetune), fresh)
    found, theirs, before = flat(variables), flat(trained), flat(fresh)
    blocks = {f"{kind}_{level}" for kind in ("up", "level") for level in (1, 2, 3)}
    for name, array in found.items():
        _, module, part, *_ = name.split("/")
        source = theirs if module == "encoder" or part in blocks else before
        np.testing.assert_array_equal(array, source[name], err_msg=name)
    assert set(report.loaded) == {"encoder", "decoder"}
    assert report.fresh == {"decoder": count(before, "decoder") - report.loaded["decoder"]}
    assert set(report.unused) == {"project_1", "project_2"}


def test_an_older_run_has_batch_norm_and_another_norm_is_refused(tmp_path: Path) -> None:
    older = tiny(phantom_pretrain)
    del older.model.norm
    write_run(tmp_path, older, {"params": {"x": np.zeros(1)}, "batch_stats": {}})
    config = tiny(phantom_finetune)
    check_architecture(tmp_path, config)
    config.model.norm = "instance"
    with pytest.raises(ValueError, match=r"model\.norm: 'batch' there, 'instance' here"):
        check_architecture(tmp_path, config)
