"""An older name, `--config configs/phantom_small_scratch.py`: `phantom_small_finetune:scratch`."""

from functools import partial

from kafjax.configs import phantom_small_finetune

get_config = partial(phantom_small_finetune.get_config, "scratch")
