"""Every network by name: `build_model(config.model)`.

Segmentation models are called `model.apply(variables, image, keypoints, keypoint_mask, train=...)`
with image [b, h, w, c], keypoints int [b, k, 2] in (row, col) pixels and mask bool [b, k], and
return logits [b, h, w, d]; models without keypoints ignore them. The pretraining networks take the
same with a view axis of 2 after b; they return a `PretrainingOutput`, or two feature maps for local
contrast. h and w must be divisible by 16.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kafjax.models.fcn import FCNDecoder, FCNEncoder
from kafjax.models.initialization import example_inputs, init_variables, variable_shapes
from kafjax.models.layers import NORMS
from kafjax.models.pretraining import (
    PRETRAINING_HEADS,
    LocalContrastNetwork,
    PretrainingNetwork,
    PretrainingOutput,
)
from kafjax.models.swin import SwinEncoder, SwinUNetDecoder
from kafjax.models.unet import Encoding, UNetDecoder, UNetEncoder
from kafjax.registry import Registry

__all__ = [
    "LOCAL_MODELS",
    "MODELS",
    "NORMS",
    "PRETRAINING_HEADS",
    "WITHOUT_ATTENTION",
    "Encoding",
    "LocalContrastNetwork",
    "PretrainingNetwork",
    "PretrainingOutput",
    "SegmentationNetwork",
    "build_model",
    "encoder_of",
    "example_inputs",
    "init_variables",
    "variable_shapes",
]

HEADS = ("segmentation", "pretraining", "local_contrast")
DTYPES = ("float32", "bfloat16", "float64")


class _Backbone(NamedTuple):
    encoder: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]


MODELS = Registry(
    {
        "unet": _Backbone(UNetEncoder, UNetDecoder),
        "unet_c2": _Backbone(partial(UNetEncoder, widening="copy"), UNetDecoder),
        "kaf_unet": _Backbone(partial(UNetEncoder, widening="kaf"), UNetDecoder),
        "fcn": _Backbone(FCNEncoder, FCNDecoder),
        "kaf_fcn": _Backbone(partial(FCNEncoder, widening="kaf"), FCNDecoder),
        "swin_unet": _Backbone(SwinEncoder, SwinUNetDecoder),
    }
)
# Networks that ignore `num_attention_layers`.
WITHOUT_ATTENTION = ("unet", "unet_c2", "fcn")
# Networks whose decoder has blocks that local contrast can train.
LOCAL_MODELS = tuple(name for name, model in MODELS.items() if model.decoder is UNetDecoder)


class SegmentationNetwork(nn.Module):
    """An encoder and a decoder."""

    encoder: nn.Module
    decoder: nn.Module

    def __call__(
        self,
        image: Float[Array, "b h w c"],
        keypoints: Int[Array, "b k 2"],
        keypoint_mask: Bool[Array, "b k"],
        *,
        train: bool,
    ) -> Float[Array, "b h w d"]:
        """Returns logits."""
        encoding = self.encoder(image, keypoints, keypoint_mask, train=train)
        return self.decoder(encoding, train=train)


def build_model(
    config: Any,
    *,
    head: str | None = None,
    axis_name: str | None = None,
    heads: tuple[str, ...] = PRETRAINING_HEADS,
) -> nn.Module:
    """Builds a network from `config.model`.

    Args:
      config: with the fields `name` (one of `MODELS`), `filters`,
        `num_attention_layers` (of each KAF layer; of the whole Swin Transformer), `dtype` (of the
        computation; parameters and statistics are at least float32), `remat` (recompute blocks in
        the backward pass instead of storing their activations), `norm` (of feature maps, one of
        `NORMS`; batch norm if absent); for segmentation `num_classes`, or `num_regions` if there
        are some; for pretraining `embedding`,
        `num_matcher_layers` and `num_sinkhorn_iterations`; for local contrast `embedding` and
        `num_decoder_blocks`.
      head: one of `HEADS`; by default `config.head`.
      axis_name: the mapped axis whose devices share batch statistics.
      heads: heads of the pretraining network, from 'cnn', 'kaf' and 'matching'.

    Raises:
      ValueError: an unknown name, head, dtype or norm; float64 while JAX disables it; local
        contrast for a network without the UNet's decoder.
    """
    _check_choice("name", config.name, MODELS)
    head = config.head if head is None else head
    _check_choice("head", head, HEADS)
    _check_choice("dtype", config.dtype, DTYPES)
    if jax.dtypes.canonicalize_dtype(config.dtype) != config.dtype:
        raise ValueError(
            "config.model.dtype is 'float64', expected JAX_ENABLE_X64=1 in the environment with it"
        )
    backbone = MODELS[config.name]
    common: dict[str, Any] = {"dtype": jnp.dtype(config.dtype)}
    if axis_name is not None:
        common["axis_name"] = axis_name
    norm = _norm(config)
    encoder = backbone.encoder(
        config.filters,
        num_attention_layers=config.num_attention_layers,
        remat=config.remat,
        norm=norm,
        **common,
    )
    if head == "pretraining":
        return PretrainingNetwork(
            encoder,
            config.embedding,
            config.num_matcher_layers,
            config.num_sinkhorn_iterations,
            heads=heads,
            **common,
        )
    if head == "local_contrast":
        _check_choice("name", config.name, LOCAL_MODELS)
        blocks = UNetDecoder(
            0, remat=config.remat, num_blocks=config.num_decoder_blocks, norm=norm, **common
        )
        return LocalContrastNetwork(encoder, blocks, config.embedding, common["dtype"])
    outputs = getattr(config, "num_regions", None) or config.num_classes
    decoder = backbone.decoder(outputs, remat=config.remat, norm=norm, **common)
    return SegmentationNetwork(encoder, decoder)


def encoder_of(config: Any, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The encoder of the network that `config.model` describes, and its part of the variables."""
    parts = {name: tree["encoder"] for name, tree in variables.items() if "encoder" in tree}
    return build_model(config).encoder, parts


def _norm(config: Any) -> str:
    norm: str = getattr(config, "norm", "batch")  # absent in runs of older versions
    _check_choice("norm", norm, NORMS)
    return norm


def _check_choice(field: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"config.model.{field} is {value!r}, expected one of {', '.join(choices)}")
