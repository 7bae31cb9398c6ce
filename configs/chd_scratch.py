"""Few-label segmentation of CHD without pretraining: what `chd_finetune.py` is compared with.

    python -m kafjax.main --config configs/chd_scratch.py \
        --config.data.fold=0 --config.data.num_labeled=2 --workdir runs/chd_scratch_fold0_M2

The appendix's tables 1 and 3; `--config.model.name=unet`, `unet_c2` or `kaf_unet` for table 1.
Device, wall time and score: not yet measured.
"""

import ml_collections

from configs import chd_finetune


def get_config() -> ml_collections.ConfigDict:
    """The fine-tuning run from fresh variables."""
    config = chd_finetune.get_config()
    del config.init_from
    return config
