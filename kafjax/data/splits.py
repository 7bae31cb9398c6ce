"""Which volumes of a dataset a run trains on and validates on: the paper's folds.

A subject is one volume in CHD (`ct_1001`) and one patient in ACDC, with several volumes
(`patient001_frame01`, `patient001_frame12`), all of which go to the same side of a split. Subjects
are ordered by number, and folds and choices depend on nothing but that order (docs/method.md
section 1). In data of one's own equal images are one subject too; the paper's folds of CHD and ACDC
stay as they are, and `equal_images_across` says which pairs lie on both sides.
"""

import random
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

NUM_FOLDS = 5
PAPER_KINDS = ("chd", "acdc")  # of datasets, whose folds are the paper's
_FOLD_SEED = 12345
_CHOICE_SEED = 1234

T = TypeVar("T", bound=Hashable)


class Split(NamedTuple):
    """Names of the volumes to train on and to validate on; no subject is on both sides."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def subject_of(volume: str) -> str:
    """The subject that a volume shows: its name before `_frame` and a number, or all of it."""
    return re.split(r"(?<=.)_frame(?=\d)", volume, maxsplit=1)[0]


def group_subjects(
    volumes: Sequence[str], equal_images: Iterable[Iterable[str]] = ()
) -> dict[str, str]:
    """The subject of each volume, where equal images are of one subject.

    Subjects that share an image are one, under the name that comes first in order of number, and so
    are those that are joined by way of others.

    Args:
      volumes: names.
      equal_images: groups of volumes with equal images, as in a dataset's metadata; names that are
        not among `volumes` join subjects all the same.
    """
    present = {subject_of(volume) for volume in volumes}
    joined = {subject: {subject} for subject in present}
    for group in equal_images:
        together = {subject_of(volume) for volume in group}
        together |= set().union(*(joined.get(subject, ()) for subject in together))
        joined |= dict.fromkeys(together, together)
    first = {subject: min(joined[subject] & present, key=_order) for subject in present}
    return {volume: first[subject_of(volume)] for volume in volumes}


def equal_images_across(
    split: Split, equal_images: Iterable[Iterable[str]]
) -> list[tuple[str, str]]:
    """Pairs (training volume, validation volume) of a split with equal images, in its order."""
    groups = [set(group) for group in equal_images]
    return [
        (train, validation)
        for validation in split.validation
        for train in split.train
        if any({train, validation} <= group for group in groups)
    ]


def folds(subjects: Sequence[T], *, num_folds: int = NUM_FOLDS) -> list[tuple[list[T], list[T]]]:
    """Cuts subjects into folds: for each fold its (training, validation) subjects, in order.

    Equals scikit-learn's `KFold(num_folds, shuffle=True, random_state=12345)`.

    Args:
      subjects: in the order of their numbers.
      num_folds: the paper has 5.

    Raises:
      ValueError: fewer subjects than folds, or fewer than 2 folds.
    """
    if not 2 <= num_folds <= len(subjects):
        raise ValueError(
            f"{num_folds} folds of {len(subjects)} labelled subjects; expected at least 2 folds, "
            "and at least as many subjects as folds"
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
      ValueError: there are not as many subjects, or none is asked for.
    """
    if not 1 <= num_labeled <= len(subjects):
        raise ValueError(
            f"num_labeled is {num_labeled}; expected 1 to {len(subjects)}, the fold's subjects"
        )
    return random.Random(_CHOICE_SEED).sample(list(subjects), k=num_labeled)


def split_volumes(
    volumes: Sequence[str],
    *,
    fold: int,
    num_labeled: int | None,
    num_folds: int = NUM_FOLDS,
    equal_images: Iterable[Iterable[str]] = (),
) -> Split:
    """Splits labelled volumes by subject.

    Args:
      volumes: names in any order. Subjects are sorted by the last number in theirs, and by name
        where there is none or it is the same.
      fold: number of the fold, from 0.
      num_labeled: M, how many of the fold's training subjects; all of them if None.
      num_folds: the paper has 5.
      equal_images: groups of volumes that count as one subject, see `group_subjects`. The paper's
        protocol has none.

    Returns:
      The split. Training volumes come subject by subject in the order of the choice.

    Raises:
      ValueError: there is no such fold, or there are not as many subjects.
    """
    if not 0 <= fold < num_folds:
        raise ValueError(f"fold is {fold}; expected 0 to {num_folds - 1}")
    subject = group_subjects(volumes, equal_images)
    subjects = sorted(set(subject.values()), key=_order)
    train, validation = folds(subjects, num_folds=num_folds)[fold]
    if num_labeled is not None:
        train = choose_labeled(train, num_labeled)
    of = {name: sorted(v for v in volumes if subject[v] == name) for name in subjects}
    return Split(
        tuple(volume for name in train for volume in of[name]),
        tuple(volume for name in validation for volume in of[name]),
    )


def _order(subject: str) -> tuple[float, str]:
    numbers = re.findall(r"\d+", subject)
    return (int(numbers[-1]) if numbers else float("inf"), subject)
