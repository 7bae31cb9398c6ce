"""Pretraining of KAF-UNet on ACDC: the paper's run (appendix, table 3; docs/method.md 7).

    kafjax train --config acdc_pretrain

352 x 352 at 1.25 mm, f = 48, batches of 32 pairs, 51 epochs. Wall time and score: not yet measured.
"""

import ml_collections

from kafjax.configs import chd_pretrain


def get_config(method: str = "kaf") -> ml_collections.ConfigDict:
    """The CHD run with ACDC's sizes and thresholds."""
    config = chd_pretrain.get_config(method)
    config.data.update({"name": "acdc", "patch_size": (352, 352)})
    config.model.filters = 48
    if "position_threshold" in config.loss:
        config.loss.position_threshold = 0.35
    return config
