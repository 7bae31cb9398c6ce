"""A model in one file: `kafjax pack RUN... model.kafjax`, which `kafjax predict --model` reads.

    model.json          what the model is, with a checksum, and the parts with their SHA-256
    <i>/params/...      an array of the i-th network, raw, little-endian
    <i>/batch_stats/...

One network or several, which are averaged: their weights without the optimiser, configs, the
dataset's preparation and classes, rules of post-processing, scores, and versions of the libraries.
Names of volumes and subjects, and folders, stay out. The file is a zip whose parts are stored as
they are and have no time: the same runs give the same bytes, and nothing can expand.

Reading trusts nothing: parts are listed, hashed and of known sizes, are never written to a disk,
and only numbers are made of them.
"""

import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import jax
import ml_collections
import numpy as np

from kafjax.errors import UserError
from kafjax.files import CHECKSUM_FIELD, checksum, replacing
from kafjax.inference.evaluation import rules_of_run
from kafjax.inference.postprocessing import Rules
from kafjax.inference.predictor import Predictor, load_predictor
from kafjax.workdir.environment import describe_environment
from kafjax.workdir.preparation import Preparation, check_alike, read_preparation
from kafjax.workdir.scores import SPLITS, read_scores
from kafjax.workdir.workdir import Workdir

ENDING = ".kafjax"
_INDEX = "model.json"
_FORMAT = 1
_LARGEST_INDEX = 1 << 26
_EPOCH = (1980, 1, 1, 0, 0, 0)
_PART = re.compile(r"\d{1,3}/(params|batch_stats)(/[A-Za-z0-9_]+)+")
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "uint32", "int64", "bool")
_NOT_PACKED = ("equal_images", "subjects", "volumes")  # names of volumes and patients
_NOT_PACKED_OF_DATA = ("dir", "validation", "splits_file")  # of the config
VERSIONS = ("kafjax", "jax", "flax", "numpy", "opencv-python-headless")
_FETCH_AGAIN = "fetch or pack it again"


@dataclass(frozen=True, eq=False)
class Model:
    """A packed model's description; `kafjax.inference.predictor` makes networks of its arrays.

    Attributes:
      preparation: of the networks' dataset.
      members: of each network `config`, `step`, `rules` and `scores`.
      versions: of the libraries that packed it.
    """

    path: Path
    preparation: Preparation
    members: tuple[dict[str, Any], ...]
    parts: dict[str, dict[str, Any]]
    versions: dict[str, str]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each network's arrays, by part. Raises `UserError` for a damaged one."""
        with _opened(self.path) as archive:
            for name, part in self.parts.items():
                yield name, _read_array(self.path, archive, name, part)

    def predictors(self, *, batch_size: int | None = None) -> tuple[Predictor, ...]:
        """The networks. Raises `UserError` for a damaged part."""
        variables: list[dict[str, Any]] = [{} for _ in self.members]
        for name, array in self.arrays():
            number, *keys = name.split("/")
            place = variables[int(number)]
            for key in keys[:-1]:
                place = place.setdefault(key, {})
            place[keys[-1]] = array
        return tuple(
            Predictor(
                ml_collections.ConfigDict(member["config"]),
                {"batch_stats": {}, **of_member},
                batch_size=batch_size,
                step=member["step"],
            )
            for member, of_member in zip(self.members, variables, strict=True)
        )

    @property
    def rules(self) -> list[Rules]:
        """Post-processing of each network."""
        return [member["rules"] for member in self.members]


def is_model(path: str | os.PathLike[str]) -> bool:
    """Whether a path is taken for a packed model: a file, or such a name."""
    return os.fspath(path).endswith(ENDING) or Path(path).is_file()


def pack(
    workdirs: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    step: int | str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> None:
    """Packs segmentation runs as one model.

    Args:
      workdirs: of the runs, all prepared alike.
      target: `.kafjax`.
      step: of the checkpoints, see `load_predictor`.
      data_dir: folder of the runs' dataset, for workdirs without preparation.json.

    Raises:
      UserError: no run, runs of differently prepared datasets, or another name than `.kafjax`.
    """
    if not workdirs:
        raise UserError(f"expected the workdirs of runs, and a file {ENDING} to pack them in")
    path = Path(target)
    if path.suffix != ENDING:
        raise UserError(f"output is {path}; expected a name that ends in {ENDING}")
    preparations = {os.fspath(w): read_preparation(w, data_dir=data_dir) for w in workdirs}
    check_alike(preparations)
    members, arrays = [], {}
    for number, workdir in enumerate(map(Workdir, workdirs)):
        predictor = load_predictor(workdir, step=step)
        for name, leaf in _leaves(predictor.variables):
            arrays[f"{number}/{name}"] = np.asarray(leaf)
        members.append(_describe(workdir, predictor, data_dir))
    first = next(iter(preparations.values()))
    index = {
        "format": _FORMAT,
        "preparation": without_names(first),
        "members": members,
        "versions": {k: v for k, v in describe_environment(devices=False).items() if k in VERSIONS},
        "parts": {
            name: {
                "sha256": hashlib.sha256(_raw(array)).hexdigest(),
                "dtype": array.dtype.name,
                "shape": list(array.shape),
            }
            for name, array in sorted(arrays.items())
        },
    }
    index[CHECKSUM_FIELD] = checksum(index)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        text = json.dumps(index, indent=1, sort_keys=True) + "\n"
        archive.writestr(_info(_INDEX), text.encode())
        for name, array in sorted(arrays.items()):
            archive.writestr(_info(name), _raw(array))


def read_model(path: str | os.PathLike[str]) -> Model:
    """The description of a packed model, verified. Raises `UserError`."""
    place = Path(path)
    with _opened(place) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if _INDEX not in names:
            raise _refused(
                place,
                f"has no {_INDEX}: it is not a packed model",
                "expected a file of kafjax pack",
            )
        if archive.getinfo(_INDEX).file_size > _LARGEST_INDEX:
            raise _refused(place, f"its {_INDEX} is too large", _FETCH_AGAIN)
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise _refused(
                    place, f"holds {entry.filename!r}, which is compressed", _FETCH_AGAIN
                )
        index = _parse(place, _read(place, archive, _INDEX))
        parts = index["parts"]
        if foreign := sorted(set(names) - {_INDEX, *parts}):
            raise _refused(place, f"holds {foreign[0]!r}, which is no part of it", _FETCH_AGAIN)
        if missing := sorted(set(parts) - set(names)):
            raise _refused(place, f"lacks {missing[0]}", _FETCH_AGAIN)
        if len(names) != len(set(names)):
            raise _refused(place, "holds a part twice", _FETCH_AGAIN)
        for name, part in parts.items():
            if archive.getinfo(name).file_size != _size(place, name, part):
                raise _refused(place, f"{name} has another size than it says", _FETCH_AGAIN)
    members, versions = tuple(index["members"]), index.get("versions", {})
    return Model(place, index["preparation"], members, parts, versions)


def without_names(preparation: Preparation) -> Preparation:
    """A preparation without the names of volumes and subjects."""
    return {k: v for k, v in preparation.items() if k not in _NOT_PACKED}


def _describe(
    workdir: Workdir, predictor: Predictor, data_dir: str | os.PathLike[str] | None
) -> dict[str, Any]:
    config = workdir.read_config(task="segment")
    scores = {}
    for split in SPLITS:
        if (found := read_scores(workdir, split)) and found["step"] == predictor.step:
            scores[split] = {
                "num_volumes": len(found["by_volume"]),
                "pooled_dice": found["pooled_dice"],
            }
    return {
        "config": _without_folders(config),
        "step": predictor.step,
        "rules": rules_of_run(workdir, predictor, data_dir=data_dir),
        "scores": scores,
    }


def _without_folders(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with names instead of paths, and without names of volumes."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    if isinstance(made.get("init_from"), str):
        made["init_from"] = PurePath(made["init_from"]).name
    made["data"] |= {name: None for name in _NOT_PACKED_OF_DATA if name in made["data"]}
    return made


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _raw(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o644 << 16
    info.create_system = 3
    return info


def _refused(path: Path, found: str, remedy: str) -> UserError:
    return UserError(f"{path}: {found}; {remedy}")


def _opened(path: Path) -> zipfile.ZipFile:
    if not path.exists():
        raise UserError(f"{path}: no such file; expected a model of kafjax pack")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _refused(path, f"is not a packed model, or damaged ({error})", _FETCH_AGAIN) from None


def _read(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _refused(path, f"{name} is damaged ({error})", _FETCH_AGAIN) from None


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        index = json.loads(content)
        found = index.pop(CHECKSUM_FIELD)
        intact = found == checksum(index)
        format = index["format"]
        networks = len(index["members"])
        names = list(index["parts"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _refused(path, f"its {_INDEX} is damaged", _FETCH_AGAIN) from None
    if not intact:
        raise _refused(path, f"its {_INDEX} was changed", _FETCH_AGAIN)
    if format != _FORMAT:
        remedy = "update kafjax, or pack the model with this version"
        raise _refused(path, f"is of format {format}; this kafjax reads {_FORMAT}", remedy)
    for name in names:
        if not _PART.fullmatch(name) or int(name.split("/")[0]) >= networks:
            raise _refused(path, f"lists {name!r}, which is no array of a network", _FETCH_AGAIN)
    return index


def _size(path: Path, name: str, part: Mapping[str, Any]) -> int:
    """The bytes of a part, by its type and shape."""
    shape: Any = part.get("shape")
    dtype = part.get("dtype")
    numbers = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if dtype not in _DTYPES or not numbers or not isinstance(part.get("sha256"), str):
        raise _refused(path, f"{name} is of type {dtype!r} and shape {shape!r}", _FETCH_AGAIN)
    return math.prod(shape) * np.dtype(dtype).itemsize


def _read_array(
    path: Path, archive: zipfile.ZipFile, name: str, part: Mapping[str, Any]
) -> np.ndarray:
    content = _read(path, archive, name)
    if hashlib.sha256(content).hexdigest() != part["sha256"]:
        raise _refused(path, f"{name} is damaged: its SHA-256 is another", _FETCH_AGAIN)
    return np.frombuffer(content, part["dtype"]).reshape(part["shape"])
