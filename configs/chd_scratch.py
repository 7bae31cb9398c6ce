"""An older name, `--config configs/chd_scratch.py`: `chd_finetune:scratch`."""

from functools import partial

from kafjax.configs import chd_finetune

get_config = partial(chd_finetune.get_config, "scratch")
