"""The pretraining networks: an encoder with global heads and the keypoint matcher; and, for local
contrast, a frozen encoder with the first blocks of a decoder.

The two views of a pair go through the same weights one after the other, so each view has its own
batch statistics, and running statistics are updated by the first view, then the second
(docs/method.md 5).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kafjax.assignment import log_optimal_transport
from kafjax.models.attention import KEYPOINT_FEATURES, AttentionLayer, PositionalEncoder
from kafjax.models.layers import BatchNorm, Conv, Linear

PRETRAINING_HEADS = ("cnn", "kaf", "matching")


class PretrainingOutput(NamedTuple):
    """Inputs of the losses. Fields of missing heads are None.

    Attributes:
      cnn: the CNN head's embeddings of the two views.
      kaf: the KAF head's embeddings of the two views.
      log_assignment: [b, k + 1, k + 1], of the first view's keypoints to the second's.
    """

    cnn: tuple[Float[Array, "b e"], Float[Array, "b e"]] | None
    kaf: tuple[Float[Array, "b e"], Float[Array, "b e"]] | None
    log_assignment: Float[Array, "b rows columns"] | None


class CNNHead(nn.Module):
    """Embedding of the deepest features' global mean."""

    embedding: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, center: Float[Array, "b h w c"]) -> Float[Array, "b {self.embedding}"]:
        """Embeds feature maps."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        x = jnp.mean(center, axis=(1, 2), dtype=wide).astype(self.dtype)
        x = nn.relu(Linear(x.shape[-1] // 2, dtype=self.dtype, name="linear_1")(x))
        return Linear(self.embedding, dtype=self.dtype, name="linear_2")(x)


class KAFHead(nn.Module):
    """Embedding of the mean over a slice's real keypoints, or of zeros without keypoints."""

    embedding: int
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, points: Float[Array, "b k 256"], mask: Bool[Array, "b k"], *, train: bool
    ) -> Float[Array, "b {self.embedding}"]:
        """Embeds keypoints' features."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        total = jnp.sum(points.astype(wide), axis=1, where=mask[..., None])
        mean = total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        x = Linear(KEYPOINT_FEATURES, dtype=self.dtype, name="linear_1")(mean.astype(self.dtype))
        norm = BatchNorm(self.axis_name, dtype=self.dtype, name="norm")
        x = nn.relu(norm(x, train=train))
        return Linear(self.embedding, dtype=self.dtype, name="linear_2")(x)


class Matcher(nn.Module):
    """Assignment of two slices' keypoints: alternating self and cross attention, then transport."""

    num_attention_layers: int = 4
    num_iterations: int = 100
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        points: tuple[Float[Array, "b k 256"], Float[Array, "b k 256"]],
        keypoints: tuple[Int[Array, "b k 2"], Int[Array, "b k 2"]],
        mask: tuple[Bool[Array, "b k"], Bool[Array, "b k"]],
        shape: tuple[int, int],
        *,
        train: bool,
    ) -> Float[Array, "b k+1 k+1"]:
        """Matches keypoints of two slices of `shape` (h, w); returns the log assignment."""
        common = {"axis_name": self.axis_name, "dtype": self.dtype}
        position = PositionalEncoder(**common, name="position")
        a, b = (points[i] + position(keypoints[i], mask[i], shape, train=train) for i in range(2))
        for i in range(self.num_attention_layers):
            layer = AttentionLayer(train, **common, name=f"layer_{i}")
            sides = (a, mask[0]), (b, mask[1])
            sources = sides[::-1] if i % 2 == 1 else sides
            a, b = (layer(*side, *source) for side, source in zip(sides, sources, strict=True))
        project = Linear(KEYPOINT_FEATURES, dtype=self.dtype, name="project")
        wide = jnp.promote_types(self.dtype, jnp.float32)
        a, b = project(a).astype(wide), project(b).astype(wide)
        scores = jnp.einsum("bmc,bnc->bmn", a, b) / KEYPOINT_FEATURES**0.5
        dustbin = self.param("dustbin_score", nn.initializers.ones, (), wide)
        return log_optimal_transport(scores, *mask, dustbin, num_iterations=self.num_iterations)


class PretrainingNetwork(nn.Module):
    """An encoder with the paper's pretraining heads.

    Attributes:
      encoder: returns an `Encoding`; without KAF layers only the CNN head exists.
      embedding: e.
      heads: any of 'cnn', 'kaf' and 'matching'; the others cost nothing.
    """

    encoder: nn.Module
    embedding: int = 512
    num_matcher_layers: int = 4
    num_sinkhorn_iterations: int = 100
    axis_name: str | None = None
    dtype: Any = jnp.float32
    heads: tuple[str, ...] = PRETRAINING_HEADS

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b 2 h w c"],
        keypoints: Int[Array, "b 2 k 2"],
        keypoint_mask: Bool[Array, "b 2 k"],
        *,
        train: bool,
    ) -> PretrainingOutput:
        """Embeds and matches pairs of slices.

        Args:
          image: the two slices of each pair.
          keypoints: (row, col) in pixels of the image.
          keypoint_mask: true for real keypoints.
          train: normalise by the batch's statistics and update the running ones.
        """
        common = {"axis_name": self.axis_name, "dtype": self.dtype}
        positions = (keypoints[:, 0], keypoints[:, 1])
        masks = (keypoint_mask[:, 0], keypoint_mask[:, 1])
        first, second = (
            self.encoder(image[:, i], positions[i], masks[i], train=train) for i in range(2)
        )
        cnn = kaf = assignment = None
        if "cnn" in self.heads:
            cnn_head = CNNHead(self.embedding, dtype=self.dtype, name="cnn_head")
            cnn = (cnn_head(first.center), cnn_head(second.center))
        if not first.points or not {"kaf", "matching"} & set(self.heads):
            return PretrainingOutput(cnn, None, None)

        fuse = Linear(KEYPOINT_FEATURES, dtype=self.dtype, name="fuse_levels")
        points_1 = fuse(jnp.concatenate(first.points, axis=-1))
        points_2 = fuse(jnp.concatenate(second.points, axis=-1))
        if "kaf" in self.heads:
            kaf_head = KAFHead(self.embedding, **common, name="kaf_head")
            kaf_1 = kaf_head(points_1, masks[0], train=train)
            kaf = (kaf_1, kaf_head(points_2, masks[1], train=train))
        if "matching" in self.heads:
            matcher = Matcher(
                self.num_matcher_layers, self.num_sinkhorn_iterations, **common, name="matcher"
            )
            shape = (image.shape[2], image.shape[3])
            assignment = matcher((points_1, points_2), positions, masks, shape, train=train)
        return PretrainingOutput(cnn, kaf, assignment)


class LocalContrastNetwork(nn.Module):
    """A frozen encoder, the first blocks of a decoder, and two 1x1 convolutions for the local loss.

    The second stage of Chaitanya et al. (NeurIPS 2020).

    Attributes:
      encoder: returns an `Encoding`, using its running statistics; no gradient reaches it.
      decoder: returns features [b, h', w', c].
      embedding: e.
    """

    encoder: nn.Module
    decoder: nn.Module
    embedding: int = 512
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "b 2 h w c"],
        keypoints: Int[Array, "b 2 k 2"],
        keypoint_mask: Bool[Array, "b 2 k"],
        *,
        train: bool,
    ) -> tuple[Float[Array, "b rows columns e"], Float[Array, "b rows columns e"]]:
        """Returns feature maps of the two views; see `PretrainingNetwork`."""
        wide = Conv(self.embedding, kernel_size=1, dtype=self.dtype, name="project_1")
        narrow = Conv(self.embedding, kernel_size=1, dtype=self.dtype, name="project_2")

        def features(i: int) -> jax.Array:
            inputs = image[:, i], keypoints[:, i], keypoint_mask[:, i]
            encoding = jax.lax.stop_gradient(self.encoder(*inputs, train=False))
            return narrow(nn.relu(wide(self.decoder(encoding, train=train))))

        return features(0), features(1)
