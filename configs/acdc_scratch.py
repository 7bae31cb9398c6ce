"""Few-label segmentation of ACDC without pretraining: what `acdc_finetune.py` is compared with.

    python -m kafjax.main --config configs/acdc_scratch.py \
        --config.data.fold=0 --config.data.num_labeled=2 --workdir runs/acdc_scratch_fold0_M2

The appendix's tables 1 and 3; `--config.model.name=unet`, `unet_c2` or `kaf_unet` for table 1.
Device, wall time and score: not yet measured.
"""

import ml_collections

from configs import acdc_finetune


def get_config() -> ml_collections.ConfigDict:
    """The fine-tuning run from fresh variables."""
    config = acdc_finetune.get_config()
    del config.init_from
    return config
