"""An exported network gives what the run's own does, in a process that has no Flax."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from kafjax.configs import phantom_finetune
from kafjax.errors import UserError
from kafjax.inference.exported import export
from kafjax.inference.model_file import pack
from kafjax.inference.predictor import load_predictor
from kafjax.tasks.segmentation import Segmentation
from kafjax.workdir.preparation import write_preparation
from tests.runs import PREPARATION, write_run

PROGRAM = """
import sys
import numpy as np
from jax import export

network = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
inputs = np.load(sys.argv[2])
output = network.call(inputs["image"], inputs["keypoints"], inputs["keypoint_mask"])
np.save(sys.argv[3], np.asarray(output))
print(sorted({"flax", "kafjax"} & set(sys.modules)), *network.platforms)
"""


def new_run(workdir: Path, name: str, **fields: Any) -> Path:
    """A run that has just started, whose statistics are no longer those of initialisation."""
    config = phantom_finetune.get_config()
    config.update_from_flattened_dict(
        {
            "model.name": name,
            "model.filters": 2,
            "model.num_attention_layers": 2,
            "model.num_classes": 8,
            "data.max_keypoints": 8,
            "data.dir": "/home/zaphod/data",
            "data.patch_size": (32, 48),
            **fields,
        }
    )
    variables = Segmentation(config).init()
    rng = np.random.default_rng(config.seed)
    variables["batch_stats"] = jax.tree.map(
        lambda x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype), variables["batch_stats"]
    )
    write_run(workdir, config, variables, step=5)
    write_preparation(workdir, PREPARATION)
    return workdir


def batch(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    keypoints = rng.integers(0, (32, 48), (size, 8, 2), dtype=np.int32)
    keypoints[:, 3] = keypoints[:, 4]  # two at a pixel
    return {
        "image": rng.standard_normal((size, 32, 48, 1)).astype(np.float32),
        "keypoints": keypoints,
        "keypoint_mask": np.arange(8) < np.array([8, 5, 0])[:size, None],
    }


def own_output(run: Path, inputs: dict[str, np.ndarray], *, logits: bool = False) -> np.ndarray:
    predictor = load_predictor(run)
    output = jax.jit(Segmentation(predictor.config).predict)(predictor.variables, inputs)
    return np.asarray(output if logits else jax.nn.softmax(output))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [new_run(folder / str(seed), "unet", seed=seed) for seed in range(2)]


def in_a_process_of_its_own(target: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The output of a StableHLO program that only JAX runs."""
    np.savez(target.with_suffix(".npz"), **inputs)
    paths = [target, target.with_suffix(".npz"), target.with_suffix(".npy")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)],
        cwd=target.parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[] cpu cuda tpu\n", done.stderr
    return np.load(paths[2])


def test_an_exported_ensemble_needs_no_flax(runs: list[Path], tmp_path: Path) -> None:
    packed, target = tmp_path / "model.kafjax", tmp_path / "new" / "net.stablehlo"
    pack(runs, packed)
    export([packed], target)
    inputs = batch(3)
    found = in_a_process_of_its_own(target, inputs)
    expected = np.mean([own_output(run, inputs) for run in runs], axis=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    facts = json.loads(target.with_suffix(".json").read_bytes())
    assert [x["name"] for x in facts["inputs"]] == list(inputs)
    for given, values in zip(facts["inputs"], inputs.values(), strict=True):
        assert given["shape"] == ["b", *values.shape[1:]]
        assert given["dtype"] == values.dtype.name
    assert facts["output"]["shape"] == ["b", 32, 48, 8]
    assert facts["classes"] == PREPARATION["classes"]
    assert facts["normalisation"]["clipped_to_percentiles"] == [1, 99]
    assert facts["versions"]["jax"] == jax.__version__
    for path in (target, target.with_suffix(".json")):
        for word in (b"zaphod", b"Zaphod", b"ct_1", str(tmp_path).encode(), b"unet.py"):
            assert word not in path.read_bytes(), (path, word)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kaf_unet", "swin_unet"])
def test_any_network_is_exported(name: str, tmp_path: Path) -> None:
    run, target = new_run(tmp_path / "run", name), tmp_path / "net.stablehlo"
    export([run], target, logits=True)
    inputs = batch(2)
    expected = own_output(run, inputs, logits=True)
    tolerance = 1e-4 * np.abs(expected).max()
    found = in_a_process_of_its_own(target, inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("ending", "options", "found"),
    [
        (".pb", {}, r"expected a name that ends in \.stablehlo or \.onnx"),
        (".stablehlo", {"logits": True}, "--logits: found 2 networks"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    ending: str, options: dict[str, Any], found: str, runs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=found):
        export(runs, tmp_path / f"net{ending}", **options)
    assert not list(tmp_path.iterdir())


def test_networks_of_other_patches_are_not_averaged(runs: list[Path], tmp_path: Path) -> None:
    other = new_run(tmp_path / "other", "unet", **{"data.patch_size": (32, 32)})
    with pytest.raises(
        UserError, match=r"\(32, 32, 8, 1\), \(32, 48, 8, 1\); export them separately"
    ):
        export([runs[0], other], tmp_path / "net.stablehlo")


def test_onnx_needs_its_extra(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("jax2onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=r"pip install 'kafjax\[onnx\]'"):
            export(runs, tmp_path / "net.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "unet_c2", "kaf_unet"])
def test_onnx_gives_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    run, target = new_run(tmp_path / "run", name), tmp_path / "net.onnx"
    export([run], target)
    session = runtime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    for size in (1, 3):
        inputs = batch(size)
        (found,) = session.run(["probabilities"], inputs)
        np.testing.assert_allclose(found, own_output(run, inputs), rtol=0, atol=1e-5)
    facts = json.loads(target.with_suffix(".json").read_bytes())
    assert facts["kind"] == "ONNX"
    assert facts["largest_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn", "swin_unet"])
def test_a_network_that_onnx_cannot_hold_is_one_line(name: str, tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx")
    run = new_run(tmp_path / "run", name)
    with pytest.raises(UserError, match=r"^ONNX cannot hold .*\); export a \.stablehlo file$"):
        export([run], tmp_path / "net.onnx")
    assert not list(tmp_path.glob("net*"))
