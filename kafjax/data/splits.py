"""Which volumes of a dataset a run trains on and validates on: the paper's folds.

A subject is one volume in CHD (`ct_1001`) and one patient in ACDC, with several volumes
(`patient001_frame01`, `patient001_frame12`), all of which go to the same side of a split. Subjects
are ordered by number, and folds and choices depend on nothing but that order (docs/method.md
section 1).
"""

import json
import os
import random
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

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
        raise ValueError(
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
        raise ValueError(f"fold is {fold}; expected 0 to {num_folds - 1}")
    subjects = sorted({subject_of(volume) for volume in volumes}, key=_order)
    train, validation = folds(subjects, num_folds=num_folds)[fold]
    if num_labeled is not None:
        train = choose_labeled(train, num_labeled)
    of = {subject: sorted(v for v in volumes if subject_of(v) == subject) for subject in subjects}
    return Split(
        tuple(volume for subject in train for volume in of[subject]),
        tuple(volume for subject in validation for volume in of[subject]),
    )


def split_by_names(
    volumes: Sequence[str],
    *,
    train: Sequence[str] | None = None,
    validation: Sequence[str] = (),
    num_labeled: int | None = None,
) -> Split:
    """A split whose sides the user names, by volume or by subject.

    Args:
      volumes: names of the labelled volumes.
      train: names to train on; by default all that are not validated on.
      validation: names to validate on; may be empty.
      num_labeled: M, how many of the training subjects, chosen as in `split_volumes`; all if None.

    Raises:
      ValueError: a name is unknown or on both sides, directly or by its subject, or no volume or
        fewer than M subjects are left to train on.
    """
    sides = {
        "train": None if train is None else _find(volumes, train, "train"),
        "validation": _find(volumes, validation, "validation"),
    }
    held_out = {subject_of(volume) for volume in sides["validation"] or ()}
    left = [volume for volume in volumes if subject_of(volume) not in held_out]
    chosen = left if sides["train"] is None else sides["train"]
    if both := sorted({subject_of(volume) for volume in chosen} & held_out):
        raise ValueError(
            f"{', '.join(both)}: on both sides of the split; expected each subject on one"
        )
    if not chosen:
        raise ValueError("no labelled volume is left to train on; expected at least one")
    subjects = sorted({subject_of(volume) for volume in chosen}, key=_order)
    if num_labeled is not None:
        subjects = choose_labeled(subjects, num_labeled)
    return Split(
        tuple(v for subject in subjects for v in sorted(chosen) if subject_of(v) == subject),
        tuple(sorted(sides["validation"] or ())),
    )


def read_splits_file(path: str | os.PathLike[str], fold: int | None) -> tuple[list[str], list[str]]:
    """The training and validation names of a fold in nnU-Net's `splits_final.json`.

    Args:
      path: of the file, a JSON list with {"train": [...], "val": [...]} for each fold.
      fold: its number, from 0.

    Raises:
      ValueError: the file is not there or not such a list, or has no such fold.
    """
    place = Path(path).expanduser()
    try:
        folds_there = json.loads(place.read_text(encoding="utf-8-sig"))
        sides = [(list(map(str, f["train"])), list(map(str, f["val"]))) for f in folds_there]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"config.data.splits_file is {os.fspath(path)!r}, expected nnU-Net's splits_final.json:"
            f' a list of {{"train": [...], "val": [...]}} ({type(error).__name__}: {error})'
        ) from None
    if fold is None or not 0 <= fold < len(sides):
        raise ValueError(
            f"config.data.fold is {fold}, expected 0 to {len(sides) - 1}, the folds of {place}"
        )
    return sides[fold]


def _find(volumes: Sequence[str], names: Sequence[str], side: str) -> list[str]:
    """The volumes that names stand for, themselves or as their subjects."""
    found = {name: [v for v in volumes if name in (v, subject_of(v))] for name in names}
    if unknown := sorted(name for name, of_name in found.items() if not of_name):
        raise ValueError(
            f"{side}: no labelled volume or subject {', '.join(unknown)}; there are "
            + ", ".join(sorted(volumes))
        )
    return [volume for of_name in found.values() for volume in of_name]


def _order(subject: str) -> tuple[float, str]:
    numbers = re.findall(r"\d+", subject)
    return (int(numbers[-1]) if numbers else float("inf"), subject)
