"""Local contrast: what its views share, what it trains, and what it leaves alone."""

from typing import Any

import jax
import numpy as np
import pytest

from kafjax.configs import phantom_pretrain
from kafjax.tasks.local_contrast import LocalContrast
from kafjax.training.step import (
    init_state,
    make_optimizer,
    make_update,
    replicate,
    step_inputs,
    to_host,
)
from tests.runs import random_batch

TINY = {"data.patch_size": (32, 32), "model.filters": 4, "model.embedding": 8}


@pytest.fixture(scope="module")
def config() -> Any:
    config = phantom_pretrain.get_config("glcl")
    config.update_from_flattened_dict(TINY)
    return config


def test_views_show_the_same_places_in_other_intensities(config: Any) -> None:
    batch = random_batch(3, 16)
    views = jax.jit(LocalContrast(config).augment)(batch)
    for first, second in views["image"]:
        assert np.corrcoef(np.ravel(first), np.ravel(second))[0, 1] > 0.9999
        assert np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(views["keypoints"][:, 0], views["keypoints"][:, 1])
    np.testing.assert_array_equal(views["keypoint_mask"][:, 0], views["keypoint_mask"][:, 1])
    # Only anchors are shown: another neighbour changes nothing.
    other = {**batch, "image": batch["image"].copy()}
    other["image"][:, 1] += 1
    np.testing.assert_array_equal(
        jax.jit(LocalContrast(config).augment)(other)["image"], views["image"]
    )


def test_steps_lower_the_loss_and_leave_the_encoder_as_it_was(config: Any) -> None:
    config.optimizer.weight_decay = 0.1
    task = LocalContrast(config, axis_name="batch")
    optimizer = make_optimizer(config.optimizer, frozen=LocalContrast.frozen)
    begin = init_state(task, optimizer)
    update, state, losses = make_update(task, optimizer), replicate(begin), []
    for _ in range(8):
        state, metrics = update(state, *step_inputs(random_batch(8, 16), 1e-2))
        losses.append(float(to_host(metrics)["loss"]))
    end = to_host(state)
    assert losses[-1] < losses[0] - 0.1
    same = jax.tree.map(np.array_equal, begin.params, end.params)
    assert all(jax.tree.leaves(same["encoder"]))
    assert not any(jax.tree.leaves(same["project_2"]))
    assert not any(jax.tree.leaves({n: same["decoder"][n] for n in ("up_3", "up_1")}))
    statistics = jax.tree.map(np.array_equal, begin.batch_stats, end.batch_stats)
    assert all(jax.tree.leaves(statistics["encoder"]))
    assert not any(jax.tree.leaves(statistics["decoder"]))
