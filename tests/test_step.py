"""The mapped step: the same result on any number of devices, and lowering for other platforms."""

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from kafjax.tasks.pretraining import Pretraining
from kafjax.training import step as step_module
from kafjax.training.step import (
    AXIS_NAME,
    init_state,
    learning_rates,
    make_optimizer,
    make_update,
    replicate,
    return_freed_memory,
    step_inputs,
    to_host,
    update_average,
)
from tests.runs import ROOT, XLA_FLAGS, free_address, random_batch, tiny_config

NUM_KEYPOINTS = 16

THREE_STEPS = """
import sys
import jax, numpy as np
from pathlib import Path
from kafjax.tasks.pretraining import Pretraining
from kafjax.training.step import *
from kafjax.training.step import AXIS_NAME
from tests.runs import random_batch, tiny_config

config = tiny_config(Path("a/b/c"), **{"model.dtype": "float64"})
task = Pretraining(config, axis_name=AXIS_NAME)
optimizer = make_optimizer(config.optimizer)
state, losses = replicate(init_state(task, optimizer)), []
update = make_update(task, optimizer)
for step in range(3):
    batch = random_batch(config.batch_size, 16, seed=step)
    # Devices hold different numbers of real keypoints, one of them none.
    batch["keypoint_mask"][0] = False
    batch["correspondence"][0] = -1
    state, metrics = update(state, *step_inputs(batch, config.optimizer.learning_rate))
    losses.append(float(to_host(metrics)["loss"]))
leaves = jax.tree.leaves(to_host(state))
np.savez(sys.argv[1], np.array(losses), *leaves)
"""


def start_python(devices: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Starts Python in the repository on simulated devices."""
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        text=True,
    )


def end(processes: list[subprocess.Popen[str]]) -> None:
    """Waits for processes; all must succeed."""
    try:
        assert [process.wait(timeout=600) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_eight_devices_train_as_one(tmp_path: Path) -> None:
    paths = {n: tmp_path / f"{n}.npz" for n in (1, 8)}
    end(
        [
            start_python(n, "-c", THREE_STEPS, str(path), JAX_ENABLE_X64="1")
            for n, path in paths.items()
        ]
    )
    one, eight = (np.load(path) for path in paths.values())
    assert len(one.files) > 100
    for name in one.files:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-9, err_msg=name)


def test_shard_map_gives_the_bits_of_pmap_in_one_process_and_in_two(tmp_path: Path) -> None:
    """Each process compares for itself, and asserts that replicated results are the same."""
    address, module = free_address(), ("-m", "tests.shard_map")
    alone, *both = (str(tmp_path / f"{name}.npz") for name in ("alone", "first", "second"))
    processes = [start_python(4, *module, alone)]
    processes += [start_python(2, *module, path, address, str(i)) for i, path in enumerate(both)]
    end(processes)
    one, first, second = (np.load(path) for path in (alone, *both))
    for name in one.files:
        assert first[name].tobytes() == second[name].tobytes()
        np.testing.assert_allclose(first[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_step_lowers_for_accelerators() -> None:
    config = tiny_config(Path("a/b/c"), batch_size=2)
    task = Pretraining(config, axis_name=AXIS_NAME)
    optimizer = make_optimizer(config.optimizer)
    state = replicate(init_state(task, optimizer))
    inputs = step_inputs(random_batch(2, NUM_KEYPOINTS), 1e-3)
    traced = jax.jit(make_update(task, optimizer)).trace(state, *inputs)
    for target in ("tpu", "cuda"):
        lowered = traced.lower(lowering_platforms=(target,))
        assert "stablehlo.convolution" in lowered.as_text()


def test_schedule_is_a_cosine_from_rate_to_floor() -> None:
    config = tiny_config(Path("a/b/c")).optimizer
    config.update({"learning_rate": 5e-4, "final_learning_rate": 5e-5})
    schedule = optax.cosine_decay_schedule(5e-4, 100, alpha=0.1)
    rates = learning_rates(config, 100)
    assert (rates.shape, rates.dtype) == ((100,), np.float32)
    np.testing.assert_allclose(rates, schedule(np.arange(100)), rtol=1e-6)


def test_schedule_rises_over_its_first_share() -> None:
    config = tiny_config(Path("a/b/c")).optimizer
    config.update({"learning_rate": 4e-4, "final_learning_rate": 4e-6, "warmup": 0.05})
    for num_steps in (60, 300, 30_000):
        rise = num_steps // 20
        rates = learning_rates(config, num_steps)
        expected = optax.join_schedules(
            [
                optax.linear_schedule(4e-4 / (rise + 1), 4e-4, rise),
                optax.cosine_decay_schedule(4e-4, num_steps - rise, alpha=0.01),
            ],
            [rise],
        )
        assert len(rates) == num_steps
        np.testing.assert_allclose(rates, expected(np.arange(num_steps)), rtol=1e-5, atol=1e-10)


def test_averages_are_those_of_a_loop() -> None:
    values = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    expected, average = values[0].astype(np.float64), {"x": values[0]}
    update = jax.jit(functools.partial(update_average, decay=0.7))
    for step, value in enumerate(values[1:]):
        kept = min(0.7, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * value
        average = update(average, {"x": value}, np.int32(step))
        np.testing.assert_allclose(average["x"], expected, rtol=1e-5, atol=1e-6)


def test_sgd_is_momentum_with_decay_in_the_gradient() -> None:
    config = tiny_config(Path("a/b/c")).optimizer
    config.weight_decay = 0.1
    optimizer = make_optimizer(config)
    parameter, buffer = 2.0, 0.0
    params = np.float32(parameter)
    state = optimizer.init(params)
    for gradient in (1.0, -3.0, 0.5):
        buffer = 0.9 * buffer + gradient + 0.1 * parameter
        parameter -= 0.5 * buffer
        updates, state = optimizer.update(np.float32(gradient), state, params)
        params = optax.apply_updates(params, 0.5 * updates)
        np.testing.assert_allclose(params, parameter, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimizers_start_as_optax_has_them(name: str) -> None:
    config = tiny_config(Path("a/b/c")).optimizer
    config.name = name
    optimizer, task = make_optimizer(config, frozen=("w",)), Line()
    found, expected = init_state(task, optimizer).opt_state, optimizer.init(task.init()["params"])
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, np.ndarray) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_unknown_optimizer_names_the_choices() -> None:
    config = tiny_config(Path("a/b/c")).optimizer
    config.name = "lamb"
    with pytest.raises(ValueError, match="'lamb', expected sgd or adam"):
        make_optimizer(config)


def test_what_is_replicated_comes_back_as_it_was() -> None:
    tree = {"a": np.arange(3), "b": np.float32(2)}
    jax.tree.map(np.testing.assert_array_equal, to_host(replicate(tree)), tree)


def test_a_state_with_averages_keeps_them_beside_what_trains() -> None:
    task, optimizer = Line(), make_optimizer(tiny_config(Path("a/b/c")).optimizer)
    update = make_update(task, optimizer, average_decay=0.5)
    state = replicate(init_state(task, optimizer, averages=True))
    expected = 3.0
    for step in range(3):
        state, _ = update(state, *step_inputs({"x": np.ones(8, np.float32)}, 0.1))
        host = to_host(state)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * float(host.params["w"])
        np.testing.assert_allclose(host.average["params"]["w"], expected, rtol=1e-6)
        assert host.variables is host.average
    plain = init_state(task, optimizer)
    assert plain.average == {}
    assert plain.variables["params"] is plain.params


class Line:
    """Fits a number; counts how often its loss is traced."""

    traces = 0
    has_teacher = False
    facts = None

    def init(self):
        return {"params": {"w": np.float32(3)}, "batch_stats": {}}

    def loss(self, params, batch_stats, batch):
        self.traces += 1
        loss = ((params["w"] - batch["x"]) ** 2).mean()
        return loss, ({"loss": loss}, batch_stats)


class Taught(Line):
    """Fits the teacher's number in place of the batch's."""

    has_teacher = True

    def loss(self, params, batch_stats, batch, teacher):
        distance = params["w"] - jax.lax.stop_gradient(teacher["params"]["w"]) - batch["x"]
        return (distance**2).mean(), ({"loss": (distance**2).mean()}, batch_stats)


def test_the_teacher_is_the_average_before_the_step() -> None:
    task, optimizer = Taught(), make_optimizer(tiny_config(Path("a/b/c")).optimizer)
    update = make_update(task, optimizer, average_decay=0.5)
    state = replicate(init_state(task, optimizer, averages=True))
    weight = average = 3.0
    for step in range(4):
        state, metrics = update(state, *step_inputs({"x": np.ones(8, np.float32)}, 0.1))
        np.testing.assert_allclose(to_host(metrics)["loss"], (weight - average - 1) ** 2, rtol=1e-5)
        host = to_host(state)
        weight = float(host.params["w"])
        kept = min(0.5, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * weight
        np.testing.assert_allclose(host.average["params"]["w"], average, rtol=1e-5)


def test_later_steps_are_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = []
    monkeypatch.setattr(step_module, "return_freed_memory", lambda: returned.append(True))
    task, optimizer = Line(), make_optimizer(tiny_config(Path("a/b/c")).optimizer)
    update, state = make_update(task, optimizer), replicate(init_state(task, optimizer))
    for step in range(3):
        state, _ = update(state, *step_inputs({"x": np.ones(8, np.float32)}, 0.1))
        assert (task.traces, int(to_host(state).step)) == (1, step + 1)
    assert returned == [True]


def test_a_step_takes_the_memory_of_the_state_before_and_leaves_the_host_alone() -> None:
    task, optimizer = Line(), make_optimizer(tiny_config(Path("a/b/c")).optimizer)
    host = init_state(task, optimizer)
    expected = jax.tree.map(np.copy, host)
    update, before = make_update(task, optimizer), replicate(host)
    inputs = step_inputs({"x": np.ones(8, np.float32)}, 0.1)
    update(before, *inputs)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    memory = update.lower(replicate(host), *inputs).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(host))
    jax.tree.map(np.testing.assert_array_equal, host, expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives back on request")
def test_freed_memory_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # Blocks too small for a mapping of their own, and a last one that keeps them from the top.
    blocks = [np.ones(2**13) for _ in range(2000)]
    blocks = blocks[-1:]
    before = resident()
    return_freed_memory()
    assert before - resident() > 64e6
