"""Kept programs: traced once, the same results, and never one for another function."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax import programs
from kafjax.configs import own_finetune
from kafjax.models import MODELS
from kafjax.programs import Program, keep_programs
from kafjax.tasks.base import _OUTSIDE
from kafjax.tasks.pretraining import Pretraining
from kafjax.tasks.registry import make_task
from kafjax.training.step import (
    AXIS_NAME,
    init_state,
    make_optimizer,
    make_update,
    replicate,
    step_inputs,
    to_host,
)
from tests.runs import PLAIN, random_batch, tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where programs are kept in a test."""
    keep_programs(tmp_path / "programs")
    yield tmp_path / "programs"
    keep_programs(None)


class Counted:
    """A function of a dictionary that counts how often it is traced."""

    def __init__(self, factor: float = 2.0):
        self.traced = 0
        self._factor = factor
        self.jitted = jax.jit(self._function)

    def _function(self, values: dict[str, Any], offset: Any) -> dict[str, Any]:
        self.traced += 1
        return {"sum": values["a"] + offset, "scaled": self._factor * values["b"]}


ARGUMENTS = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}, jnp.float32(0.5)


def call(*facts: Any, arguments: Any = ARGUMENTS, factor: float = 2.0) -> int:
    """Calls a new program twice, as a new process would; how often it was traced."""
    counted = Counted(factor)
    program = Program(counted.jitted, *facts)
    for _ in range(2):
        found = program(*arguments)
        np.testing.assert_array_equal(found["sum"], arguments[0]["a"] + arguments[1])
        np.testing.assert_array_equal(found["scaled"], factor * arguments[0]["b"])
    return counted.traced


def test_a_kept_program_is_not_traced_again(folder: Path) -> None:
    assert (call("f", {"n": 1}), call("f", {"n": 1})) == (1, 0)
    assert len(list(folder.iterdir())) == 1


def test_other_facts_shapes_or_types_are_another_program(folder: Path) -> None:
    assert call("f", {"n": 1}) == 1
    assert (call("f", {"n": 2}), call("g", {"n": 1}, factor=3.0)) == (1, 1)
    longer = {**ARGUMENTS[0], "a": jnp.arange(4.0)}, ARGUMENTS[1]
    whole = {**ARGUMENTS[0], "b": jnp.ones((2, 2), jnp.int32)}, ARGUMENTS[1]
    assert [call("f", {"n": 1}, arguments=given) for given in (longer, whole)] == [1, 1]
    assert len(list(folder.iterdir())) == 5


def test_changed_code_and_options_are_traced_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("f") == 1
    with jax.default_matmul_precision("highest"):
        assert call("f") == 1
    files = programs._own_files()
    assert any(name.endswith("losses.py") for name, _, _ in files)
    monkeypatch.setattr(programs, "_own_files", lambda: [*files[1:], (files[0][0], 0, 0)])
    assert call("f") == 1


def test_nothing_is_kept_without_a_folder_or_for_unknown_functions(folder: Path) -> None:
    assert (call("f", None), call("f", None)) == (1, 1)
    assert not folder.exists()
    keep_programs(None)
    assert (call("f"), call("f")) == (1, 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_program_is_traced_again(folder: Path, damage: str) -> None:
    call("f")
    (path,) = folder.iterdir()
    data = path.read_bytes()
    flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    path.write_bytes({"cut": data[:-9], "flipped": flipped, "empty": b""}[damage])
    assert (call("f"), call("f")) == (1, 0)


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    keep_programs(tmp_path / "file" / "programs")
    assert (call("f"), call("f")) == (1, 1)
    keep_programs(None)


def test_without_flatbuffers_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    keep_programs(tmp_path)
    assert (call("f"), call("f")) == (1, 1)
    assert not list(tmp_path.iterdir())


def test_the_least_recently_used_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_MOST", 2)
    assert [call("f", n) for n in (1, 2, 1, 3)] == [1, 1, 0, 1]
    assert [call("f", n) for n in (1, 3, 2)] == [0, 0, 1]


def test_a_program_within_another_is_traced_with_it(folder: Path) -> None:
    program = Program(Counted().jitted, "f")
    found = jax.jit(lambda *given: program(*given)["sum"] * 2)(*ARGUMENTS)
    np.testing.assert_array_equal(found, 2 * (ARGUMENTS[0]["a"] + ARGUMENTS[1]))


def test_a_kept_step_trains_as_a_traced_one(folder: Path) -> None:
    config = tiny_config(Path("a/b/c"), **PLAIN)
    ends = []
    for keeps in (False, True, True):  # traced, kept, and loaded
        keep_programs(folder if keeps else None)
        task = Pretraining(config, axis_name=AXIS_NAME)
        optimizer = make_optimizer(config.optimizer)
        update, state = make_update(task, optimizer), replicate(init_state(task, optimizer))
        for step in range(2):
            before, batch = state, random_batch(config.batch_size, 16, seed=step)
            state, _ = update(state, *step_inputs(batch, 1e-3))
        assert jax.tree.leaves(before.params)[0].is_deleted()  # its memory was reused
        ends.append(to_host(state))
    for end in ends[1:]:
        assert dataclasses.is_dataclass(end) and jax.tree.structure(end) == jax.tree.structure(
            ends[0]
        )
        for one, other in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(end), strict=True):
            np.testing.assert_array_equal(one, other)


OTHER = {
    "seed": 9,
    "num_epochs": 7,
    "num_steps": 5,
    "init_from": "elsewhere",
    "every.log": 3,
    "checkpoint.keep_newest": 9,
    "data.dir": "there",
    "data.fold": 3,
    "data.num_labeled": 4,
    "data.num_threads": 5,
    "optimizer.learning_rate": 0.5,
}


def programs_of(config: Any, batch: dict[str, np.ndarray]) -> tuple[Any, str]:
    """A training step's facts and its text."""
    task = make_task(config, axis_name=AXIS_NAME)
    optimizer = make_optimizer(config.optimizer)
    state = replicate(init_state(task, optimizer))
    text = make_update(task, optimizer).lower(state, *step_inputs(batch, 1e-3)).as_text()
    return task.facts, text


@pytest.mark.parametrize("kind", ["pretrain", "segment"])
def test_fields_that_are_not_facts_change_no_program(kind: str) -> None:
    batch = random_batch(8, 16)
    if kind == "pretrain":
        config = tiny_config(Path("a/b/c"), **PLAIN)
    else:
        config = own_finetune.get_config("scratch")
        config.update_from_flattened_dict(
            {"model.name": "unet", "model.filters": 2, "model.num_classes": 3}
        )
        config.data.patch_size = (32, 32)
        batch = {name: values[:, 0] for name, values in batch.items() if values.ndim > 2} | {
            name: values for name, values in batch.items() if values.ndim < 2
        }
        batch["label"] = np.zeros((8, 32, 32), np.int32)
    assert {name.split(".")[0] for name in OTHER} == {n.split(".")[0] for n in _OUTSIDE}
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.update_from_flattened_dict(OTHER)
    facts, text = programs_of(config, batch)
    assert programs_of(other, batch) == (facts, text)
    other.loss.weights[next(iter(other.loss.weights))] = 0.125
    changed, changed_text = programs_of(other, batch)
    assert changed != facts and changed_text != text


def test_a_network_of_the_users_own_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(Path("a/b/c"), **PLAIN)
    task = Pretraining(config)
    assert task.facts is not None

    class Own(MODELS["unet"].encoder):  # type: ignore[misc, name-defined]
        """May change between two starts."""

    monkeypatch.setitem(MODELS.data, "unet", MODELS["unet"]._replace(encoder=Own))
    assert task.facts is None
