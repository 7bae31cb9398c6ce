"""Pretraining on your own scans: the paper's networks and losses, with sizes that suit most data.

    kafjax prepare --dataset nnunet --raw_dir RAW --name own
    kafjax train --config own_pretrain

256 x 256, batches of 16 pairs, 51 epochs of Adam at 1e-4. Set `data.patch_size` so that a patch
shows a whole slice: random crops do not reveal its position in the volume, and the global losses
then stay at their plateau (docs/results.md). `kafjax prepare --check` suggests a size; on a coarser
grid, `kafjax prepare --pixel_spacing`, whole slices are smaller.
"""

import ml_collections

from kafjax.configs import chd_pretrain


def get_config(method: str = "kaf") -> ml_collections.ConfigDict:
    """The paper's run for a dataset of any name."""
    config = chd_pretrain.get_config(method)
    config.batch_size = 16
    config.data.update({"name": "own", "patch_size": (256, 256)})
    # Adam leaves the plateau of equal embeddings sooner than the paper's SGD, but not at 1e-3, too
    # fast for a wide network (docs/results.md, "Pretraining on real hearts: the plateau").
    config.optimizer.update({"name": "adam", "learning_rate": 1e-4, "warmup": 0.05})
    # As patients turn, and no mirrors, as in fine-tuning: with the paper's ranges the global losses
    # were still at their plateau when with these they had left it.
    config.augment.transform.update({"mirror_probability": 0.0, "rotation": (-0.5, 0.5)})
    # Whether the volumes of the test set, nnU-Net's imagesTs, are pretrained on too.
    config.data.include_test = False
    return config
