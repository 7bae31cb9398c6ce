"""Few-label segmentation of synthetic hearts without pretraining, to compare with.

    python -m kafjax.main --config configs/phantom_scratch.py --config.data.num_labeled=2

on the phantoms that `phantom_finetune.py` tells to prepare; wall time and score are there too.
"""

import ml_collections

from configs import phantom_finetune


def get_config() -> ml_collections.ConfigDict:
    """The fine-tuning run from fresh variables."""
    config = phantom_finetune.get_config()
    del config.init_from
    return config
