"""Checkpoints: bit equality, damage, retention, configs, and two processes on one machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import ml_dtypes
import numpy as np
import pytest

from kafjax.checkpoint.checkpointer import (
    Checkpointer,
    SaveError,
    load_variables,
    saved_metrics,
)

CONFIG = {"model": {"filters": 4, "levels": [1, 2]}, "num_steps": 10}


class Trace(NamedTuple):
    trace: dict
    count: np.ndarray


class Empty(NamedTuple):
    pass


def make_state(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((3, 3, 1, 4)).astype(np.float32)
    return {
        "params": {"conv": {"kernel": kernel, "bias": np.zeros(4, np.float32)}},
        "batch_stats": {"norm": {"mean": rng.standard_normal(4).astype(ml_dtypes.bfloat16)}},
        "opt_state": (Empty(), Trace({"kernel": kernel * 2}, np.array(7, np.int32)), None),
        "step": np.array(5, np.int64),
        "key": np.array([1, 2**32 - 1], np.uint32),
        "big": rng.standard_normal(200_000),
    }


def copy_of(state):
    return jax.tree.map(np.copy, state)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def open_checkpointer(workdir, **options) -> Checkpointer:
    return Checkpointer(workdir, **{"keep_newest": 3, "best_metric": None, **options})


def save_steps(workdir, steps) -> None:
    with open_checkpointer(workdir) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, make_state(step), metrics={}, data={"step": step})


def data_files(workdir: Path, step: int) -> list[Path]:
    files = (workdir / "checkpoints" / str(step) / "state").rglob("*")
    return sorted((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


def test_restores_every_bit_and_the_tree(tmp_path):
    state = make_state()
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(state) is None
        checkpointer.save(3, state, metrics={"loss": 0.5}, data={"sample": 96, "pi": 3.14})
    template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with open_checkpointer(tmp_path) as checkpointer:
        restored, data = checkpointer.restore_latest(template)
        assert checkpointer.all_steps() == [3]
    assert_same_bits(restored, state)
    assert data == {"sample": 96, "pi": 3.14}
    assert saved_metrics(tmp_path) == {3: {"loss": 0.5}}


def test_saves_what_was_given_though_the_caller_goes_on_writing(tmp_path):
    state = make_state()
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, metrics={}, data={})
        for leaf in jax.tree.leaves(state):
            leaf[...] = 0
        restored, _ = checkpointer.restore_latest(state)
    assert_same_bits(restored, make_state())


def test_a_saved_step_is_not_saved_again(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(2, make_state(2), metrics={}, data={})
        assert not checkpointer.save(2, make_state(3), metrics={}, data={})
        assert_same_bits(checkpointer.restore_latest(make_state())[0], make_state(2))


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_the_newest_leads_to_the_older(tmp_path, caplog, at):
    save_steps(tmp_path, [1, 2, 3])
    flip_a_bit(data_files(tmp_path, 3)[-1], at)
    with open_checkpointer(tmp_path) as checkpointer:
        restored, data = checkpointer.restore_latest(make_state())
        assert "checkpoints/3: damaged" in caplog.text
        assert_same_bits(restored, make_state(2))
        assert data == {"step": 2}
        # The run resumes from step 2, and saves step 3 again.
        assert checkpointer.all_steps() == [1, 2]
        assert checkpointer.save(3, make_state(9), metrics={}, data={})
    assert_same_bits(open_checkpointer(tmp_path).restore_latest(make_state())[0], make_state(9))
    assert len(list((tmp_path / "damaged").glob("3-*/3/state"))) == 1


@pytest.mark.parametrize("fault", ["truncated", "missing", "meta"])
def test_other_damage_leads_to_the_older(tmp_path, caplog, fault):
    save_steps(tmp_path, [1, 2])
    for victim in data_files(tmp_path, 2):
        if fault == "truncated":
            victim.write_bytes(victim.read_bytes()[:100])
        elif fault == "missing":
            victim.unlink()
    if fault == "meta":
        flip_a_bit(tmp_path / "checkpoints/2/meta/metadata", 0.3)
    variables = load_variables(tmp_path)
    assert_same_bits(variables["params"], make_state(1)["params"])
    with open_checkpointer(tmp_path) as checkpointer:
        assert_same_bits(checkpointer.restore_latest(make_state())[0], make_state(1))
    assert "checkpoints/2: damaged" in caplog.text.replace("/meta", "").replace("/state", "")


def test_nothing_is_moved_and_an_error_raised_if_all_is_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        flip_a_bit(data_files(tmp_path, step)[-1])
    with (
        open_checkpointer(tmp_path) as checkpointer,
        pytest.raises(ValueError, match="every checkpoint is damaged: 2, 1"),
    ):
        checkpointer.restore_latest(make_state())
    assert not (tmp_path / "damaged").exists()


def test_a_state_of_another_shape_is_refused_with_all_differences(tmp_path):
    save_steps(tmp_path, [1])
    template = make_state()
    template["params"]["conv"]["kernel"] = np.zeros((3, 3, 1, 8), np.float32)
    template["step"] = np.zeros((), np.int32)
    template["new"] = template.pop("key")
    with open_checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError) as error:
        checkpointer.restore_latest(template)
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    assert "  key: ['uint32', [2]] there, absent expected" in lines
    assert "  new: absent there, ['uint32', [2]] expected" in lines
    assert "  step: ['int64', []] there, ['int32', []] expected" in lines
    assert any(line.startswith("  params/conv/kernel: ['float32', [3, 3, 1, 4]]") for line in lines)


@pytest.mark.parametrize(
    ("mode", "scores", "kept"),
    [
        ("max", {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: float("nan"), 6: 0.1}, [2, 5, 6]),
        ("min", {1: 0.2, 2: 0.9, 3: None, 4: 0.5, 5: float("nan"), 6: 0.3}, [1, 5, 6]),
    ],
)
def test_keeps_the_newest_and_the_best_across_a_restart(tmp_path, mode, scores, kept):
    options = {"keep_newest": 2, "keep_best": 1, "best_metric": "dice", "best_mode": mode}
    for steps in ([1, 2, 3], [4, 5, 6]):
        with open_checkpointer(tmp_path, **options) as checkpointer:
            for step in steps:
                metrics = {} if scores[step] is None else {"dice": scores[step]}
                checkpointer.save(step, {"w": np.zeros(2)}, metrics=metrics, data={})
            checkpointer.wait()
            assert max(checkpointer.all_steps()) == steps[-1]
    assert checkpointer.all_steps() == kept
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == kept


def test_load_variables_reads_a_step_and_needs_no_template(tmp_path):
    save_steps(tmp_path, [1, 2])
    variables = load_variables(tmp_path, step=1)
    assert sorted(variables) == ["batch_stats", "params"]
    for name, tree in variables.items():
        assert_same_bits(tree, make_state(1)[name])


@flax.struct.dataclass
class DataclassState:
    step: np.ndarray
    params: dict
    batch_stats: dict


def test_a_dataclass_state_is_kept_and_its_variables_found(tmp_path):
    plain = make_state()
    state = DataclassState(plain["step"], plain["params"], plain["batch_stats"])
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, metrics={}, data={})
        assert_same_bits(checkpointer.restore_latest(state)[0], state)
    assert_same_bits(load_variables(tmp_path)["batch_stats"], plain["batch_stats"])


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_newest is 0; expected 1 or more"):
        open_checkpointer(tmp_path, keep_newest=0)


def test_load_variables_without_batch_stats(tmp_path):
    with open_checkpointer(tmp_path) as checkpointer:
        state = {"params": {"w": np.ones(3)}, "batch_stats": {}}
        checkpointer.save(1, state, metrics={}, data={})
    assert load_variables(tmp_path)["batch_stats"] == {}


@pytest.mark.parametrize("content", ["absent", "empty", "foreign", "other_step"])
def test_load_variables_refuses_a_folder_without_checkpoints(tmp_path, content):
    folder, step = tmp_path / "run", None
    if content != "absent":
        folder.mkdir()
    if content == "foreign":
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "weights.pth").write_bytes(b"x")
    if content == "other_step":
        save_steps(folder, [1])
        step = 4
    with pytest.raises(ValueError, match=r"run: holds no checkpoint.*; expected the workdir"):
        load_variables(folder, step=step)


def test_load_variables_refuses_another_programs_steps(tmp_path):
    (tmp_path / "checkpoints" / "7" / "default").mkdir(parents=True)
    with pytest.raises(ValueError, match="every checkpoint is damaged: 7"):
        load_variables(tmp_path)


PROCESS = """
import sys
import jax
import numpy as np
address, index, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, index)
from kafjax.checkpoint.checkpointer import Checkpointer, load_variables
def state(step, index):
    w = np.full((4, 3), 10 * step + index, np.float32)
    return {"params": {"w": w}, "step": np.array(step)}
def open_it():
    options = {"keep_newest": 2, "best_metric": "loss", "best_mode": "min"}
    return Checkpointer(workdir, **options)
with open_it() as checkpointer:
    assert checkpointer.restore_latest(state(0, 0)) is None
    for step in (1, 2, 3):
        checkpointer.save(step, state(step, index), metrics={"loss": step}, data={"next": step + 1})
from jax.experimental import multihost_utils
if index == 0:
    files = [f for f in (__import__("pathlib").Path(workdir) / "checkpoints/3/state").rglob("*")]
    victim = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:10])
multihost_utils.sync_global_devices("damaged")
with open_it() as checkpointer:
    restored, data = checkpointer.restore_latest(state(0, 0))
    assert data == {"next": 3}, data
    # Both processes get what process 0 saved.
    np.testing.assert_array_equal(restored["params"]["w"], np.full((4, 3), 20, np.float32))
    assert checkpointer.all_steps() == [1, 2]
    assert checkpointer.save(3, state(3, index), metrics={"loss": 3}, data={"next": 4})
    checkpointer.wait()
    assert checkpointer.all_steps() == [1, 2, 3]
    assert load_variables(workdir)["params"]["w"][0, 0] == 30
print("done", index)
"""


def test_two_processes_save_one_state_and_agree_on_the_good_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for index, output in enumerate(outputs):
        assert f"done {index}" in output, output


@pytest.mark.parametrize("content", [b"{", b'{"loss": 0.0}', b"\xff"])
def test_damaged_scores_neither_stop_a_run_nor_change_the_best(tmp_path, caplog, content):
    options = {"keep_newest": 1, "best_metric": "loss", "best_mode": "min"}
    with open_checkpointer(tmp_path, **options) as checkpointer:
        for step, loss in ((1, 0.1), (2, 0.5)):
            checkpointer.save(step, {"w": np.zeros(2)}, metrics={"loss": loss}, data={})
    (tmp_path / "checkpoints/2/metrics/metrics").write_bytes(content)
    with open_checkpointer(tmp_path, **options) as checkpointer:
        checkpointer.save(3, {"w": np.zeros(2)}, metrics={"loss": 0.6}, data={})
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 3]
    assert "checkpoints/2/metrics/metrics: not the metrics that were saved" in caplog.text


def test_what_cannot_be_written_is_told_and_can_be_saved_again(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    with open_checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:

            def refuse(*_):
                raise ValueError("RESOURCE_EXHAUSTED: no space left")

            patch.setattr(checkpointer._manager, "wait_until_finished", refuse)
            patch.setattr(checkpointer._manager, "check_for_errors", refuse)
            for call in (checkpointer.wait, checkpointer.check):
                with pytest.raises(
                    SaveError, match=f"{tmp_path}: .* earlier ones are kept.*no space"
                ):
                    call()
        checkpointer.check()
        assert checkpointer.save(2, make_state(2), metrics={}, data={})
        assert_same_bits(checkpointer.restore_latest(make_state())[0], make_state(2))


def test_the_first_checkpoint_is_read_back_before_the_run_goes_on(tmp_path, monkeypatch):
    """Orbax ends well in a folder with brackets, and writes nothing there that can be read."""
    monkeypatch.setattr("kafjax.checkpoint.checkpointer.plain", Path)
    workdir = tmp_path / "project [copy]"
    checkpointer = open_checkpointer(workdir)
    with pytest.raises(SaveError, match=r"project \[copy\]: .*DamagedCheckpointError"):
        checkpointer.save(1, make_state(), metrics={}, data={})
    checkpointer.close()
    monkeypatch.undo()
    state = make_state()
    with open_checkpointer(tmp_path / "another [copy]") as checkpointer:
        assert checkpointer.save(1, state, metrics={}, data={"step": 1})
        restored, data = checkpointer.restore_latest(state)
    assert data == {"step": 1}
    assert_same_bits(restored, state)


def test_a_step_is_on_the_disk_before_it_is_there_and_before_an_older_one_goes(
    tmp_path, monkeypatch
):
    done: list[str] = []

    def note(path):
        there = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
        done.append(f"{Path(path).relative_to(tmp_path / 'checkpoints')} of {there}")

    monkeypatch.setattr("kafjax.checkpoint.files.sync_tree", note)
    with open_checkpointer(tmp_path, keep_newest=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(), metrics={}, data={})
            checkpointer.wait()
    of_steps = [line for line in done if "/" not in line.split(" of ")[0]]
    partial = "{0}.orbax-checkpoint-tmp of [{1}'{0}.orbax-checkpoint-tmp']"
    assert of_steps == [
        partial.format(1, ""),
        "1 of ['1']",
        partial.format(2, "'1', "),
        "2 of ['1', '2']",
    ]
