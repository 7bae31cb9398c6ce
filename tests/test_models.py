"""The registry: every network builds, parameters are those of the paper, and how they start."""

import zlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from kafjax.models import (
    MODELS,
    build_model,
    example_inputs,
    init_variables,
    variable_shapes,
)
from tests.release_weights import load_golden
from tests.small_models import model_config

PAPER: dict[str, Any] = {"num_attention_layers": 16, "embedding": 512, "num_matcher_layers": 4}
CHD: dict[str, Any] = {"filters": 32, "num_classes": 8}
ACDC: dict[str, Any] = {"filters": 48, "num_classes": 4}
# docs/method.md section 5; FCN's, Swin-UNet's and pretraining's are our own, pinned.
SEGMENTATION_COUNTS = [
    ("unet", CHD, 7_763_584),
    ("unet", ACDC, 17_462_016),
    ("unet_c2", CHD, 27_911_328),
    ("unet_c2", ACDC, 62_790_768),
    ("kaf_unet", CHD, 71_467_264),
    ("kaf_unet", ACDC, 106_546_624),
    ("fcn", CHD, 4_722_808),
    ("kaf_fcn", CHD, 49_848_536),
    ("swin_unet", CHD, 41_550_906),
]
PRETRAINING_COUNTS = {
    "unet": 4_976_480,
    "unet_c2": 16_505_952,
    "kaf_unet": 63_330_977,
    "fcn": 4_978_528,
    "kaf_fcn": 53_370_273,
    "swin_unet": 35_125_082,
}


def shapes_of(config: Any, size: tuple[int, int], k: int = 6) -> tuple[Any, Any]:
    """Shapes of the output and the variables for a batch of two images, or pairs, of `size`."""
    views = (2,) if config.head == "pretraining" else ()
    model = build_model(config)
    return jax.eval_shape(
        lambda *x: model.init_with_output(jax.random.key(0), *x, train=False),
        jax.ShapeDtypeStruct((2, *views, *size, 1), jnp.float32),
        jax.ShapeDtypeStruct((2, *views, k, 2), jnp.int32),
        jax.ShapeDtypeStruct((2, *views, k), jnp.bool_),
    )


def count(variables: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(("name", "fields", "expected"), SEGMENTATION_COUNTS)
@pytest.mark.parametrize("size", [(64, 32), (48, 80)])
def test_segmentation_networks_have_the_papers_parameters(
    name: str, fields: dict[str, Any], expected: int, size: tuple[int, int]
) -> None:
    logits, variables = shapes_of(model_config(name, **PAPER, **fields), size)
    assert count(variables) == expected
    assert logits.shape == (2, *size, fields["num_classes"])


@pytest.mark.parametrize("name", PRETRAINING_COUNTS)
@pytest.mark.parametrize("size", [(64, 32), (48, 80)])
def test_pretraining_networks_have_pinned_parameters(name: str, size: tuple[int, int]) -> None:
    output, variables = shapes_of(model_config(name, "pretraining", **PAPER, filters=32), size)
    assert count(variables) == PRETRAINING_COUNTS[name]
    assert [x.shape for x in output.cnn] == [(2, 512)] * 2
    if name.startswith("kaf"):
        assert [x.shape for x in output.kaf] == [(2, 512)] * 2
        assert output.log_assignment.shape == (2, 7, 7)


def test_every_network_has_pinned_parameters() -> None:
    assert {name for name, *_ in SEGMENTATION_COUNTS} == MODELS.keys()
    assert PRETRAINING_COUNTS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_rematerialised_networks_have_the_same_variables(name: str) -> None:
    plain, remat = (shapes_of(model_config(name, remat=remat), (32, 32)) for remat in (False, True))
    assert jax.tree.map(lambda x: x.shape, plain) == jax.tree.map(lambda x: x.shape, remat)


@pytest.mark.parametrize(
    ("golden", "name"), [("unet", "unet"), ("kaf_unet", "kaf_unet"), ("pretrain", "kaf_unet")]
)
def test_the_difference_to_the_releases_count_is_its_dead_weights(golden: str, name: str) -> None:
    facts, _ = load_golden(golden)
    config = facts["config"]
    head = "pretraining" if golden == "pretrain" else "segmentation"
    fields = {"num_attention_layers": 2 * config["num_layers"], "num_matcher_layers": 4}
    fields |= {key: config[key] for key in ("filters", "num_classes", "embedding") if key in config}
    model = build_model(model_config(name, head, **fields))
    ours = count(variable_shapes(model, *example_inputs(head)))
    # A matching projection 256 -> 256 and a dustbin score in each KAF layer; and a head that is
    # built for pretraining and not used: 256 -> 256, batch norm, 256 -> E.
    dead = 0 if name == "unet" else 4 * 65_793
    if golden == "pretrain":
        dead += 65_792 + 512 + 257 * config["embedding"]
    assert ours + dead == facts["parameters"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "resnet", "'resnet'.*unet_c2.*kaf_fcn"),
        ("head", "detection", "'detection'.*segmentation, pretraining"),
        ("dtype", "float16", "'float16'.*float32, bfloat16"),
        ("norm", "layer", "'layer'.*batch, instance, group"),
        ("dtype", "float64", "JAX_ENABLE_X64"),
    ],
)
def test_a_choice_that_there_is_not_is_named_with_those_that_are(
    field: str, value: str, message: str
) -> None:
    config = model_config("unet")
    config[field] = value
    with pytest.raises(ValueError, match=rf"config\.model\.{field}.*{message}"):
        build_model(config)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    """Variables of a small pretraining network, by path."""
    model = build_model(model_config("kaf_unet", "pretraining", filters=8))
    variables = init_variables(model, 3, *example_inputs("pretraining"))
    return flax.traverse_util.flatten_dict(variables, sep="/")


def test_initial_variables_have_the_models_structure_and_types(drawn: dict[str, Any]) -> None:
    model = build_model(model_config("kaf_unet", "pretraining", filters=8))
    shapes = variable_shapes(model, *example_inputs("pretraining"))
    expected = flax.traverse_util.flatten_dict(shapes, sep="/")
    assert all(isinstance(leaf, np.ndarray) for leaf in drawn.values())
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in drawn.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }


def he(fan_in: int) -> Any:
    return stats.norm(scale=np.sqrt(2 / (1 + 0.01**2) / fan_in))


def within(bound: float) -> Any:
    return stats.uniform(-bound, 2 * bound)


ATTENTION = "params/encoder/level_1/kaf/attention/layers/layer"


@pytest.mark.parametrize(
    ("path", "distribution"),
    [
        ("params/encoder/level_2/block/conv_1/conv/kernel", he(9 * 32)),
        ("params/encoder/level_2/kaf/scatter/kernel", he(9 * 256)),
        ("params/encoder/level_2/kaf/fuse/conv/kernel", he(9 * 64)),
        ("params/encoder/center_1/conv/kernel", he(9 * 128)),
        ("params/encoder/level_2/kaf/project/dense/kernel", within(1 / np.sqrt(32))),
        ("params/encoder/level_2/kaf/project/dense/bias", within(1 / np.sqrt(32))),
        (f"{ATTENTION}/query/dense/kernel", within(1 / 16)),
        (f"{ATTENTION}/query/dense/bias", within(1 / 16)),
        (f"{ATTENTION}/mlp/linear_1/dense/kernel", within(1 / np.sqrt(512))),
        ("params/cnn_head/linear_1/dense/kernel", within(1 / 16)),
        ("params/matcher/project/dense/kernel", within(1 / 16)),
    ],
)
def test_initial_weights_have_the_releases_distributions(
    drawn: dict[str, Any], path: str, distribution: Any
) -> None:
    assert stats.kstest(drawn[path].ravel(), distribution.cdf).pvalue > 1e-3


def test_transposed_convolutions_start_with_their_outputs_as_fan_in() -> None:
    variables = init_variables(
        build_model(model_config("unet", filters=8)), 0, *example_inputs("segmentation")
    )
    kernel = variables["params"]["decoder"]["up_3"]["kernel"]
    assert kernel.shape == (2, 2, 128, 64)
    assert stats.kstest(kernel.ravel(), he(4 * 64).cdf).pvalue > 1e-3


def test_all_other_variables_start_at_zero_or_one(drawn: dict[str, Any]) -> None:
    constants = {"scale": 1, "var": 1, "mean": 0, "dustbin_score": 1}
    found = 0
    for path, leaf in drawn.items():
        *_, module, name = path.split("/")
        is_zero_bias = name == "bias" and module != "dense"
        if is_zero_bias or name in constants:
            np.testing.assert_array_equal(leaf, constants.get(name, 0), err_msg=path)
            found += 1
        else:
            assert leaf.std() > 0, path
    assert found > 100


def test_no_two_variables_start_alike(drawn: dict[str, Any]) -> None:
    beginnings = [leaf.ravel()[:8].tobytes() for leaf in drawn.values() if leaf.std() > 0]
    assert len(set(beginnings)) == len(beginnings)
    query = drawn[f"{ATTENTION}/query/dense/kernel"]
    assert not np.array_equal(query[0], query[1])


def test_a_seed_decides_the_initial_variables() -> None:
    model = build_model(model_config("unet"))
    inputs = example_inputs("segmentation")
    first, again, other = (init_variables(model, seed, *inputs) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kernels = [v["params"]["encoder"]["center_1"]["conv"]["kernel"] for v in (first, other)]
    assert not np.array_equal(*kernels)


def test_a_seed_gives_the_same_digits_everywhere() -> None:
    variables = init_variables(
        build_model(model_config("unet")), 0, *example_inputs("segmentation")
    )
    kernel = variables["params"]["encoder"]["center_1"]["conv"]["kernel"]
    assert zlib.crc32(kernel.tobytes()) == 812290971


def test_parts_that_networks_share_start_alike() -> None:
    segmentation, pretraining = (
        init_variables(build_model(model_config("kaf_unet", head)), 0, *example_inputs(head))
        for head in ("segmentation", "pretraining")
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        segmentation["params"]["encoder"],
        pretraining["params"]["encoder"],
    )


@pytest.mark.parametrize("norm", ["instance", "group"])
@pytest.mark.parametrize("name", MODELS)
def test_norms_of_a_sample_have_the_same_parameters_and_no_statistics(name: str, norm: str) -> None:
    plain, other = (
        shapes_of(model_config(name, **fields), (32, 32)) for fields in ({}, {"norm": norm})
    )
    shapes = [jax.tree.map(lambda x: x.shape, x[1]["params"]) for x in (plain, other)]
    assert shapes[0] == shapes[1]
    assert plain[0].shape == other[0].shape
    left = flax.traverse_util.flatten_dict(other[1].get("batch_stats", {}), sep="/")
    # Those of keypoint sets, which have hundreds of entries in any batch.
    assert all("/position/" in path or "/attention/" in path for path in left)
    assert bool(left) == name.startswith("kaf")


def test_logits_by_instance_norm_do_not_depend_on_the_rest_of_the_batch() -> None:
    model = build_model(model_config("unet", norm="instance"))
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 1)).astype(np.float32)
    points, mask = np.zeros((3, 1, 2), np.int32), np.zeros((3, 1), bool)
    variables = init_variables(model, 0, images, points, mask)
    assert variables["batch_stats"] == {}
    apply = jax.jit(model.apply, static_argnames="train")
    together = apply(variables, images, points, mask, train=True)
    alone = apply(variables, images[:1], points[:1], mask[:1], train=False)
    np.testing.assert_allclose(together[:1], alone, atol=1e-4)
    assert np.abs(np.asarray(alone)).max() > 0.01
