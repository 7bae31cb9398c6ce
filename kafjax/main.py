"""Trains as a config file says: `python -m kafjax.main --config configs/chd_pretrain.py`.

Any field is set from the command line: `--config.batch_size=16`. A workdir that holds a checkpoint
is resumed; Ctrl-C and SIGTERM write one first. Exit status: 0 complete, 2 for a mistake in the
command, config or data, 1 for a loss that is not finite, 128 + signal when stopped.
"""

from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from kafjax.commands import enable_compilation_cache, parse_flags, run_command
from kafjax.describe import describe
from kafjax.train import train

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Config file of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives. Default: runs/<config name>.")
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print the network and its parameters, and stop.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, if several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Dispatches to `describe` or `train`."""
    del argv
    config = _CONFIG.value
    if _DESCRIBE.value:
        print(describe(config))
        return
    if _COORDINATOR.value is not None:
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    enable_compilation_cache()
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    run_command(train, config, Path(_WORKDIR.value or f"runs/{name}"))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
