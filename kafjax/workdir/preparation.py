"""How a run's dataset was prepared, so that prediction prepares raw volumes alike.

    WORKDIR/preparation.json    the dataset's metadata, except its volumes, with a checksum

makes a workdir sufficient for prediction without the dataset. If the file is missing, the dataset's
own metadata is used.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kafjax.data.dataset import context_of, count_channels
from kafjax.data.records import find_dataset, open_builder
from kafjax.errors import UserError
from kafjax.files import read_checked, write_checked
from kafjax.workdir.workdir import Workdir

Preparation = dict[str, Any]

# Common to all kinds of datasets; `data_prep.readers.reader_of` knows the rest.
_NEEDED = ("kind", "classes", "max_keypoints", "keypoint_selection", "seed")
# Fields that may differ between datasets with equal preparation.
_FREE = ("dataset", "libraries", "reach", "image_dtype", "planes", "equal_images", "subjects")


def write_preparation(workdir: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Records in a run's workdir how its dataset was prepared, from the dataset's metadata."""
    facts = {name: value for name, value in metadata.items() if name != "volumes"}
    write_checked(Workdir(workdir).preparation_file, facts)


def read_preparation(
    workdir: str | os.PathLike[str], *, data_dir: str | os.PathLike[str] | None = None
) -> Preparation:
    """How the dataset of a segmentation run was prepared.

    Args:
      workdir: of the run.
      data_dir: folder of the run's dataset; if given, the dataset's metadata is used.

    Raises:
      ValueError: neither workdir nor dataset has it, or the run's config contradicts it.
    """
    config = Workdir(workdir).read_config(task="segment")
    noted = Workdir(workdir).preparation_file
    if data_dir is None and noted.exists():
        found = _read_file(noted)
        place = noted
    else:
        place = _find(workdir, config, data_dir)
        found = dict(open_builder(place).info.metadata or {})
        found.pop("volumes", None)
    _check(place, found, config)
    return found


def check_alike(preparations: Mapping[str, Preparation]) -> None:
    """Raises `ValueError` listing the differences in preparation of runs' datasets, by workdir."""
    (first, wanted), *others = preparations.items()
    differing = [
        f"  {name}: {wanted.get(name)!r} in {first}, {found.get(name)!r} in {workdir}"
        for workdir, found in others
        for name in sorted((wanted.keys() | found.keys()) - set(_FREE))
        if wanted.get(name) != found.get(name)
    ]
    if differing:
        raise UserError("the runs' datasets were prepared differently:\n" + "\n".join(differing))


def _find(
    workdir: str | os.PathLike[str],
    config: Mapping[str, Any],
    data_dir: str | os.PathLike[str] | None,
) -> Path:
    place = config["data"]["dir"] if data_dir is None else data_dir
    try:
        return find_dataset(place, config["data"]["name"])
    except UserError as error:
        raise UserError(
            f"{workdir} has no preparation.json, which records how its dataset was prepared, and "
            f"the dataset {config['data']['name']} is not in {place}; give its folder as "
            f"--data_dir ({error})"
        ) from None


def _read_file(path: Path) -> Preparation:
    try:
        return read_checked(path)
    except ValueError as error:
        raise UserError(f"{path}: not a dataset's metadata ({error})") from None


def _check(place: Path, found: Preparation, config: Mapping[str, Any]) -> None:
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise UserError(f"{place}: lacks {', '.join(missing)}; prepare the dataset again")
    pairs = {
        "max_keypoints": (found["max_keypoints"], config["data"]["max_keypoints"]),
        "number of classes": (len(found["classes"]), config["model"]["num_classes"]),
        "number of channels": (
            count_channels(found, context_of(config)),
            config["model"].get("num_channels") or 1,
        ),
        "number of regions": (
            len(found.get("regions", ())),
            config["model"].get("num_regions") or 0,
        ),
    }
    wrong = [
        f"  {name}: {there} there, {here} in the run's config"
        for name, (there, here) in pairs.items()
        if there != here
    ]
    if wrong:
        raise UserError(f"{place} differs from the run's preparation:\n" + "\n".join(wrong))
