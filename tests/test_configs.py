"""Every config builds its network, task and optimiser."""

import importlib
import re

import pytest

from kafjax.config_files import shipped_names
from kafjax.tasks.registry import TASKS
from kafjax.training.describe import count_parameters
from kafjax.training.step import make_optimizer

NAMES = shipped_names()


def test_there_are_configs() -> None:
    assert {"chd_pretrain", "phantom_pretrain"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name: str) -> None:
    module = importlib.import_module(f"kafjax.configs.{name}")
    config = module.get_config()
    if name.startswith("own_") and config.task == "segment":
        assert config.model.num_classes is None  # the dataset has it
        config.model.num_classes = 4
    assert re.search(rf"--config (configs/)?{name}\b", module.__doc__)
    TASKS[config.task](config)
    make_optimizer(config.optimizer)
    assert sum(count_parameters(config).values()) > 1e5
    assert all(size % 16 == 0 for size in config.data.patch_size)
    assert config.to_json()


def test_chd_pretraining_is_the_papers_run() -> None:
    config = importlib.import_module("kafjax.configs.chd_pretrain").get_config()
    assert (config.batch_size, config.num_epochs) == (32, 51)
    assert config.data.patch_size == (512, 512)
    assert (config.model.filters, config.model.num_attention_layers) == (32, 16)
    assert config.loss.weights.to_dict() == {"cnn": 1.0, "kaf": 1.0, "matching": 0.01}
    assert config.optimizer.to_dict() == {
        "name": "sgd",
        "momentum": 0.9,
        "weight_decay": 1e-5,
        "learning_rate": 0.002,
        "final_learning_rate": 0.0,
        "warmup": 0.0,
        "average_decay": 0.0,
    }


def test_what_is_set_in_one_config_is_not_set_in_the_next() -> None:
    get_config = importlib.import_module("kafjax.configs.chd_pretrain").get_config
    for method in ("kaf", "pcl", "glcl"):
        config, before = get_config(method), get_config(method).to_dict()
        config.model.filters, config.loss.temperature = 1, 9.0
        if method == "glcl":
            config.init_from = "elsewhere"
        else:
            config.loss.weights.cnn = 7.0
        assert get_config(method).to_dict() == before
