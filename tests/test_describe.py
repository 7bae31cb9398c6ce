"""The printed table of a network's parameters."""

import ml_collections
import pytest

from kafjax.configs import chd_finetune, chd_pretrain
from kafjax.training.describe import count_parameters, describe


def segmentation(filters: int, num_classes: int) -> ml_collections.ConfigDict:
    config = chd_finetune.get_config()
    config.model.update({"filters": filters, "num_classes": num_classes})
    return config


@pytest.mark.parametrize(
    ("config", "ours", "appendix"),
    [
        (segmentation(32, 8), "71,467,264", "71,730,436"),
        (segmentation(48, 4), "106,546,624", "106,809,796"),
    ],
)
def test_table_ends_in_our_count_and_the_appendixs(
    config: ml_collections.ConfigDict, ours: str, appendix: str
) -> None:
    text = describe(config)
    (total,) = (line.split() for line in text.splitlines() if line.startswith("total"))
    assert total == ["total", ours]
    assert "4 x 65,793 = 263,172" in text
    assert text.endswith(f"{ours} + 263,172 = {appendix}.")


def test_rows_add_up_to_the_total() -> None:
    counts = count_parameters(chd_pretrain.get_config())
    assert sum(counts.values()) == 63_330_977
    assert {"encoder/level_0/kaf", "encoder/center_1", "matcher/layer_3"} <= counts.keys()


def test_network_without_kaf_has_no_footnote() -> None:
    config = chd_finetune.get_config()
    config.model.name = "unet"
    text = describe(config)
    assert "7,763,584" in text
    assert "release" not in text
