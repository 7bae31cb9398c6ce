"""What is timed: a network, its size, and the same inputs for every side."""

from dataclasses import dataclass

import numpy as np

NETWORKS = ("kaf_unet", "unet", "unet_c2")  # that the peer has


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step's problem. Sizes are those of the paper's CHD run by default.

    `remat` is `config.model.remat`.
    """

    network: str = "kaf_unet"  # one of NETWORKS
    size: int = 512  # pixels, both edges
    num_keypoints: int = 400
    batch_size: int = 1  # slices
    filters: int = 32
    num_attention_layers: int = 16
    num_classes: int = 8
    dtype: str = "float32"
    remat: bool = False
    num_microbatches: int = 1

    @property
    def layers(self) -> int:
        """Attention layers, none in a plain network."""
        return self.num_attention_layers if self.network == "kaf_unet" else 0

    def __str__(self) -> str:
        keypoints = f", K {self.num_keypoints}" if self.layers else ""
        return (
            f"{self.network} f {self.filters}, {self.size} px{keypoints}, batch {self.batch_size}, "
            f"{self.dtype}"
        )


def inputs(case: Case) -> dict[str, np.ndarray]:
    """A batch of noise: image [b, h, w, 1], keypoints [b, k, 2], all real, and label [b, h, w]."""
    rng = np.random.default_rng(0)
    b, size, k = case.batch_size, case.size, case.num_keypoints
    return {
        "image": rng.standard_normal((b, size, size, 1), np.float32),
        "keypoints": rng.integers(0, size, (b, k, 2), np.int32),
        "keypoint_mask": np.ones((b, k), bool),
        "label": rng.integers(0, case.num_classes, (b, size, size), np.int32),
    }
