"""Post-processing: components against a flood fill, and rules that are kept where they help."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from kafjax.inference.postprocessing import (
    LARGEST,
    Example,
    choose_rules,
    clear_up,
    common_rules,
    read_rules,
    write_rules,
)
from kafjax.workdir.workdir import Workdir

CLASSES = ("heart", "lung")


def components(mask: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Sets of places that are joined by faces."""
    left, found = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        border, joined = [left.pop()], set()
        while border:
            place = border.pop()
            joined.add(place)
            for axis, step in itertools.product(range(3), (-1, 1)):
                near = tuple(p + step * (i == axis) for i, p in enumerate(place))
                if near in left:
                    left.remove(near)
                    border.append(near)
        found.append(joined)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_left_is_what_a_flood_fill_leaves(seed: int) -> None:
    volume = np.random.default_rng(seed).choice(3, (7, 6, 5), p=(0.7, 0.2, 0.1)).astype(np.uint8)
    cleared = clear_up(volume, {"heart": 6.0, "lung": LARGEST}, CLASSES, voxel=2.0)
    hearts = [c for c in components(volume == 1) if 2.0 * len(c) >= 6.0]
    assert len(hearts) < len(components(volume == 1))
    assert set(map(tuple, np.argwhere(cleared == 1).tolist())) == set().union(*hearts)
    lungs = components(volume == 2)
    kept = set(map(tuple, np.argwhere(cleared == 2).tolist()))
    assert kept in lungs
    assert len(kept) == max(map(len, lungs))
    assert (cleared[cleared != volume] == 0).all()
    empty = np.zeros((2, 2, 2), np.uint8)
    np.testing.assert_array_equal(clear_up(empty, {"heart": LARGEST}, CLASSES, 1.0), empty)


def example(*, specks: bool, parts: int = 2) -> Example:
    """A heart of two parts of 27 elements and a lung of one, with specks of the heart or without.

    The labels' heart has as many `parts`.
    """
    label = np.zeros((12, 12, 6), np.uint8)
    label[1:4, 1:4, 1:4] = 1
    if parts == 2:
        label[7:10, 1:4, 1:4] = 1
    label[1:4, 7:10, 1:4] = 2
    prediction = label.copy()
    if specks:
        prediction[11, 11, ::2] = 1
    return Example(prediction, label, 1.5)


def chosen(*examples: Example) -> dict[str, str | float]:
    return choose_rules(((e.label, e.voxel) for e in examples), examples, CLASSES)


def test_a_rule_is_kept_only_where_it_helps() -> None:
    assert chosen(example(specks=False), example(specks=False)) == {}
    # Specks go by their size, as the largest component would take a part of the heart away.
    assert chosen(example(specks=True), example(specks=False)) == {"heart": 0.5 * 27 * 1.5}
    assert chosen(example(specks=True, parts=1)) == {"heart": LARGEST}
    lost = example(specks=True, parts=1)
    lost = lost._replace(label=np.zeros_like(lost.label))
    assert chosen(lost) == {}


def test_runs_that_are_averaged_share_rules() -> None:
    assert common_rules([{"heart": LARGEST, "lung": 3.0}]) == {"heart": LARGEST, "lung": 3.0}
    both = common_rules([{"heart": LARGEST, "lung": 3.0}, {"heart": LARGEST, "lung": 2.0}])
    assert both == {"heart": LARGEST, "lung": 2.0}
    assert common_rules([{"heart": LARGEST}, {"heart": 2.0}]) == {}
    assert common_rules([{"heart": LARGEST}, {}]) == {}


def test_rules_are_of_a_checkpoint_and_change_is_found(tmp_path: Path) -> None:
    workdir = Workdir(tmp_path)
    assert read_rules(workdir, 3) is None
    write_rules(workdir, 3, {"heart": LARGEST, "lung": 0.5})
    assert read_rules(workdir, 3) == {"heart": LARGEST, "lung": 0.5}
    assert read_rules(workdir, 4) is None
    text = workdir.postprocessing_file.read_text()
    workdir.postprocessing_file.write_text(text.replace("0.5", "0.7"))
    with pytest.raises(ValueError, match=r"postprocessing\.json: damaged"):
        read_rules(workdir, 3)
