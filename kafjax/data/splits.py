"""Splits of a dataset into training and validation volumes: the paper's folds.

A subject is one volume in CHD (`ct_1001`) and one patient in ACDC, with several volumes
(`patient001_frame01`, `patient001_frame12`), all on the same side of a split. Subjects are ordered
by number, and folds and choices depend only on that order (docs/method.md section 1). In your own
data equal images also count as one subject; the paper's folds of CHD and ACDC do not change, and
`equal_images_across` lists pairs on both sides.
"""

import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from kafjax.errors import UserError
from kafjax.paths import expand

NUM_FOLDS = 5
PAPER_KINDS = ("chd", "acdc")  # dataset kinds that use the paper's folds
_FOLD_SEED = 12345
_CHOICE_SEED = 1234

T = TypeVar("T", bound=Hashable)


class Split(NamedTuple):
    """Names of the volumes to train on and to validate on; no subject is on both sides.

    `unlabelled` are trained on without their labels, in semi-supervised runs.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    unlabelled: tuple[str, ...] = ()


def subject_of(volume: str) -> str:
    """The subject of a volume: its name before `_frame` and a number, or the whole name."""
    return re.split(r"(?<=.)_frame(?=\d)", volume, maxsplit=1)[0]


def group_subjects(
    volumes: Sequence[str],
    equal_images: Iterable[Iterable[str]] = (),
    table: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The subject of each volume; equal images belong to one subject.

    Subjects that share an image, directly or through others, are merged under the name that comes
    first in order of number.

    Args:
      volumes: names.
      equal_images: groups of volumes with equal images, as in a dataset's metadata; names outside
        `volumes` also merge subjects.
      table: subjects by volume, given by the user; other volumes get theirs from their names.
    """
    named = dict(table or {})

    def subject_of_volume(volume: str) -> str:
        return named.get(volume) or subject_of(volume)

    present = {subject_of_volume(volume) for volume in volumes}
    joined = {subject: {subject} for subject in present}
    for group in equal_images:
        together = {subject_of_volume(volume) for volume in group}
        together |= set().union(*(joined.get(subject, ()) for subject in together))
        joined |= dict.fromkeys(together, together)
    first = {subject: min(joined[subject] & present, key=_order) for subject in present}
    return {volume: first[subject_of_volume(volume)] for volume in volumes}


def equal_images_across(
    split: Split, equal_images: Iterable[Iterable[str]]
) -> list[tuple[str, str]]:
    """Pairs (training volume, validation volume) of a split with equal images, in its order."""
    rank = {name: i for i, name in enumerate(split.train)}
    equal: dict[str, set[str]] = {name: set() for name in split.validation}
    for group in map(set, equal_images):
        for name in group & equal.keys():
            equal[name] |= group & rank.keys()
    return [
        (train, validation)
        for validation in split.validation
        for train in sorted(equal[validation], key=rank.__getitem__)
    ]


def folds(subjects: Sequence[T], *, num_folds: int = NUM_FOLDS) -> list[tuple[list[T], list[T]]]:
    """Cuts subjects into folds: for each fold its (training, validation) subjects, in order.

    Equals scikit-learn's `KFold(num_folds, shuffle=True, random_state=12345)`.

    Args:
      subjects: in the order of their numbers.
      num_folds: 5 in the paper.

    Raises:
      ValueError: fewer subjects than folds, or fewer than 2 folds.
    """
    if not 2 <= num_folds <= len(subjects):
        raise UserError(
            f"{num_folds} folds of {len(subjects)} labelled subjects; expected at least 2 folds, "
            "and at least as many subjects as folds: fewer as config.data.num_folds, or "
            "config.data.fold=None to train on all labelled volumes and validate on none"
        )
    order = np.arange(len(subjects))
    np.random.RandomState(_FOLD_SEED).shuffle(order)  # as scikit-learn does
    parts = [set(part.tolist()) for part in np.array_split(order, num_folds)]
    return [
        (
            [subject for i, subject in enumerate(subjects) if i not in part],
            [subject for i, subject in enumerate(subjects) if i in part],
        )
        for part in parts
    ]


def choose_labeled(subjects: Sequence[T], num_labeled: int) -> list[T]:
    """The paper's choice of M of a fold's training subjects, `random.sample` of seed 1234.

    Raises:
      ValueError: fewer subjects than requested, or 0 requested.
    """
    if not 1 <= num_labeled <= len(subjects):
        raise UserError(
            f"num_labeled is {num_labeled}; expected 1 to {len(subjects)}, the fold's subjects"
        )
    return random.Random(_CHOICE_SEED).sample(list(subjects), k=num_labeled)


def split_volumes(
    volumes: Sequence[str],
    *,
    fold: int,
    num_labeled: int | None,
    num_folds: int = NUM_FOLDS,
    subject: Mapping[str, str] | None = None,
) -> Split:
    """Splits labelled volumes by subject.

    Args:
      volumes: names in any order. Subjects are sorted by the last number in their names, then by
        name.
      fold: number of the fold, from 0.
      num_labeled: M, the number of the fold's training subjects to use; all if None.
      num_folds: 5 in the paper.
      subject: of each volume, see `group_subjects`; by default from their names.

    Returns:
      The split. Training volumes come subject by subject in the order of the choice.

    Raises:
      ValueError: no such fold, or too few subjects.
    """
    if not 0 <= fold < num_folds:
        raise UserError(f"fold is {fold}; expected 0 to {num_folds - 1}")
    subject = group_subjects(volumes) if subject is None else subject
    subjects = sorted(set(subject.values()), key=_order)
    train, validation = folds(subjects, num_folds=num_folds)[fold]
    if num_labeled is not None:
        train = choose_labeled(train, num_labeled)
    of = _by_subject(volumes, subject)
    return Split(
        tuple(volume for name in train for volume in of[name]),
        tuple(volume for name in validation for volume in of[name]),
    )


def split_by_names(
    volumes: Sequence[str],
    *,
    train: Sequence[str] | None = None,
    validation: Sequence[str] = (),
    num_labeled: int | None = None,
    subject: Mapping[str, str] | None = None,
) -> Split:
    """A split by names, of volumes or subjects, that the user gives.

    Args:
      volumes: names of the labelled volumes.
      train: names to train on; by default all others.
      validation: names to validate on; may be empty.
      num_labeled: M, the number of training subjects, chosen as in `split_volumes`; all if None.
      subject: of each volume, see `group_subjects`; by default from their names.

    Raises:
      ValueError: a name is unknown or on both sides, directly or by its subject, or no volume or
        fewer than M subjects are left to train on.
    """
    subject = group_subjects(volumes) if subject is None else subject
    held_out = _find(subject, validation, "validation")
    sides = {subject[volume] for volume in held_out}
    left = [volume for volume in volumes if subject[volume] not in sides]
    chosen = left if train is None else _find(subject, train, "train")
    if both := sorted({subject[volume] for volume in chosen} & sides):
        raise UserError(
            f"{', '.join(both)}: on both sides of the split; expected each subject on one"
        )
    if not chosen:
        raise UserError("no labelled volume is left to train on; expected at least one")
    subjects = sorted({subject[volume] for volume in chosen}, key=_order)
    if num_labeled is not None:
        subjects = choose_labeled(subjects, num_labeled)
    of = _by_subject(chosen, subject)
    return Split(tuple(v for name in subjects for v in of[name]), tuple(sorted(held_out)))


def unlabelled_volumes(
    volumes: Sequence[str], split: Split, *, apart: Sequence[str], subject: Mapping[str, str]
) -> tuple[str, ...]:
    """The volumes to train on without labels: all others of subjects that are not held out.

    Args:
      volumes: names of all volumes.
      split: of the labelled ones.
      apart: names of volumes, such as the test set, that are held out with their subjects.
      subject: of each volume, see `group_subjects`.
    """
    held_out = {subject[volume] for volume in (*split.validation, *apart)}
    train = set(split.train)
    return tuple(v for v in sorted(volumes) if v not in train and subject[v] not in held_out)


def read_splits_file(path: str | os.PathLike[str], fold: int | None) -> tuple[list[str], list[str]]:
    """The training and validation names of a fold in nnU-Net's `splits_final.json`.

    Args:
      path: of the file, a JSON list with {"train": [...], "val": [...]} for each fold.
      fold: its number, from 0.

    Raises:
      ValueError: the file is missing or not such a list, or has no such fold.
    """
    place = expand(path)
    try:
        folds_there = json.loads(place.read_bytes())
        sides = [(list(map(str, f["train"])), list(map(str, f["val"]))) for f in folds_there]
        if not sides:
            raise UserError("no fold")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"config.data.splits_file is {os.fspath(path)!r}, expected nnU-Net's splits_final.json:"
            f' a list of {{"train": [...], "val": [...]}} ({type(error).__name__}: {error})'
        ) from None
    if fold is None or not 0 <= fold < len(sides):
        raise UserError(
            f"config.data.fold is {fold}, expected 0 to {len(sides) - 1}, the folds of {place}"
        )
    return sides[fold]


def _find(subject: Mapping[str, str], names: Sequence[str], side: str) -> list[str]:
    """The volumes that names refer to, directly or as subjects, each once."""
    of = _by_subject(tuple(subject), subject)
    found = {
        name: [*of.get(name, ()), *([name] if subject.get(name, name) != name else [])]
        for name in names
    }
    if unknown := sorted(name for name, of_name in found.items() if not of_name):
        raise UserError(
            f"{side}: no labelled volume or subject {', '.join(unknown)}; there are "
            + ", ".join(sorted(subject))
        )
    return list(dict.fromkeys(volume for of_name in found.values() for volume in of_name))


def _by_subject(volumes: Sequence[str], subject: Mapping[str, str]) -> dict[str, list[str]]:
    """The volumes of each subject, in order of name."""
    found: dict[str, list[str]] = defaultdict(list)
    for volume in sorted(volumes):
        found[subject[volume]].append(volume)
    return found


def _order(subject: str) -> tuple[float, str]:
    numbers = re.findall(r"\d+", subject)
    return (int(numbers[-1]) if numbers else float("inf"), subject)
