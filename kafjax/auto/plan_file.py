"""The plan of `kafjax auto` as a file: a config that can be edited, and read again."""

import pprint
import runpy
from pathlib import Path
from typing import Any, NamedTuple

from kafjax.auto.request import Request
from kafjax.config_files import load_config
from kafjax.errors import UserError
from kafjax.files import differences, write_text

_TEMPLATE = '''\
"""The plan of kafjax auto. Edit it before a stage has begun, and run the same command again.

It is a config too: kafjax train --config {name}:pretrain, or {name}:finetune.
{text}
"""

from pathlib import Path

from kafjax.configs import own_finetune, own_pretrain

OUTPUT = Path(__file__).resolve().parent
# What was asked for; another request is refused.
REQUEST = {request}
PREPARATION = {preparation}
# Fields of both configs, of pretraining and of fine-tuning.
SHARED = {shared}
PRETRAINING = {pretraining}
FINE_TUNING = {fine_tuning}
# How the scans without labels are trained on in fine-tuning: copy_paste, mean_teacher, or None.
UNLABELLED = {unlabelled}
# Folds of the labelled subjects that --estimate trains; 0: none.
FOLDS = {folds}
# Expected seconds of each stage.
EXPECTED = {expected}


def get_config(stage="pretrain"):
    """The config of a stage: pretrain or finetune."""
    if stage == "pretrain":
        config = own_pretrain.get_config()
        config.update_from_flattened_dict(dict(SHARED, **PRETRAINING))
    else:
        config = own_finetune.get_config(UNLABELLED or "pretrained")
        config.update_from_flattened_dict(dict(SHARED, **FINE_TUNING))
        config.init_from = str(OUTPUT / "pretrain")
    config.data.dir = str(OUTPUT / "data")
    return config
'''


class Plan(NamedTuple):
    """What a plan's file holds; its configs come from `config_of`."""

    request: dict[str, Any]
    preparation: dict[str, Any]
    shared: dict[str, Any]
    pretraining: dict[str, Any]
    fine_tuning: dict[str, Any]
    unlabelled: str | None
    folds: int
    expected: dict[str, float]

    @property
    def has_labels(self) -> bool:
        """Whether there is anything to fine-tune on."""
        return bool(self.fine_tuning)


def read_plan(path: Path, request: Request) -> Plan | None:
    """The plan of an output folder, None if there is none yet.

    Raises `UserError` where the file is damaged, or is the plan of another request: each
    difference.
    """
    if not path.exists():
        return None
    load_config(f"{path}:pretrain")  # which names what is wrong in one line
    values = runpy.run_path(str(path))
    try:
        plan = Plan(**{name: values[name.upper()] for name in Plan._fields})
    except KeyError as error:
        raise UserError(f"{path}: has no {error.args[0]}; remove it to plan anew") from None
    if differing := differences(plan.request, request.fields()):
        raise UserError(
            f"{path.parent} was planned for another request; give another --output, or remove "
            f"{path.name} there:\n" + "\n".join(differing)
        )
    return plan


def config_of(path: Path, stage: str) -> Any:
    """The config of a stage, `pretrain` or `finetune`, of a plan's file."""
    return load_config(f"{path}:{stage}")


def write_plan(path: Path, plan: Plan, text: str) -> None:
    """Writes the plan's file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        name: pprint.pformat(value, width=88, sort_dicts=False)
        for name, value in plan._asdict().items()
    }
    safe = text.replace("\\", "/").replace('"""', "'''")
    write_text(path, _TEMPLATE.format(name=path.name, text=f"\n{safe}", **values))
