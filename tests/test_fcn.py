"""FCN-8s: its decoder against scipy, sizes that 32 does not divide, pinned parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import zoom

from kafjax.models.fcn import FCNDecoder
from kafjax.models.unet import Encoding


def upsample(x: np.ndarray, factor: int) -> np.ndarray:
    """Bilinear, pixel centres at half, the border's values continued."""
    return zoom(x, (1, factor, factor, 1), order=1, mode="nearest", grid_mode=True)


@pytest.mark.parametrize("size", [(64, 96), (48, 80)])
def test_scores_of_three_depths_are_upsampled_and_added(size: tuple[int, int]) -> None:
    h, w = size
    rng = np.random.default_rng(0)
    levels = tuple(rng.standard_normal((2, h >> i, w >> i, 3 << i)) for i in range(4))
    center = rng.standard_normal((2, -(-h // 32), -(-w // 32), 6))
    decoder = FCNDecoder(4)
    encoding: Any = Encoding(levels, center, ())  # type: ignore[arg-type]
    init = decoder.init(jax.random.key(0), encoding, train=False)
    shift = {name: {"conv": {"bias": jnp.arange(4.0)}} for name in init["params"]}
    params = {
        name: {"conv": {**leaf["conv"], **shift[name]["conv"]}}
        for name, leaf in init["params"].items()
    }
    found = jax.jit(lambda p: decoder.apply({"params": p}, encoding, train=False))(params)

    def score(name: str, x: np.ndarray) -> np.ndarray:
        return x @ np.asarray(params[name]["conv"]["kernel"][0, 0]) + np.arange(4)

    def pool(x: np.ndarray) -> np.ndarray:
        b, rows, columns, c = x.shape
        return x.reshape(b, rows // 2, 2, columns // 2, 2, c).max(axis=(2, 4))

    x = upsample(score("score_32", center), 2)[:, : h // 16, : w // 16]
    x = upsample(x + score("score_16", pool(levels[3])), 2)
    x = upsample(x + score("score_8", pool(levels[2])), 8)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)
