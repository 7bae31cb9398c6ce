"""A prepared dataset's descriptions, as tfds writes and reads them.

    DATA/<name>/<version>/dataset_info.json, features.json, metadata.json

Imports neither TensorFlow nor any code named in a dataset's files.
"""

import contextlib
import glob
import json
import os
import shlex
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from kafjax.buckets.places import url_of
from kafjax.buckets.store import list_objects
from kafjax.errors import UserError
from kafjax.paths import data_folder, plain

# Prefix of the classes that may read features. tfds would import any module that features.json
# names.
_FEATURES = "tensorflow_datasets.core.features."


class RecordError(UserError):
    """A shard is missing, truncated or damaged; the message names the file and the record."""


def find_dataset(data_dir: str | os.PathLike[str], name: str) -> Path:
    """The directory of the newest prepared version of DATA_DIR/NAME; `~` is the home folder.

    Of a bucket's this is the copy on this machine, which lacks the records. If there is none,
    raises `ValueError` with the command that prepares the dataset.
    """
    data_dir = data_folder(data_dir, name)
    prepared = [
        (tfds.core.Version(path.parent.name), path.parent)
        for path in data_dir.glob(f"{glob.escape(name)}/*/dataset_info.json")
        if tfds.core.Version.is_valid(path.parent.name)
    ]
    if not prepared:
        raw = [] if name == "phantom" else ["--raw_dir", "RAW"]  # phantoms are generated
        known = name in ("chd", "acdc", "phantom")
        dataset = ["--dataset", *([name] if known else ["nnunet", "--name", name])]
        command = ["kafjax", "prepare", *dataset, *raw, "--data_dir", str(data_dir)]
        raise UserError(
            f"{data_dir / name}: no prepared dataset here; this command prepares it:\n"
            f"  {shlex.join(command)}"
        )
    return max(prepared)[1]


def prepared_names(data_dir: str | os.PathLike[str]) -> list[str]:
    """The names of a folder's prepared datasets, sorted."""
    folder = data_folder(data_dir)
    url = url_of(folder)
    files = folder.glob("*/*/dataset_info.json") if url is None else map(Path, list_objects(url))
    return sorted({p.parts[-3] for p in files if p.name == "dataset_info.json" and p.parts[2:]})


def open_builder(dataset_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
    """The tfds builder of a prepared dataset directory; raises `RecordError` without a good one."""
    if not (Path(dataset_dir) / "dataset_info.json").is_file():
        raise RecordError(f"{dataset_dir}: no prepared dataset here (no dataset_info.json)")
    with naming_dataset(Path(dataset_dir)):
        _check_features(Path(dataset_dir) / "features.json")
        builder = tfds.builder_from_directory(os.fspath(plain(dataset_dir)))
        if builder.info.metadata is not None:
            builder.info.metadata.keys()  # tfds reads them on first use
        return builder


def load_decoder(
    dataset_dir: str | os.PathLike[str], *, without: Container[str] = ()
) -> Callable[[bytes], dict[str, Any]]:
    """A function from a record's data to its features as NumPy arrays, except those in `without`.

    TensorFlow is neither needed nor imported.
    """
    return make_decoder(open_builder(dataset_dir), without=without)


def make_decoder(
    builder: tfds.core.DatasetBuilder, *, without: Container[str] = ()
) -> Callable[[bytes], dict[str, Any]]:
    """`load_decoder` of an open dataset."""
    features = builder.info.features
    wanted = {name: feature for name, feature in features.items() if name not in without}
    return tfds.features.FeaturesDict(wanted).deserialize_example_np


@contextlib.contextmanager
def naming_dataset(directory: Path) -> Iterator[None]:
    """Names the dataset in tfds' errors, which can be of any kind for a bad description."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RecordError(
            f"{directory}: dataset_info.json, features.json or metadata.json is damaged "
            f"({type(error).__name__}: {reason}); prepare the dataset again"
        ) from error


def _check_features(path: Path) -> None:
    """Raises `ValueError` for features from outside tfds."""
    names = set(_class_names(json.loads(path.read_bytes())))
    if foreign := sorted(name for name in names if not name.startswith(_FEATURES)):
        raise UserError(f"features.json names {', '.join(foreign)}")


def _class_names(value: Any) -> Iterator[str]:
    """All values of `pythonClassName`, at any depth."""
    if isinstance(value, dict):
        if "pythonClassName" in value:
            yield str(value["pythonClassName"])
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from _class_names(part)
