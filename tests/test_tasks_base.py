"""What tasks share: keys by seed and sample, and microbatches against the whole batch."""

import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kafjax.losses import positive_pairs, supervised_contrastive_loss
from kafjax.models.layers import ConvBlock
from kafjax.tasks.base import apply_training, sample_keys

MODEL = ConvBlock(4)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_keys_are_those_of_each_seed_and_sample() -> None:
    batch = {"seed": np.array([0, 0, 7], np.uint32), "sample": np.array([1, 2, 1], np.uint32)}
    keys = jax.random.key_data(sample_keys({k: jnp.asarray(v) for k, v in batch.items()}))
    for found, seed, sample in zip(keys, batch["seed"], batch["sample"], strict=True):
        expected = jax.random.fold_in(jax.random.key(int(seed)), int(sample))
        np.testing.assert_array_equal(found, jax.random.key_data(expected))


def loss(params: Any, batch_stats: Any, images: jax.Array, num_microbatches: int) -> Any:
    """A contrastive loss, for which every sample matters to every other."""
    output, statistics = apply_training(
        MODEL, params, batch_stats, (images,), num_microbatches=num_microbatches
    )
    views = jnp.mean(output, axis=(1, 2)), jnp.max(output, axis=(1, 2))
    number = jnp.arange(images.shape[0]) % 3 + 1
    position = jnp.stack([number, jnp.full_like(number, 3)], axis=1)
    positives = positive_pairs("pcl", position, position_threshold=0.1)
    return supervised_contrastive_loss(views, positives, temperature=0.5), statistics


gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="num_microbatches")


def variables_and_images(size: int = 3) -> tuple[Any, np.ndarray]:
    images = draw(size, 8, 8, 2)
    return MODEL.init(jax.random.key(0), images, train=True), images


def test_microbatches_alike_are_the_whole_batch() -> None:
    variables, images = variables_and_images()
    # Each microbatch has the batch's own statistics, which is where they may differ from it.
    images = np.concatenate([images, images[::-1]])
    (whole, stats), grads = gradient(*variables.values(), images, num_microbatches=1)
    (parts, part_stats), part_grads = gradient(*variables.values(), images, num_microbatches=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), part_grads, grads)
    # The unbiased variance of half as many pixels is greater, by about 1/384 of a step of 0.1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), part_stats, stats)


def test_running_statistics_are_the_mean_over_microbatches() -> None:
    variables, images = variables_and_images(4)
    _, found = apply_training(MODEL, *variables.values(), (images,), num_microbatches=2)
    halves = [
        apply_training(MODEL, *variables.values(), (half,))[1] for half in (images[:2], images[2:])
    ]
    expected = jax.tree.map(lambda *x: np.mean(x, axis=0), *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_microbatches_save_memory() -> None:
    variables, images = variables_and_images(16)

    def temporaries(n: int) -> int:
        lowered = gradient.lower(*variables.values(), images, num_microbatches=n)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) / 2.5


def test_microbatches_that_do_not_divide_the_batch_are_refused() -> None:
    variables, images = variables_and_images(4)
    with pytest.raises(ValueError, match="num_microbatches is 3, expected a divisor of the 4"):
        apply_training(MODEL, *variables.values(), (images,), num_microbatches=3)


def test_tasks_and_the_step_import_no_reader_and_training_no_plots() -> None:
    """Users' own loops need no more than JAX, Flax and Optax, and a run starts soon."""
    script = """
        import sys
        from kafjax.tasks import TASKS
        import kafjax.training.step
        print({name.partition(".")[0] for name in sys.modules})
        import kafjax.training.loop
        print({name.partition(".")[0] for name in sys.modules})
    """
    loaded, of_loop = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "'orbax'" in of_loop
    assert not any(f"'{name}'" in of_loop for name in ("matplotlib", "scipy"))
    assert "'flax'" in loaded
    for name in ("grain", "orbax", "tensorflow_datasets", "matplotlib", "tensorboardX", "cv2"):
        assert f"'{name}'" not in loaded
