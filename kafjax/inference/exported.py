"""Networks as programs that need no kafjax: `kafjax export --model model.kafjax --output NET`.

    net.stablehlo    StableHLO for CPU, CUDA and TPU, with the weights; `jax.export` runs it
    net.onnx         instead: ONNX, for any of its runtimes (extra `onnx`)
    net.json         what goes in and comes out, classes, preparation, and the program's SHA-256

One network, or several, whose probabilities are averaged. The program maps a batch of patches with
their keypoints to class probabilities, or to logits. Keypoints are detected outside: OpenCV's SIFT
is no array program. The batch's size is free; the patch and the number of keypoint slots are fixed.
"""

import contextlib
import hashlib
import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.extend
import numpy as np

from kafjax.data.dataset import context_of
from kafjax.errors import UserError, import_extra
from kafjax.files import replacing, write_checked
from kafjax.inference.model_file import VERSIONS, without_names
from kafjax.inference.prediction import VolumePredictor, load_volume_predictor
from kafjax.inference.predictor import Predictor
from kafjax.regions import regions_of
from kafjax.tasks.registry import make_task
from kafjax.workdir.environment import describe_environment

ENDINGS = (".stablehlo", ".onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
INPUTS = ("image", "keypoints", "keypoint_mask")
_FORMAT = 1
_INSTEAD = "export a .stablehlo file"
_LARGEST = 2**31 - 2**20  # bytes of weights: both kinds of files hold 2 GiB
_TOLERANCE = 1e-3  # of a converted network's outputs, relative to their size

# (image, keypoints, keypoint_mask) -> float32 [b, h, w, d]
Network = Callable[[Any, Any, Any], jax.Array]


def export(
    runs: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    logits: bool = False,
    step: int | str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Writes the networks of runs as one program, and its description.

    Args:
      runs: workdirs of segmentation runs, or packed models, all prepared alike.
      target: a name that ends in .stablehlo or .onnx; the description's ends in .json.
      logits: instead of probabilities, of a single network.
      step: of the checkpoints, see `load_volume_predictor`.
      data_dir: see `load_volume_predictor`.

    Raises:
      UserError: another ending, networks that one program cannot hold, or that ONNX cannot express.
    """
    path = Path(target)
    if path.suffix not in ENDINGS:
        raise UserError(f"output is {path}; expected a name that ends in {' or '.join(ENDINGS)}")
    onnx = path.suffix == ".onnx"
    if onnx:  # before the work
        import_extra("onnxruntime")
        _import_jax2onnx()
    opened = load_volume_predictor(runs, step=step, data_dir=data_dir)
    shapes = _input_shapes(opened.predictors)
    network = _network(opened.predictors, logits=logits, wide=onnx)
    facts = _describe(opened, shapes, logits=logits)
    if onnx:
        content, of_kind = _to_onnx(network, shapes, "logits" if logits else "probabilities")
    else:
        content, of_kind = _to_stablehlo(network, shapes)
    facts |= {**of_kind, "file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path.with_suffix(".json"), facts)
    with replacing(path) as partial:  # last: its presence means that everything is written
        partial.write_bytes(content)


def _network(predictors: Sequence[Predictor], *, logits: bool, wide: bool) -> Network:
    """The function to export; with `wide`, a network that computes in bfloat16 uses float32."""
    if logits and len(predictors) > 1:
        raise UserError(f"--logits: found {len(predictors)} networks, whose probabilities average")
    tasks = []
    for predictor in predictors:
        config = predictor.config.copy_and_resolve_references()
        if wide and config.model.dtype == "bfloat16":
            config.model.dtype = "float32"
        tasks.append((make_task(config), predictor.variables))

    def network(image: Any, keypoints: Any, keypoint_mask: Any) -> jax.Array:
        batch = dict(zip(INPUTS, (image, keypoints, keypoint_mask), strict=True))
        outputs = [task.predict(v, batch).astype(np.float32) for task, v in tasks]
        if logits:
            return outputs[0]
        each = [task.probabilities(x) for (task, _), x in zip(tasks, outputs, strict=True)]
        return sum(each[1:], each[0]) / len(each)

    return network


def _input_shapes(predictors: Sequence[Predictor]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Image, keypoints and mask of a batch of any size."""
    sizes = {
        (*c.data.patch_size, c.data.max_keypoints, c.model.get("num_channels") or 1)
        for c in (predictor.config for predictor in predictors)
    }
    if len(sizes) > 1:
        raise UserError(
            "the networks differ in (rows, columns, keypoints, channels) of a patch: "
            f"{', '.join(map(str, sorted(sizes)))}; export them separately"
        )
    weights = sum(x.nbytes for p in predictors for x in jax.tree.leaves(p.variables))
    if weights > _LARGEST:
        raise UserError(
            f"the weights are {weights / 2**30:.1f} GiB; a program holds 2; export fewer networks"
        )
    rows, columns, places, channels = sizes.pop()
    (b,) = jax.export.symbolic_shape("b")
    return (
        jax.ShapeDtypeStruct((b, rows, columns, channels), np.float32),
        jax.ShapeDtypeStruct((b, places, 2), np.int32),
        jax.ShapeDtypeStruct((b, places), np.bool_),
    )


def _to_stablehlo(
    network: Network, shapes: tuple[jax.ShapeDtypeStruct, ...]
) -> tuple[bytes, dict[str, Any]]:
    """The serialised program, and facts about it."""
    with _without_paths():
        exported = jax.export.export(jax.jit(network), platforms=PLATFORMS)(*shapes)
    facts = {
        "kind": "StableHLO, serialised by jax.export",
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
    }
    return bytes(exported.serialize()), facts


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Keeps the places of this machine's source files out of programs."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*")
    try:
        yield
    finally:
        jax.config.update(name, before)


def _to_onnx(
    network: Network, shapes: tuple[jax.ShapeDtypeStruct, ...], output: str
) -> tuple[bytes, dict[str, Any]]:
    """The ONNX model, whose outputs were compared with the network's, and facts about it."""
    jax2onnx = _import_jax2onnx()
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # of each intermediate without a shape
    # jax2onnx replaces functions of jax.numpy while it traces, which Flax does not survive.
    traced = jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(network)(*shapes))
    try:
        model = jax2onnx.to_onnx(
            lambda *inputs: traced(*inputs)[0],
            list(shapes),
            model_name="kafjax",
            input_names=list(INPUTS),
            output_names=[output],
        )
        content: bytes = model.SerializeToString()
        difference = _compare(network, shapes, content)
    except UserError:
        raise
    except Exception as error:  # any: neither package has a type of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"ONNX cannot hold this network ({reason}); {_INSTEAD}") from error
    opset = max(s.version for s in model.opset_import if s.domain in ("", "ai.onnx"))
    return content, {"kind": "ONNX", "opset": opset, "largest_difference": difference}


def _import_jax2onnx() -> Any:
    try:
        return importlib.import_module("jax2onnx")
    except ModuleNotFoundError as error:
        # Its releases require an older Orbax than kafjax, which they use for examples only.
        raise UserError(
            f"{error.name} is missing; expected: pip install 'kafjax[onnx]', and "
            "pip install --no-deps jax2onnx"
        ) from error


def _compare(network: Network, shapes: Sequence[Any], content: bytes) -> float:
    """The largest difference between an ONNX model and the network on a random patch."""
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    rng = np.random.default_rng(0)
    image, keypoints, mask = ((1, *shape.shape[1:]) for shape in shapes)
    inputs = (
        rng.standard_normal(image).astype(np.float32),
        rng.integers(0, image[1:3], keypoints).astype(np.int32),
        rng.random(mask) < 0.75,
    )
    expected = np.asarray(jax.jit(network)(*inputs))
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(content)
        file.flush()
        session = runtime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, dict(zip(INPUTS, inputs, strict=True)))
    difference = float(np.abs(found - expected).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise UserError(
            f"the ONNX model differs from the network by up to {difference:.2g}; {_INSTEAD}"
        )
    return difference


def _describe(
    opened: VolumePredictor, shapes: Sequence[jax.ShapeDtypeStruct], *, logits: bool
) -> dict[str, Any]:
    """What goes into the program and comes out, without names of volumes or folders."""
    preparation = opened.preparation
    image, keypoints, mask = ([*map(_dimension, shape.shape)] for shape in shapes)
    classes = list(opened.reader.classes)
    regions = regions_of(preparation)
    ct = preparation["kind"] == "chd" or preparation.get("intensity") == "ct"
    versions = describe_environment(devices=False)
    return {
        "format": _FORMAT,
        "inputs": [
            {
                "name": INPUTS[0],
                "dtype": "float32",
                "shape": image,
                "meaning": "patches [batch, row, column, channel] of normalised slices; a smaller "
                "slice is centred in zeros, a larger one is cut into patches",
            },
            {
                "name": INPUTS[1],
                "dtype": "int32",
                "shape": keypoints,
                "meaning": "(row, column) in pixels of the patch; any pixel inside for padding",
            },
            {
                "name": INPUTS[2],
                "dtype": "bool",
                "shape": mask,
                "meaning": "true for real keypoints",
            },
        ],
        "output": {
            "name": "logits" if logits else "probabilities",
            "dtype": "float32",
            "shape": [*image[:3], len(regions) or len(classes)],
            "meaning": f"of each {'region' if regions else 'class'} at each pixel",
        },
        "classes": classes,
        # Written one over the other, in this order.
        "regions": [region._asdict() for region in regions],
        # Neighbouring slices, whose channels follow the slice's own.
        "context": context_of(opened.predictors[0].config),
        "normalisation": {
            "clipped_to_percentiles": [1, 99] if ct else None,
            "subtracted": "the mean of the volume, after clipping",
            "divided_by": "the standard deviation of the volume, after clipping",
        },
        "networks": [
            {"model": p.config.model.to_dict(), "step": p.step} for p in opened.predictors
        ],
        "postprocessing": opened.rules,
        "preparation": without_names(preparation),
        "versions": {name: versions[name] for name in VERSIONS if name in versions},
    }


def _dimension(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)
