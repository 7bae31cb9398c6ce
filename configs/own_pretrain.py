"""Pretraining on your own scans: the paper's networks and losses, with sizes that suit most data.

    kafjax prepare --dataset nnunet --raw_dir RAW --name own
    kafjax train --config own_pretrain

256 x 256, batches of 16 pairs, 51 epochs. Set `data.patch_size` so that a patch shows a whole
slice, or as much of it as memory allows; `kafjax prepare --check` suggests one.
"""

import ml_collections

from kafjax.configs import chd_pretrain


def get_config(method: str = "kaf") -> ml_collections.ConfigDict:
    """The paper's run for a dataset of any name."""
    config = chd_pretrain.get_config(method)
    config.batch_size = 16
    config.data.update({"name": "own", "patch_size": (256, 256)})
    # Whether the volumes of the test set, nnU-Net's imagesTs, are pretrained on too.
    config.data.include_test = False
    return config
