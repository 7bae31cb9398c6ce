"""Evaluates a segmentation run on the whole volumes of its fold.

    kafjax evaluate --workdir runs/chd_fold0_M2 [--split validation]

prints a table and writes `evaluation.json` and `evaluation.csv` in the workdir: the paper's Dice,
pooled over all pixels of all slices, and Dice, HD95 and ASSD of each volume (mm). `volumes.csv` has
the classes' volumes in mm^3. The JSON also has the seconds per volume and the machine that they
were measured on. Every pixel of every slice counts once. Slices larger than the patch, which the
paper crops, are predicted in tiles (`kafjax.inference.predictor`); for smaller ones, padding does
not count.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tqdm

from kafjax.data.dataset import (
    Slice,
    SliceDataset,
    check_facts,
    facts_of_run,
    labelled_volumes,
    open_dataset,
    volumes_for_test,
)
from kafjax.data.splits import equal_images_across
from kafjax.errors import UserError
from kafjax.inference.postprocessing import (
    LARGEST,
    Example,
    Rules,
    choose_rules,
    clear_up,
    read_rules,
    write_rules,
)
from kafjax.inference.predictor import Predictor, load_predictor
from kafjax.inference.results import Results, format_table, summarize, write_results
from kafjax.inference.volumes import count_mm3, write_volumes
from kafjax.regions import most_probable, regions_of, structures_of
from kafjax.segmentation_metrics import count_pixels, volume_metrics
from kafjax.training.preflight import split_run
from kafjax.workdir.environment import describe_environment
from kafjax.workdir.scores import SPLITS, describe_run
from kafjax.workdir.split import (
    RunSplit,
    describe_later,
    describe_split,
    open_split,
    read_split,
    write_split,
)
from kafjax.workdir.workdir import Workdir


class Evaluation(NamedTuple):
    """The results of `evaluate`.

    Attributes:
      counts: pixels, int64 [d, 3], over all volumes (`kafjax.segmentation_metrics.count_pixels`),
        of the background and `kafjax.regions.structures_of`.
      metrics: for each volume and foreground class or region, by name, its `ClassMetrics`.
      mm3: for each volume and foreground class, by name, what `count_mm3` gives.
      seconds: for each volume, of reading, prediction and comparison; the first includes
        compilation.
    """

    counts: np.ndarray
    metrics: dict[str, dict[str, Any]]
    mm3: dict[str, dict[str, Any]]
    seconds: dict[str, float]


def evaluate(
    predictor: Predictor,
    dataset: SliceDataset,
    volumes: tuple[str, ...],
    *,
    rules: Mapping[str, str | float] | None = None,
) -> Evaluation:
    """Predicts volumes and compares them with their labels.

    Args:
      predictor: of the run.
      dataset: contains the volumes.
      volumes: names of labelled volumes, in the order of prediction.
      rules: of post-processing.
    """
    classes = dataset.classes
    names, groups = structures_of(dataset.metadata)
    counts = np.zeros((1 + len(names), 3), np.int64)
    metrics: dict[str, dict[str, Any]] = {}
    mm3, seconds = {}, {}
    for name in tqdm.tqdm(volumes, unit="volume", disable=None):
        begin = time.perf_counter()
        prediction, label, spacing = _predict_labelled(predictor, dataset, name)
        if rules:
            voxel = float(np.prod(spacing))
            prediction = clear_up(prediction, rules, classes[1:], voxel)
        for i in range(label.shape[2]):
            found = count_pixels(prediction[:, :, i], label[:, :, i], len(classes), groups=groups)
            counts += np.asarray(found)
        of_volume = volume_metrics(
            prediction, label, num_classes=len(classes), spacing=spacing, groups=groups
        )
        metrics[name] = dict(zip(names, of_volume, strict=True))
        mm3[name] = count_mm3(prediction, label, names, spacing, groups=groups)
        seconds[name] = time.perf_counter() - begin
    return Evaluation(counts, metrics, mm3, seconds)


def _predict_labelled(
    predictor: Predictor, dataset: SliceDataset, name: str
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """A volume's predicted classes, uint8 [row, col, slice], labels, int16, and spacing in mm."""
    slices = dataset.with_context(predictor.context).read_volume(name)
    views = [(s.image, s.keypoints, s.mask) for s in slices]
    found = [most_probable(p, dataset.metadata) for p in predictor.probabilities(views)]
    spacing = [float(mm) for mm in slices[0].spacing]
    return np.stack(found, axis=-1), _label(slices), spacing


def rules_of_run(
    workdir: Workdir, predictor: Predictor, *, data_dir: str | os.PathLike[str] | None = None
) -> Rules:
    """The post-processing of a run, none unless its config says so, and none of regions.

    What is not recorded yet is chosen on the run's training volumes, and recorded.

    Args:
      workdir: of the run.
      predictor: of the checkpoint.
      data_dir: where the dataset is, if not where the run had it.

    Raises:
      ValueError: nothing is recorded, and the run's dataset is not there.
    """
    config = workdir.read_config(task="segment")
    if not config.get("postprocess") or config["data"].get("regions"):
        return {}
    rules = read_rules(workdir, predictor.step)
    if rules is not None:
        return rules
    try:
        dataset = open_dataset(data_dir or config["data"]["dir"], config["data"]["name"])
        names = open_split(workdir, dataset).names.train
    except UserError as error:
        raise UserError(
            f"{workdir}: post-processing has not been chosen for step {predictor.step}; run "
            f"kafjax evaluate where the run's dataset is ({error})"
        ) from None

    def labels() -> Iterator[tuple[np.ndarray, float]]:
        for name in names:
            slices = dataset.read_volume(name)
            yield _label(slices), float(np.prod(slices[0].spacing))

    def examples() -> Iterator[Example]:
        for name in tqdm.tqdm(names, desc="post-processing", unit="volume", disable=None):
            prediction, label, spacing = _predict_labelled(predictor, dataset, name)
            yield Example(prediction, label, float(np.prod(spacing)))

    rules = choose_rules(labels(), examples(), dataset.classes[1:])
    write_rules(workdir, predictor.step, rules)
    return rules


def evaluate_run(
    workdir: str | os.PathLike[str],
    *,
    split: str = "validation",
    step: int | str | None = None,
    data_dir: str | Path | None = None,
    batch_size: int | None = None,
    record_split: bool = False,
) -> Results:
    """Evaluates a run, prints a table and writes it in the workdir.

    Args:
      workdir: of a segmentation run.
      split: 'validation' or 'train', the volumes that the run has recorded, or 'test', the labelled
        volumes of the dataset's test set.
      step: the checkpoint, a number, 'best' by validation or 'last'; by default the run's config's
        choice. Scores of another step get separate files.
      data_dir: folder of the dataset, if it has moved since the run.
      batch_size: of prediction; changes the results only by rounding.
      record_split: for runs of kafjax 0.1, which recorded no split: record the one that the config
        gives for the current dataset.

    Returns:
      The content of `evaluation.json`.

    Raises:
      ValueError: workdir, dataset, split or checkpoint are missing or do not match.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    folder = Workdir(workdir)
    predictor = load_predictor(folder, step=step, batch_size=batch_size)
    config = predictor.config
    dataset = open_dataset(data_dir or config.data.dir, config.data.name)
    check_facts(dataset, facts_of_run(config))
    if record_split and read_split(folder) is None:
        write_split(folder, describe_split(split_run(config, dataset), dataset))
    recorded = open_split(folder, dataset)
    volumes = _volumes(recorded, dataset, split)
    if not volumes:
        expected = "labels in labelsTs" if split == "test" else "--split train"
        raise UserError(f"{workdir}: the run has no labelled {split} volume; expected {expected}")
    rules = rules_of_run(folder, predictor, data_dir=data_dir)
    found = evaluate(predictor, dataset, volumes, rules=rules)
    chosen, how = folder.select_step(step)
    selected, usual = folder.select_step()
    if is_selected := step is None or chosen == selected:
        how = usual
    results = {
        "step": predictor.step,
        "checkpoint": how,
        "split": split,
        "run": describe_run(folder, config),
        # Training and validation volumes that are the same scan, as in the paper's folds of ACDC.
        "equal_images": equal_images_across(
            recorded.names, dataset.metadata.get("equal_images", ())
        ),
        **summarize(
            found.counts,
            found.metrics,
            structures_of(dataset.metadata)[0],
            num_regions=len(regions_of(dataset.metadata)),
        ),
        **({"postprocessing": rules} if config.get("postprocess") else {}),
        "seconds": found.seconds,
        "environment": describe_environment(),
    }
    path = folder.scores_file(split, None if is_selected else predictor.step)
    write_results(results, path.with_suffix(""))
    of_volumes = path.name.replace("evaluation", "volumes")
    write_volumes(found.mm3, path.with_name(of_volumes).with_suffix(".csv"))
    print(f"{workdir}, fold {config.data.fold}, {split}: {len(volumes)} volumes")
    _print_results(results)
    if later := describe_later(recorded, dataset):
        print(f"\n{later}")
    return results


def _print_results(results: Results) -> None:
    print(f"checkpoint: {results['checkpoint']}, step {results['step']}\n")
    print(format_table(results))
    for name, rule in results.get("postprocessing", {}).items():
        kept = (
            "its largest component" if rule == LARGEST else f"components of {rule:.4g} mm^3 or more"
        )
        print(f"post-processing: of {name}, {kept} only")
    for trained, validated in results["equal_images"]:
        print(f"\nValidation volume {validated} has the same image as training volume {trained}.")


def _volumes(recorded: RunSplit, dataset: SliceDataset, split: str) -> tuple[str, ...]:
    """Names of the volumes of a run's split; of the test set, those with labels."""
    if split != "test":
        return getattr(recorded.names, split)
    apart = set(volumes_for_test(dataset)) - {*recorded.train, *recorded.validation}
    return tuple(name for name in labelled_volumes(dataset) if name in apart)


def _label(slices: Sequence[Slice]) -> np.ndarray:
    return np.stack([s.label for s in slices if s.label is not None], axis=-1).astype(np.int16)
