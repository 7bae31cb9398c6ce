"""Writes docs/configuration.md, the reference of all config fields: `python -m docs.configuration`.

The rules of fields come from `kafjax.training.config_checks`, values from the config files,
explanations from their comments and, for fields without a comment, from `_MEANINGS` here.
"""

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_collections

from kafjax.configs import chd_pretrain, own_finetune
from kafjax.training.config_checks import check_fields, flatten

PAGE = Path(__file__).with_name("configuration.md")
DATASETS = ("chd", "acdc", "phantom", "own")
TASKS = ("pretrain", "finetune")
_COMMENTED = ("chd_pretrain", "chd_finetune")  # the configs that the others modify

_INTRODUCTION = """\
# Configuration

A run is defined by a config, a Python file, and by changes on the command line:

<!-- needs: CHD -->
```sh
kafjax train --config chd_pretrain --config.batch_size=16
```

`<dataset>_pretrain` and `<dataset>_finetune` are the paper's runs on CHD and ACDC, and small ones
on phantoms; `phantom_small` is even smaller, for `kafjax experiment --small`. `own_pretrain` and
`own_finetune` are for your own scans: pretraining with Adam, which suits short runs, and
fine-tuning with the pieces of a strong baseline, each a field that any other config can switch on.
They are the files of `configs/`, which is installed as `kafjax.configs`:
`--config configs/chd_pretrain.py` finds the shipped file where the current folder has none. A name
after a colon chooses the method of pretraining, as in `chd_pretrain:simclr` ([methods](#methods)),
or fine-tuning from fresh variables, without `init_from`, as in `chd_finetune:scratch`;
`configs/chd_scratch.py` is the older name of that. Every field is checked before a run starts: its
name, type and range, and that fields fit each other. A pair is given as
`--config.data.patch_size='(256, 256)'`.

A value in the tables is CHD's; other datasets' follow where they differ. A dash: the run has no
such field, and setting it is an error.

This page is written by `python -m docs.configuration`.

## Your own config

A file anywhere that imports a shipped config and states the differences; it can also import modules
of its own folder:

```python
from kafjax.configs import chd_finetune


def get_config(start="pretrained"):
    config = chd_finetune.get_config(start)
    config.data.name = "liver"
    config.data.patch_size = (320, 320)
    config.model.num_classes = 3
    return config
```

<!-- needs: your own data -->
```sh
kafjax train --config ~/study/liver.py:scratch
```
"""
_SECTIONS = {
    "": ("The run", ""),
    "data": ("Data", ""),
    "model": ("Network", "Numbers in parentheses are sections of [the method](method.md)."),
    "semi": (
        "Volumes without labels",
        "`own_finetune:mean_teacher` and `own_finetune:copy_paste`, or after `scratch,`; "
        "[how to use them](usage.md#scans-without-labels).",
    ),
    "augment": (
        "Augmentation",
        "Fine-tuning on CHD and phantoms only crops slices at random: all probabilities are 0. "
        "`augment` may also be None there, as in older runs.",
    ),
    "loss": ("Loss", "A loss whose weight is 0 costs nothing."),
    "optimizer": ("Optimiser", ""),
    "every": ("How often", "In steps, unless stated otherwise."),
    "checkpoint": ("Checkpoints", ""),
}
_MEANINGS = {
    "task": "The task; set by the config file.",
    "seed": "Seed of the initial values, the data order and augmentation.",
    "postprocess": "Keep only the largest component of a class, or none below a size, where it "
    "raises the class's Dice on the training volumes. Evaluation and prediction apply it.",
    "init_from": "Workdir of a pretraining run or an import that provides the encoder (glcl: "
    "of the `gcl` run).",
    "num_epochs": "Length of the run and of the learning rate schedule.",
    "batch_size": "Pairs (fine-tuning: slices) per step, over all devices of all hosts.",
    "data.name": "Name of the prepared dataset.",
    "data.dir": "Folder of prepared datasets, or its URL: the `--data_dir` of the preparation.",
    "data.patch_size": "Part of a slice that the network sees, pixels; smaller slices are padded.",
    "data.num_threads": "Threads that read and cut slices.",
    "data.fold": "Fold kept for validation, from 0; None trains on all labelled volumes.",
    "data.include_test": "Train on the test set, nnU-Net's `imagesTs`, too, without its labels.",
    "data.unlabelled_share": "Fraction of each batch without labels.",
    "semi.method": "How volumes without labels are used.",
    "semi.weight": "Largest weight of the loss by the teacher.",
    "semi.start": "Fraction of the run before that loss counts; only labelled slices until then.",
    "semi.ramp": "Fraction of the run over which its weight rises.",
    "semi.box": "Edge of the pasted box, as a fraction of the patch's.",
    "data.validation": "Names of volumes or subjects to validate on, instead of folds.",
    "data.splits_file": "nnU-Net's `splits_final.json`; `data.fold` selects its fold.",
    "data.num_folds": "Number of folds of the labelled subjects.",
    "data.max_keypoints": "K, the slots for a slice's keypoints. Default: the dataset's; "
    "another value is an error.",
    "data.patch_keypoints": "Slots for the keypoints inside a patch. None: 1.5 times its share of "
    "a slice's K, or K if patches hold whole slices.",
    "data.radius": "Pixels within which keypoints correspond. Default: the dataset's; "
    "another value is an error.",
    "model.name": "The network (5).",
    "model.num_classes": "With the background. Default: the dataset's; another value is an error.",
    "model.filters": "f, the channels of the first level.",
    "model.num_attention_layers": "Of each KAF layer; of the whole encoder of `swin_unet`.",
    "model.embedding": "Size of the contrasted embeddings.",
    "model.num_matcher_layers": "Attention layers of the matcher, alternating self and cross.",
    "model.num_sinkhorn_iterations": "Iterations of the optimal transport (6).",
    "model.num_decoder_blocks": "Blocks of the decoder that local contrast trains, coarsest first.",
    "model.norm": "Of feature maps: over the batch, or of each slice separately (instance, group). "
    "Keypoints' features are normalised over the batch.",
    "model.dtype": "Of the computation; parameters and sums are at least float32.",
    "augment.keypoints": "How keypoints are moved with the warped image (3).",
    "augment.transform.mirror_probability": "Of each axis.",
    "augment.transform.spatial_probability": "Of elastic displacement, rotation and scaling.",
    "augment.transform.elastic_sigma": "Smoothness of the displacement, pixels.",
    "augment.transform.elastic_alpha": "Strength of the displacement.",
    "augment.transform.rotation": "Angle, radians.",
    "augment.transform.magnify_probability": "Of magnifying; else the slice is shrunk.",
    "augment.transform.magnify_scale": "Scale of the sampling grid: below 1 magnifies.",
    "augment.transform.shrink_scale": "The same, above 1.",
    "augment.intensity.probability": "Of changing a slice's intensities at all; 0 in the paper.",
    "augment.intensity.noise_probability": "Of Gaussian noise, in slices that change.",
    "augment.intensity.noise_deviation": "Its standard deviation, in that of the volume.",
    "augment.intensity.blur_probability": "Of a Gaussian blur.",
    "augment.intensity.blur_sigma": "Its width, pixels.",
    "augment.intensity.brightness_probability": "Of a shift of all intensities.",
    "augment.intensity.brightness_shift": "Added value, in standard deviations of the volume.",
    "augment.intensity.contrast_probability": "Of another contrast.",
    "augment.intensity.contrast_scale": "Factor about the slice's mean.",
    "augment.intensity.resolution_probability": "Of fewer pixels, interpolated.",
    "augment.intensity.resolution_scale": "Remaining fraction of an edge's pixels.",
    "augment.intensity.gamma_probability": "Of a power of the intensities, or of their negative.",
    "augment.intensity.gamma_power": "The power, of intensities between the slice's extremes.",
    "loss.weights.cross_entropy": "Of the mean over pixels.",
    "loss.class_weights": "A number for each class with the background; equal weights by default.",
    "loss.weights.dice": "Of 1 - soft Dice over the whole batch, without the background.",
    "loss.method": "Rule for positive pairs of slices (6).",
    "loss.position_threshold": "t of `pcl`: slices closer than this are positives.",
    "loss.temperature": "T of the contrastive losses.",
    "loss.weights.cnn": "w1, of the CNN head's contrastive loss.",
    "loss.weights.kaf": "w2, of the KAF head's; 0 for networks without keypoints.",
    "loss.weights.matching": "w3, of the keypoint matching; 0 for networks without keypoints.",
    "optimizer.name": "Optimiser.",
    "optimizer.momentum": "Of SGD.",
    "optimizer.weight_decay": "L2, added to the gradient.",
    "optimizer.learning_rate": "At the start.",
    "optimizer.final_learning_rate": "At the end of the cosine.",
    "every.log": "A line of metrics.",
    "every.checkpoint": "A checkpoint, in addition to those of validation, signals and the end.",
    "every.picture": "Pictures in TensorBoard.",
    "checkpoint.select": "Checkpoint for evaluation and prediction: the best by "
    "validation, or the last.",
    "checkpoint.keep_newest": "Number kept.",
    "checkpoint.keep_best": "Number kept, by loss or (fine-tuning) validation Dice.",
}


class _Wrong:
    """A value that is invalid for every field."""

    def __repr__(self) -> str:
        return "wrong"


def page() -> str:
    """The page's text.

    Raises:
      ValueError: `_MEANINGS` explains an unknown field, or a field has no explanation.
    """
    runs = {
        (task, dataset): _fields(
            importlib.import_module(f"kafjax.configs.{dataset}_{task}").get_config()
        )
        for task in TASKS
        for dataset in DATASETS
    }
    methods = {name: _fields(chd_pretrain.get_config(name)) for name in chd_pretrain.METHODS}
    methods |= {name: _fields(own_finetune.get_config(name)) for name in own_finetune.SEMI}
    rules = _rules([*runs.values(), *methods.values()])
    comments = _comments()
    if stale := _MEANINGS.keys() - rules.keys():
        raise ValueError(f"no such config fields: {', '.join(sorted(stale))}")
    if bare := rules.keys() - _MEANINGS.keys() - comments.keys():
        raise ValueError(f"config fields without an explanation: {', '.join(sorted(bare))}")
    parts = [_INTRODUCTION]
    for section, (title, lead) in _SECTIONS.items():
        parts += [f"## {title}\n", *([f"{lead}\n"] if lead else [])]
        parts.append("| field | | must be | pretraining | fine-tuning |\n|---|---|---|---|---|")
        for path, rule in rules.items():
            if path.rpartition(".")[0].split(".")[0] == section:
                text = _MEANINGS.get(path) or _sentence(comments[path])
                values = " | ".join(_values(path, task, runs, methods) for task in TASKS)
                parts.append(f"| `{path}` | {text} | {rule} | {values} |")
        parts.append("")
    pretraining = {name: methods[name] for name in chd_pretrain.METHODS}
    return "\n".join([*parts, *_methods(pretraining)])


def _fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All fields by dotted path; without `augment`'s if it is None."""
    fields = flatten(config.to_dict())
    return {path: value for path, value in fields.items() if path != "augment"}


def _rules(runs: Iterable[dict[str, Any]]) -> dict[str, str]:
    """The rule of each field, in the words of the check itself."""
    rules: dict[str, str] = {}
    for fields in runs:
        wrong: dict[str, Any] = {}
        for path in fields:
            *parents, name = path.split(".")
            place = wrong
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = fields[path] if path == "task" else _Wrong()
        for config in (wrong, {"task": _Wrong()}):
            found = re.findall(r"config\.(\S+) is wrong, expected (.*)", _complaints(config))
            for path, words in found:
                # A head's rule depends on the task.
                known = rules.setdefault(path, words)
                if words not in known:
                    rules[path] = f"{known}; {words}"
    return {path: rules[path] for path in dict.fromkeys(p for f in runs for p in f)}


def _complaints(config: dict[str, Any]) -> str:
    try:
        check_fields(config)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{config} passed")


def _values(
    path: str,
    task: str,
    runs: dict[tuple[str, str], dict[str, Any]],
    methods: dict[str, dict[str, Any]],
) -> str:
    """CHD's value, and others' if they differ; a dash for a missing field."""
    fields = runs[task, DATASETS[0]]
    cells = [_value(fields, path)]
    for dataset in DATASETS[1:]:
        cell = _value(runs[task, dataset], path)
        if cell != cells[0]:
            cells.append(f"{dataset} {cell}")
    if path not in fields and (task == "pretrain" or cells == ["-"]):
        cells += [
            f"{name} {_value(of, path)}"
            for name, of in methods.items()
            if path in of and (name in chd_pretrain.METHODS) == (task == "pretrain")
        ]
    # A dash is written only if there is nothing else.
    return ", ".join(cells[1:] if cells[0] == "-" and len(cells) > 1 else cells)


def _value(fields: dict[str, Any], path: str) -> str:
    if path not in fields:
        return "-"
    value = fields[path]
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"({', '.join(f'{x:g}' for x in value)})"
    return f"`{value}`" if isinstance(value, str) else str(value)


def _methods(methods: dict[str, dict[str, Any]]) -> list[str]:
    base = methods["kaf"]
    lines = [
        "## Methods",
        "",
        "Given after a colon, for any `*_pretrain`; the default is `kaf`, the paper's. The",
        "last column lists a config's differences from it; [the method](method.md#6-losses)",
        "explains them.",
        "",
        "| method | fields |",
        "|---|---|",
    ]
    for name, fields in methods.items():
        changed = [f"`{p}` {_value(fields, p)}" for p in fields if fields[p] != base.get(p, fields)]
        gone = [f"no `{path}`" for path in base if path not in fields]
        lines.append(f"| `{name}` | {', '.join(changed + gone) or 'as above'} |")
    return [*lines, ""]


def _comments() -> dict[str, str]:
    """The config files' comments by field: on its line, or on the lines above it."""
    found: dict[str, str] = {}
    for name in _COMMENTED:
        source = Path(f"{importlib.import_module(f'kafjax.configs.{name}').__file__}").read_text()
        beside, above = _comment_lines(source)
        for path, line in _places(ast.parse(source)):
            text = beside.get(line) or _block_above(above, line)
            if text:
                found.setdefault(path, text)
    return found


def _comment_lines(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments after code, and comments on their own lines, by line number."""
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            (alone if token.line.strip() == token.string else beside)[token.start[0]] = text
    return beside, alone


def _block_above(alone: dict[int, str], line: int) -> str:
    lines: list[str] = []
    while (line := line - 1) in alone:
        lines.insert(0, alone[line])
    return " ".join(lines)


def _places(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Fields of `ConfigDict({...})` and of `config.a.b = ...`, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ConfigDict"):
            yield from _keys(node.args[0], "")
        elif isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            if target.startswith("config."):
                yield target.removeprefix("config."), node.lineno


def _keys(node: ast.expr, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                path = prefix + str(key.value)
                yield path, key.lineno
                yield from _keys(value, f"{path}.")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].rstrip(".") + "."


if __name__ == "__main__":
    PAGE.write_text(page())
