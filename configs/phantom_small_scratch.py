"""Few-label segmentation of small synthetic hearts without pretraining, to compare with.

    python -m kafjax.main --config configs/phantom_small_scratch.py --config.data.num_labeled=2

on the phantoms that `phantom_small_pretrain.py` tells to prepare.
"""

import ml_collections

from configs import phantom_small_finetune


def get_config() -> ml_collections.ConfigDict:
    """The fine-tuning run from fresh variables."""
    config = phantom_small_finetune.get_config()
    del config.init_from
    return config
