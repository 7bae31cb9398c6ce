"""The training and validation volumes of a run, with digests of their content.

    WORKDIR/split.json    with a checksum; written at the run's start and never again

The split belongs to the run: evaluation, resuming and figures read this file and never split a
dataset that may have changed since. A volume's content is the digest of its records.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from kafjax.data.dataset import SliceDataset
from kafjax.data.splits import Split
from kafjax.errors import UserError
from kafjax.files import checksum, read_checked, write_checked
from kafjax.workdir.workdir import Workdir


class RunSplit(NamedTuple):
    """The content of `split.json`.

    Attributes:
      dataset: its name, kind and version.
      classes: names in numerical order, the background first.
      train: for each training volume, in order, the digest of its content.
      validation: the same for the validation volumes.
      others: names of the dataset's other volumes at that time.
      unlabelled: as `train`, the volumes trained on without labels; they are among the others.
    """

    dataset: dict[str, str]
    classes: tuple[str, ...]
    train: dict[str, str]
    validation: dict[str, str]
    others: tuple[str, ...]
    unlabelled: dict[str, str]

    @property
    def names(self) -> Split:
        """The names of the volumes."""
        return Split(tuple(self.train), tuple(self.validation), tuple(self.unlabelled))

    @property
    def digest(self) -> str:
        """Differs between runs with different volumes, contents, classes or sides."""
        return checksum({name: getattr(self, name) for name in ("classes", *Split._fields)})


def describe_split(split: Split, dataset: SliceDataset) -> RunSplit:
    """A split of a dataset with the contents of its volumes."""
    contents = dataset.contents()
    of_run = {*split.train, *split.validation}
    return RunSplit(
        dataset=dataset.identity(),
        classes=dataset.classes,
        train={name: contents[name] for name in split.train},
        validation={name: contents[name] for name in split.validation},
        others=tuple(n for n in dataset.volumes if n not in of_run),
        unlabelled={name: contents[name] for name in split.unlabelled},
    )


def write_split(workdir: Workdir, split: RunSplit) -> None:
    """Stores a run's split; creates the folder."""
    workdir.path.mkdir(parents=True, exist_ok=True)
    write_checked(workdir.split_file, split._asdict())


def read_split(workdir: Workdir) -> RunSplit | None:
    """The split of a run, None without the file; `ValueError` if it was changed."""
    try:
        found: dict[str, Any] = read_checked(workdir.split_file)
        return RunSplit(
            dataset=dict(found["dataset"]),
            classes=tuple(found["classes"]),
            train=dict(found["train"]),
            validation=dict(found["validation"]),
            others=tuple(found["others"]),
            unlabelled=dict(found.get("unlabelled", {})),  # runs of earlier versions have none
        )
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{workdir.split_file}: not a run's split ({error})") from None


def open_split(workdir: Workdir, dataset: SliceDataset, *, training: bool = False) -> RunSplit:
    """The recorded split of a run, after checking that the dataset still matches it.

    Volumes used without labels may have got labels since, unless the run is to resume `training`.

    Raises:
      ValueError: no split is recorded, or the dataset lacks its volumes, or their content or
        classes differ; every difference is listed.
    """
    split = read_split(workdir)
    if split is None:
        raise UserError(
            f"{workdir}: has no {workdir.split_file.name}, which runs of kafjax 0.1 did not write. "
            "If the dataset is still the one that the run was trained on, record its split with "
            f"kafjax evaluate --record_split --workdir {workdir}"
        )
    check_split(workdir, split, dataset, training=training)
    return split


def check_split(
    workdir: Workdir, split: RunSplit, dataset: SliceDataset, *, training: bool
) -> None:
    """Raises `ValueError` listing the differences between a dataset and a run's split."""
    contents = dataset.contents()
    faults = []
    if split.classes != dataset.classes:
        faults.append(
            f"  classes: {', '.join(split.classes)} in the run, "
            f"{', '.join(dataset.classes)} in the dataset"
        )
    for side in Split._fields:
        volumes: Mapping[str, str] = getattr(split, side)
        faults += [f"  {name} ({side}): missing" for name in volumes if name not in contents]
        faults += [
            f"  {name} ({side}): other content"
            for name, content in volumes.items()
            if contents.get(name, content) != content
            and (training or side != "unlabelled")  # a content is of image and label
        ]
    if faults:
        raise UserError(
            f"{dataset.directory} is not the dataset that the run in {workdir} was trained on; "
            "give that one's folder as --data_dir, or train in another workdir:\n"
            + "\n".join(faults)
        )


def describe_later(split: RunSplit, dataset: SliceDataset) -> str:
    """A line about volumes added to the dataset since the run started; empty if none."""
    known = {*split.train, *split.validation, *split.others}
    later = [name for name in dataset.volumes if name not in known]
    if not later:
        return ""
    return (
        f"{dataset.directory} has volumes added after the run started, which are not part of it: "
        + ", ".join(later)
    )
