"""An older name, `--config configs/acdc_scratch.py`: `acdc_finetune:scratch`."""

from functools import partial

from kafjax.configs import acdc_finetune

get_config = partial(acdc_finetune.get_config, "scratch")
