"""The type and range of every config field, and rules that combine fields.

All mistakes are reported at once, before anything is opened or compiled. Unused fields are errors.
Paths are dotted, as on the command line without `--config.`. A new field in `configs/` needs its
rule here.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kafjax.augment import KEYPOINT_MODES, AugmentConfig
from kafjax.errors import UserError
from kafjax.files import flatten
from kafjax.intensity import IntensityConfig
from kafjax.losses import CONTRASTIVE_METHODS, MIN_LOCAL_EDGE, SEGMENTATION_LOSSES
from kafjax.models import DTYPES, LOCAL_MODELS, MODELS, NORMS, PRETRAINING_HEADS
from kafjax.tasks.base import HEADS_OF_TASKS
from kafjax.tasks.registry import TASKS
from kafjax.tasks.semi_supervised import METHODS

OPTIMIZERS = ("sgd", "adam")
_MAX_KEYPOINTS = 2**15 - 1  # records count them in int16
_MAX_CLASSES = 256
_DIVISOR = 16  # networks halve the patch four times


class Rule(NamedTuple):
    """The requirement on a value, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _integer(low: int, high: int | None = None) -> Rule:
    words = f"a whole number from {low}" + (" on" if high is None else f" to {high}")
    top = math.inf if high is None else high
    return Rule(words, lambda value: type(value) is int and low <= value <= top)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _number(low: float, high: float = math.inf) -> Rule:
    words = f"a number from {low:g}" + (" on" if high == math.inf else f" to {high:g}")
    return Rule(words, lambda value: _is_number(value) and low <= value <= high)


def _choice(choices: Any) -> Rule:
    return Rule(
        f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices
    )


def _pair(words: str, holds: Callable[[Any], bool]) -> Rule:
    return Rule(
        words,
        lambda value: (
            isinstance(value, tuple | list) and len(value) == 2 and all(map(holds, value))
        ),
    )


def _or_none(rule: Rule) -> Rule:
    return Rule(f"{rule.expected}, or none", lambda value: value is None or rule.holds(value))


_FLAG = Rule("True or False", lambda value: type(value) is bool)
_TEXT = Rule("a text", lambda value: isinstance(value, str) and bool(value))
_POSITIVE = Rule("a number above 0", lambda value: _is_number(value) and value > 0)
_WEIGHTS = Rule(
    "a number from 0 on for each class, one of them not the background's above 0",
    lambda value: (
        isinstance(value, tuple | list)
        and all(_is_number(x) and x >= 0 for x in value)
        and any(value[1:])
    ),
)
_RANGE = _pair("two numbers, (low, high)", _is_number)
_PATCH = _pair(
    f"(rows, columns), both positive multiples of {_DIVISOR}",
    lambda value: type(value) is int and value > 0 and value % _DIVISOR == 0,
)

_NAMES = Rule(
    "names, as in ('case1', 'case2')",
    lambda value: isinstance(value, tuple | list) and all(isinstance(x, str) and x for x in value),
)

_NUMBERS = Rule(
    "numbers of labels",
    lambda value: (
        isinstance(value, tuple | list) and bool(value) and all(type(x) is int for x in value)
    ),
)
_REGIONS = Rule(
    "numbers of labels for each region",
    lambda value: isinstance(value, tuple | list) and all(map(_NUMBERS.holds, value)),
)

_COMMON = {
    "task": _choice(TASKS),
    "seed": _integer(0, 2**32 - 1),
    "batch_size": _integer(1),
    "num_microbatches": _integer(1),
    "num_epochs": _integer(1, 10**6),
    "num_steps": _or_none(_integer(1)),
    "sync_batch_norm": _FLAG,
    "data.name": _TEXT,
    "data.dir": _TEXT,
    "data.patch_size": _PATCH,
    "data.num_threads": _integer(1, 1024),
    "model.name": _choice(MODELS),
    "model.filters": _integer(1),
    "model.num_attention_layers": _integer(1),
    "model.norm": _choice(NORMS),
    "model.dtype": _choice(DTYPES),
    "model.remat": _FLAG,
    "optimizer.name": _choice(OPTIMIZERS),
    "optimizer.weight_decay": _number(0),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.final_learning_rate": _number(0),
    "optimizer.warmup": _number(0, 0.9),
    "optimizer.average_decay": _number(0, 0.99999),
    "every.log": _integer(1),
    "every.checkpoint": _integer(1),
    "every.picture": _integer(0),
    "checkpoint.keep_newest": _integer(1),
    "checkpoint.keep_best": _integer(1),
}
_OF_TASK = {
    "pretrain": {
        "model.embedding": _integer(1),
        "model.num_matcher_layers": _integer(1),
        "model.num_sinkhorn_iterations": _integer(1),
        "loss.method": _choice(CONTRASTIVE_METHODS),
        "loss.position_threshold": _number(0, 1),
        "loss.temperature": _POSITIVE,
        **{f"loss.weights.{name}": _number(0) for name in PRETRAINING_HEADS},
    },
    "local_contrast": {
        "model.embedding": _integer(1),
        "model.num_decoder_blocks": _integer(1, 3),
        "loss.temperature": _POSITIVE,
        "init_from": _or_none(_TEXT),
    },
    "segment": {
        "data.fold": _or_none(_integer(0)),
        "data.num_folds": _integer(2),
        "data.num_labeled": _or_none(_integer(1)),
        "data.foreground_share": _number(0, 1),
        "loss.class_weights": _or_none(_WEIGHTS),
        **{f"loss.weights.{name}": _number(0) for name in SEGMENTATION_LOSSES},
        "every.validation_epochs": _integer(0),
    },
}
_RANGES: dict[str, Any] = {"augment.transform": AugmentConfig, "augment.intensity": IntensityConfig}
_AUGMENT = {
    "augment.keypoints": _choice(KEYPOINT_MODES),
    **{
        f"{part}.{name}": _number(0, 1) if name.endswith("probability") else _RANGE
        for part, kind in _RANGES.items()
        for name in kind.__dataclass_fields__
    },
}
# Rules of semi-supervised runs' fields: all or none.
_SEMI = {
    "data.include_test": _FLAG,
    "data.unlabelled_share": _number(0, 1),
    "semi.method": _choice(METHODS),
    "semi.weight": _POSITIVE,
    "semi.start": _number(0, 0.9),
    "semi.ramp": _number(0, 1),
}
_BOX = {"semi.box": Rule("a number above 0, below 1", lambda x: _is_number(x) and 0 < x < 1)}
# Rules of optional fields, by task.
_OF_DATASET = {  # filled in from the dataset
    "data.max_keypoints": _or_none(_integer(1, _MAX_KEYPOINTS)),
    "data.patch_keypoints": _or_none(_integer(1, _MAX_KEYPOINTS)),
    "data.radius": _or_none(_integer(1)),
    "data.sparse_labels": _or_none(_FLAG),
    "data.regions": _REGIONS,
    "data.regions_class_order": _NUMBERS,
    "model.num_channels": _integer(1),
    "model.num_regions": _integer(1, _MAX_CLASSES),
}
_ANYWHERE = {
    **_OF_DATASET,
    "data.context": _integer(0, 16),
    "optimizer.momentum": _number(0, 1),
    "checkpoint.select": _choice(("best", "last")),
}
_OPTIONAL = {
    "pretrain": {**_ANYWHERE, "data.include_test": _FLAG},
    "local_contrast": {**_ANYWHERE, "data.include_test": _FLAG},
    "segment": {
        **_ANYWHERE,
        "model.num_classes": _or_none(_integer(2, _MAX_CLASSES)),
        "init_from": _or_none(_TEXT),
        "data.validation": _or_none(_NAMES),
        "data.splits_file": _or_none(_TEXT),
        "postprocess": _FLAG,
    },
}


def check_fields(config: Any) -> None:
    """Checks all fields of a run's config, a ConfigDict or nested dicts.

    Raises:
      ValueError: a line for each missing, unknown or invalid field: its name, what was found and
        what was expected.
    """
    fields = flatten(config.to_dict() if hasattr(config, "to_dict") else config)
    task: Any = fields.get("task")
    if not _COMMON["task"].holds(task):
        raise UserError(_line("task", fields, _COMMON["task"]))
    needed = {**_COMMON, **_OF_TASK[task]}
    if fields.get("optimizer.name") == "sgd":
        needed["optimizer.momentum"] = _OPTIONAL[task]["optimizer.momentum"]
    if task == "segment" and fields.get("augment", "") is None:
        needed["augment"] = Rule("none", lambda value: value is None)
    else:
        needed |= _AUGMENT
    if task == "segment" and any(path == "semi" or path.startswith("semi.") for path in fields):
        needed |= {**_SEMI, **({} if fields.get("semi.method") == "mean_teacher" else _BOX)}
    head = {"model.head": _choice((HEADS_OF_TASKS[task],))}
    known = {**_OPTIONAL[task], **head, **needed}
    faults = [_line(path, fields, rule) for path, rule in needed.items() if path not in fields]
    faults += [
        _line(path, fields, known[path]) if path in known else _unknown(path, task, known)
        for path, value in fields.items()
        if path not in known or not known[path].holds(value)
    ]
    # Rules that combine fields need valid values.
    faults = faults or _disagreements(fields)
    if faults:
        raise UserError("\n".join(faults))


def _line(path: str, fields: Mapping[str, Any], rule: Rule) -> str:
    found = f"is {fields[path]!r}" if path in fields else "is missing"
    return f"config.{path} {found}, expected {rule.expected}"


def _unknown(path: str, task: str, known: Mapping[str, Rule]) -> str:
    near = difflib.get_close_matches(path, known, n=1, cutoff=0.85)
    return f"config.{path} is not a field of task {task!r}" + (
        f"; the nearest is config.{near[0]}" if near else ", expected no such field"
    )


def _disagreements(fields: Mapping[str, Any]) -> list[str]:
    found = [
        f"config.{path} is {fields[path]!r}, expected {expected}"
        for path, (expected, holds) in _TOGETHER.items()
        if path in fields and not holds(fields)
    ]
    for part, kind in _RANGES.items():
        ranges = {p.split(".")[-1]: x for p, x in fields.items() if p.startswith(f"{part}.")}
        try:
            kind(**ranges)
        except ValueError as error:
            found.append(f"config.{part}: {error}")
    return found


def _weighs_keypoints(loss: str) -> Rule:
    return Rule(
        "0 for a network without KAF layers, as in --config chd_pretrain:pcl",
        lambda f: "kaf" in f["model.name"] or f[f"loss.weights.{loss}"] == 0,
    )


def _fits_regions(fields: Mapping[str, Any]) -> bool:
    """Whether the maps of local contrast are large enough for its regions."""
    if fields["task"] != "local_contrast":
        return True
    halvings = 4 - fields["model.num_decoder_blocks"]
    return min(fields["data.patch_size"]) // 2**halvings >= MIN_LOCAL_EDGE


_TOGETHER: dict[str, Rule] = {
    "batch_size": Rule(
        "a multiple of config.num_microbatches",
        lambda f: f["batch_size"] % f["num_microbatches"] == 0,
    ),
    "data.fold": Rule(
        "a number below config.data.num_folds",
        lambda f: (
            f["data.fold"] is None
            or bool(f.get("data.splits_file"))
            or f["data.fold"] < f["data.num_folds"]
        ),
    ),
    "data.validation": Rule(
        "none where config.data.splits_file is given",
        lambda f: not (f["data.validation"] and f.get("data.splits_file")),
    ),
    "data.unlabelled_share": Rule(
        "a share that leaves labelled and unlabelled slices in a batch",
        lambda f: 0 < round(f["data.unlabelled_share"] * f["batch_size"]) < f["batch_size"],
    ),
    "semi.method": Rule(
        "mean_teacher, or config.data.unlabelled_share=0.5 for copy_paste, which pairs slices",
        lambda f: f["semi.method"] != "copy_paste" or f["data.unlabelled_share"] == 0.5,
    ),
    "optimizer.average_decay": Rule(
        "above 0 for a config with config.semi: the averaged weights are the teacher",
        lambda f: "semi.method" not in f or f["optimizer.average_decay"] > 0,
    ),
    "optimizer.final_learning_rate": Rule(
        "no more than config.optimizer.learning_rate",
        lambda f: f["optimizer.final_learning_rate"] <= f["optimizer.learning_rate"],
    ),
    "model.num_attention_layers": Rule(
        "an even number for swin_unet: plain and shifted windows take turns",
        lambda f: f["model.name"] != "swin_unet" or f["model.num_attention_layers"] % 2 == 0,
    ),
    "model.name": Rule(
        f"one of {', '.join(LOCAL_MODELS)} for local contrast, which trains blocks of the UNet's "
        "decoder",
        lambda f: f["task"] != "local_contrast" or f["model.name"] in LOCAL_MODELS,
    ),
    "data.patch_keypoints": Rule(
        "no more than config.data.max_keypoints",
        lambda f: (f["data.patch_keypoints"] or 1) <= (f.get("data.max_keypoints") or math.inf),
    ),
    "data.patch_size": Rule(
        f"more, or more decoder blocks: maps of at least {MIN_LOCAL_EDGE} pixels", _fits_regions
    ),
    "loss.weights.kaf": _weighs_keypoints("kaf"),
    "loss.weights.matching": _weighs_keypoints("matching"),
    "loss.class_weights": Rule(
        "as many numbers as config.model.num_classes",
        lambda f: (
            None in (f["loss.class_weights"], f.get("model.num_classes"))
            or len(f["loss.class_weights"]) == f["model.num_classes"]
        ),
    ),
    "data.regions": Rule(
        "none for config.semi, whose teacher chooses one class for each pixel, and without "
        "config.loss.class_weights",
        lambda f: "semi.method" not in f and f.get("loss.class_weights") is None,
    ),
    "loss.weights.cross_entropy": Rule(
        "above 0, or the weight of another loss",
        lambda f: any(f[f"loss.weights.{name}"] > 0 for name in SEGMENTATION_LOSSES),
    ),
    "loss.weights.cnn": Rule(
        "above 0, or the weight of another loss",
        lambda f: any(f[f"loss.weights.{name}"] > 0 for name in PRETRAINING_HEADS),
    ),
}
