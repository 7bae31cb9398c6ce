"""Which volumes of a dataset a run trains on and validates on: the paper's folds.

A subject is one volume in CHD (`ct_1001`) and one patient in ACDC, with several volumes
(`patient001_frame01`, `patient001_frame12`), all of which go to the same side of a split. Subjects
are ordered by number, and folds and choices depend on nothing but that order (docs/method.md
section 1).
"""

import random
import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from kafjax.errors import UserError

NUM_FOLDS = 5
_FOLD_SEED = 12345
_CHOICE_SEED = 1234

T = TypeVar("T", bound=Hashable)


class Split(NamedTuple):
    """Names of the volumes to train on and to validate on; no subject is on both sides."""

    train: tuple[str, ...]
    validation: tuple[str, ...]


def subject_of(volume: str) -> str:
    """The subject that a volume shows: all of its name before `_frame`, or all of it."""
    return volume.split("_frame")[0]


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
        raise UserError(
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
) -> Split:
    """Splits labelled volumes by subject.

    Args:
      volumes: names in any order. Subjects are sorted by the last number in theirs, and by name
        where there is none or it is the same.
      fold: number of the fold, from 0.
      num_labeled: M, how many of the fold's training subjects; all of them if None.
      num_folds: the paper has 5.

    Returns:
      The split. Training volumes come subject by subject in the order of the choice.

    Raises:
      ValueError: there is no such fold, or there are not as many subjects.
    """
    if not 0 <= fold < num_folds:
        raise UserError(f"fold is {fold}; expected 0 to {num_folds - 1}")
    subjects = sorted({subject_of(volume) for volume in volumes}, key=_order)
    train, validation = folds(subjects, num_folds=num_folds)[fold]
    if num_labeled is not None:
        train = choose_labeled(train, num_labeled)
    of = {subject: sorted(v for v in volumes if subject_of(v) == subject) for subject in subjects}
    return Split(
        tuple(volume for subject in train for volume in of[subject]),
        tuple(volume for subject in validation for volume in of[subject]),
    )


def _order(subject: str) -> tuple[float, str]:
    numbers = re.findall(r"\d+", subject)
    return (int(numbers[-1]) if numbers else float("inf"), subject)
