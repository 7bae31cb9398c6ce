"""An older name, `--config configs/phantom_scratch.py`: `phantom_finetune:scratch`."""

from functools import partial

from kafjax.configs import phantom_finetune

get_config = partial(phantom_finetune.get_config, "scratch")
