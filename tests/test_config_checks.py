"""The checks of a config's fields: every config passes, every mistake is reported by name."""

import importlib
from typing import Any

import ml_collections
import pytest

from kafjax.config_files import shipped_names
from kafjax.configs import chd_pretrain, own_finetune, phantom_finetune, phantom_pretrain
from kafjax.training.config_checks import check_fields

CONFIGS = shipped_names()


def changed(config: ml_collections.ConfigDict, **fields: Any) -> ml_collections.ConfigDict:
    flat = {name.replace("__", "."): value for name, value in fields.items()}
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(flat)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_passes(name: str) -> None:
    get_config = importlib.import_module(f"kafjax.configs.{name}").get_config
    for method in chd_pretrain.METHODS if name.endswith("pretrain") else ():
        check_fields(get_config(method))
    check_fields(get_config())


@pytest.mark.parametrize("variant", ["mean_teacher", "copy_paste", "scratch,copy_paste"])
def test_variants_with_unlabelled_volumes_pass(variant: str) -> None:
    config = own_finetune.get_config(variant)
    check_fields(config)
    assert ("init_from" in config) == ("scratch" not in variant)
    assert config.batch_size == 2 * own_finetune.get_config().batch_size


@pytest.mark.parametrize("variant", ["mean_teacher,copy_paste", "scratch,pretrained", "scratches"])
def test_other_variants_are_refused(variant: str) -> None:
    with pytest.raises(ValueError, match=r"is '(scratch|mean_teacher,)"):
        own_finetune.get_config(variant)


@pytest.mark.parametrize(
    ("variant", "fields", "line"),
    [
        (
            "copy_paste",
            {"data__unlabelled_share": 0.25},
            "config.semi.method is 'copy_paste', expected mean_teacher, or "
            "config.data.unlabelled_share=0.5 for copy_paste, which pairs slices",
        ),
        (
            "mean_teacher",
            {"data__unlabelled_share": 0.01},
            "config.data.unlabelled_share is 0.01, expected a share that leaves labelled and "
            "unlabelled slices in a batch",
        ),
        (
            "mean_teacher",
            {"optimizer__average_decay": 0.0},
            "config.optimizer.average_decay is 0.0, expected above 0 for a config with "
            "config.semi: the averaged weights are the teacher",
        ),
        (
            "mean_teacher",
            {"semi__box": 0.5},
            "config.semi.box is not a field of task 'segment', expected no such field",
        ),
        (
            "pretrained",
            {"data__unlabelled_share": 0.5},
            "config.data.unlabelled_share is not a field of task 'segment', expected no such field",
        ),
    ],
)
def test_a_mistake_of_semi_supervision_is_told(
    variant: str, fields: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError) as error:
        check_fields(changed(own_finetune.get_config(variant), **fields))
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"model__name": "swin_unet"},
            "config.model.name is 'swin_unet', expected one of unet, unet_c2, kaf_unet for local "
            "contrast, which trains blocks of the UNet's decoder",
        ),
        (
            {"model__num_decoder_blocks": 1, "data__patch_size": (64, 48)},
            "config.data.patch_size is (64, 48), expected more, or more decoder blocks: maps of at "
            "least 8 pixels",
        ),
        (
            {"loss__method": "pcl"},
            "config.loss.method is not a field of task 'local_contrast', expected no such field",
        ),
    ],
)
def test_a_mistake_of_local_contrast_is_told(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        check_fields(changed(phantom_pretrain.get_config("glcl"), **fields))
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"batch_size": 0}, "config.batch_size is 0, expected a whole number from 1 on"),
        ({"batch_size": True}, "config.batch_size is True, expected a whole number from 1 on"),
        ({"num_steps": 0}, "config.num_steps is 0, expected a whole number from 1 on, or none"),
        ({"seed": -1}, "config.seed is -1, expected a whole number from 0 to 4294967295"),
        (
            {"task": "train"},
            "config.task is 'train', expected one of pretrain, local_contrast, segment",
        ),
        ({"sync_batch_norm": 1}, "config.sync_batch_norm is 1, expected True or False"),
        (
            {"data__patch_size": (64, 60)},
            "config.data.patch_size is (64, 60), expected (rows, columns), both positive multiples "
            "of 16",
        ),
        ({"loss__temperature": 0.0}, "config.loss.temperature is 0.0, expected a number above 0"),
        (
            {"optimizer__learning_rate": float("nan")},
            "config.optimizer.learning_rate is nan, expected a number above 0",
        ),
        (
            {"optimizer__final_learning_rate": 1.0},
            "config.optimizer.final_learning_rate is 1.0, expected no more than "
            "config.optimizer.learning_rate",
        ),
        (
            {"batch_size": 6, "num_microbatches": 4},
            "config.batch_size is 6, expected a multiple of config.num_microbatches",
        ),
        (
            {"model__head": "segmentation"},
            "config.model.head is 'segmentation', expected one of pretraining",
        ),
        (
            {"augment__transform__rotation": (1.0, 0.0)},
            "config.augment.transform: AugmentConfig: rotation is (1.0, 0.0), expected (low, high) "
            "with low <= high",
        ),
        (
            {"augment__intensity__gamma_power": (0.0, 1.0)},
            "config.augment.intensity: IntensityConfig: gamma_power is (0.0, 1.0), expected above "
            "0",
        ),
        (
            {"model__norm": "layer"},
            "config.model.norm is 'layer', expected one of batch, instance, group",
        ),
        (
            {"optimizer__average_decay": 1.0},
            "config.optimizer.average_decay is 1.0, expected a number from 0 to 0.99999",
        ),
        (
            {"model__name": "unet", "loss__weights__matching": 0.0},
            "config.loss.weights.kaf is 1.0, expected 0 for a network without KAF layers, as in "
            "--config chd_pretrain:pcl",
        ),
        (
            {f"loss__weights__{name}": 0.0 for name in ("cnn", "kaf", "matching")},
            "config.loss.weights.cnn is 0.0, expected above 0, or the weight of another loss",
        ),
        (
            {"data__fold": 0},
            "config.data.fold is not a field of task 'pretrain', expected no such field",
        ),
        (
            {"optimizer__learning_rates": 0.1},
            "config.optimizer.learning_rates is not a field of task 'pretrain'; the nearest is "
            "config.optimizer.learning_rate",
        ),
    ],
)
def test_a_mistake_is_told_by_field_what_was_found_and_what_was_expected(
    fields: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError) as error:
        check_fields(changed(phantom_pretrain.get_config(), **fields))
    assert str(error.value) == line


def test_all_mistakes_are_told_at_once() -> None:
    config = changed(phantom_finetune.get_config(), seed="0", data__num_labeled=0, every__log=0.5)
    with config.unlocked():
        del config.data.fold
    with pytest.raises(ValueError) as error:
        check_fields(config)
    told = [line.split()[0] for line in str(error.value).splitlines()]
    assert sorted(told) == [
        "config.data.fold",
        "config.data.num_labeled",
        "config.every.log",
        "config.seed",
    ]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"loss__class_weights": (1.0, 2.0)},
            "config.loss.class_weights is (1.0, 2.0), expected as many numbers as "
            "config.model.num_classes",
        ),
        (
            {"loss__class_weights": (1.0, *[0.0] * 7)},
            f"config.loss.class_weights is {(1.0, *[0.0] * 7)}, expected a number from 0 on for "
            "each class, one of them not the background's above 0, or none",
        ),
        (
            {"loss__weights__cross_entropy": 0.0},
            "config.loss.weights.cross_entropy is 0.0, expected above 0, or the weight of another "
            "loss",
        ),
        (
            {"data__foreground_share": 1.5},
            "config.data.foreground_share is 1.5, expected a number from 0 to 1",
        ),
    ],
)
def test_mistakes_of_fine_tuning(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        check_fields(changed(phantom_finetune.get_config(), model__num_classes=8, **fields))
    assert str(error.value) == line


def test_fine_tuning_may_have_class_weights() -> None:
    check_fields(
        changed(phantom_finetune.get_config(), loss__class_weights=tuple(map(float, range(8))))
    )


def test_sgd_needs_its_momentum_and_adam_may_keep_one() -> None:
    config = phantom_pretrain.get_config()
    with config.unlocked():
        del config.optimizer.momentum
    check_fields(config)
    config.optimizer.name = "sgd"
    with pytest.raises(
        ValueError, match=r"config.optimizer.momentum is missing, expected a number"
    ):
        check_fields(config)
