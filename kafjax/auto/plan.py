"""The plan of `kafjax auto`: what it decides before it works."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_prep.check import Survey, fingerprint, suggest_patch
from data_prep.findings import equal_images
from data_prep.resampling import Size, is_spacing, size_at
from kafjax.auto import sizes
from kafjax.auto.plan_file import Plan
from kafjax.auto.probe import NAME, Grid, Probe
from kafjax.auto.request import Request
from kafjax.auto.sizes import Choice, MakeConfigs, Network, Work, choose
from kafjax.configs import own_finetune, own_pretrain
from kafjax.data.patches import count_places
from kafjax.data.splits import group_subjects
from kafjax.errors import UserError
from kafjax.training.preflight import batch_options, device_memory
from kafjax.training.timing import format_seconds

DEFAULT_MINUTES = 480.0  # a night
HELD_OUT_FROM = 4  # labelled subjects; one is held out for the score
_MOST_FOLDS = 5
_REPORT_SECONDS = 20.0
_LATER_CHECKPOINTS = 10
_UNLABELLED = "copy_paste"  # the way of configs/own_finetune.py that gained most


def make_plan(survey: Survey, request: Request, *, began: float) -> tuple[Plan, str]:
    """Plans what fits the scans, this device and the time, and says so in words.

    Args:
      survey: of the scans.
      request: what is asked for.
      began: `time.perf_counter()` when the command began.

    Raises:
      UserError: the time is too short, or an estimate is asked for with fewer than two subjects.
    """
    seconds = 60 * (DEFAULT_MINUTES if request.minutes is None else request.minutes)
    slices = _count_slices(survey, request)
    facts = fingerprint(survey)
    with tempfile.TemporaryDirectory(prefix="kafjax_plan_") as folder:
        probe = Probe(survey, Path(folder))
        grid_of = _grid_maker(survey, probe)
        pace = grid_of(sizes.NETWORKS[-1]).seconds_per_slice
        labelled = bool(slices.fine_tuning)
        work = Work(
            seconds=seconds,
            edge=max(int(facts["size"][axis]["max"]) for axis in ("rows", "columns")),
            places=facts["suggestion"]["max_keypoints"],
            fixed=pace * slices.whole + _REPORT_SECONDS,
            # The scans, and labelled ones to score and to choose post-processing.
            predicted=labelled * (slices.whole + 2 * slices.fine_tuning),
            keypoint_seconds=0.5 * pace,
            fine_tunings=labelled * (1 + slices.folds),
            unlabelled=labelled and _teaches(survey, slices),
        )
        make = _config_maker(survey, grid_of, slices)
        choice = choose(probe, make, lambda: seconds - (time.perf_counter() - began), work)
        grid = grid_of(choice.network)
    plan = _as_plan(request, survey, choice, grid, slices)
    return plan, describe_plan(plan, survey, choice, slices.held_out)


def describe_plan(plan: Plan, survey: Survey, choice: Choice, held_out: str | None) -> str:
    """The plan in words, as it is printed before the work."""
    facts = fingerprint(survey)
    steps, timings = choice.steps, choice.timings
    spacing = plan.preparation["pixel_spacing"]
    batches = [plan.pretraining["batch_size"], plan.fine_tuning.get("batch_size")]
    lines = [
        f"{facts['num_volumes']} scans, {facts['num_labelled']} with labels, "
        f"{facts['num_slices']} {' and '.join(facts['planes'])} slices"
        + _sizes(survey)
        + f"; {', '.join(survey.reader.classes[1:]) or 'no labels'}",
        f"patch {plan.shared['data.patch_size'][0]} x {plan.shared['data.patch_size'][1]}, "
        + ("" if spacing is None else f"on a grid of {spacing:g} mm, ")
        + f"K = {plan.preparation['max_keypoints']} keypoints, intensities: "
        f"{plan.preparation['intensity']}",
        f"UNet, {choice.network.filters} filters"
        if not choice.network.attention_layers
        else f"KAF-UNet, {choice.network.filters} filters, {choice.network.attention_layers} "
        "attention layers",
        f"pretraining on all: {steps[0]} steps of {batches[0]} pairs, {timings[0].step:.3g} s each",
    ]
    if timings[1] is not None:
        lines.append(
            f"fine-tuning: {steps[1]} steps of {batches[1]} slices, {timings[1].step:.3g} s each"
            + (f", and again for each of {plan.folds} folds" if plan.folds else "")
        )
        if choice.unlabelled:
            lines.append(
                "half of each batch from the scans without labels, by copy-paste with a teacher"
            )
        lines.append(_about_score(plan, facts["num_labelled"], held_out))
    lines.append(
        f"memory: about {choice.memory / 2**30:.2f} of {device_memory() / 2**30:.1f} GiB on "
        f"{jax.device_count()} x {jax.local_devices()[0].device_kind}"
    )
    stages = ", ".join(f"{n} {format_seconds(s)}" for n, s in plan.expected.items())
    lines.append(f"time: about {format_seconds(sum(plan.expected.values()))} ({stages})")
    return "\n".join(lines)


def _sizes(survey: Survey) -> str:
    sizes = sorted({volume.facts.size for volume in survey.volumes.values()})
    low, high = (f"{rows} x {columns}" for rows, columns in (sizes[0], sizes[-1]))
    return f" of {low}" if len(sizes) == 1 else f" of {len(sizes)} sizes, {low} to {high}"


def _about_score(plan: Plan, num_labelled: int, held_out: str | None) -> str:
    if held_out is not None:
        return f"score: of {held_out}, which is not trained on (its image is pretrained on)"
    if plan.folds:
        return f"score: each of {plan.folds} folds is left out once; the last run trains on all"
    if num_labelled < 2:
        return "score: none, as the only labelled volume is trained on"
    return "score: none, as all labels are trained on; --estimate leaves each out once, for a score"


class _Slices(NamedTuple):
    """Counts of slices, and how labelled subjects are used.

    Attributes:
      whole: of all scans.
      pretraining: without the test set.
      fine_tuning: of the labelled volumes that are trained on.
      unlabelled: of those without labels, without the test set.
      held_out: the subject that is kept for the score, if any.
      folds: of an estimate; 0: none.
    """

    whole: int
    pretraining: int
    fine_tuning: int
    unlabelled: int
    held_out: str | None
    folds: int


def _count_slices(survey: Survey, request: Request) -> _Slices:
    counts = {id: volume.facts.num_slices for id, volume in survey.volumes.items()}
    tests = {source.id for source in survey.reader.find(survey.raw_dir)[0] if source.test}
    labelled = [id for id, v in survey.volumes.items() if v.facts.labelled and id not in tests]
    groups = equal_images(volume.facts for volume in survey.volumes.values())
    subject = group_subjects(labelled, groups, survey.subjects)
    subjects = sorted(set(subject.values()))
    if request.estimate and len(subjects) < 2:
        raise UserError(
            f"--estimate holds out labelled subjects, found {len(subjects)}; expected at least 2"
        )
    held_out = None
    if len(subjects) >= HELD_OUT_FROM and not request.estimate:
        held_out = subjects[-1]
    pretraining = sum(counts[id] for id in counts if id not in tests)
    return _Slices(
        whole=sum(counts.values()),
        pretraining=pretraining,
        fine_tuning=sum(counts[id] for id in labelled if subject[id] != held_out),
        unlabelled=pretraining - sum(counts[id] for id in labelled),
        held_out=held_out,
        folds=min(len(subjects), _MOST_FOLDS) if request.estimate else 0,
    )


def _teaches(survey: Survey, slices: _Slices) -> bool:
    """Whether a teacher can label slices for copy-paste: as many as are labelled, no regions."""
    return slices.unlabelled >= slices.fine_tuning and not survey.reader.facts.get("regions")


def coarser_spacing(
    sizes: Sequence[Size], spacings: Sequence[tuple[float, float]], edge: int
) -> float | None:
    """The pixel size, mm, on which three quarters of the slices fit whole into patches of `edge`.

    Crops do not show a slice's position, from which pretraining learns (docs/results.md).

    Args:
      sizes: rows and columns of each volume.
      spacings: mm between rows and between columns.
      edge: pixels.

    Returns:
      None if slices fit as they are, or nearly, or if headers' spacings cannot all be true.
    """
    finest = np.min(spacings, axis=1)
    extents = (np.array(sizes) * np.array(spacings)).max(axis=1)
    hundredths = 100 * np.quantile(extents, 0.75, method="higher") / edge
    wanted = math.ceil(round(hundredths, 3)) / 100  # headers hold 1.7 mm as 1.70000005
    whole = max(suggest_patch(sizes)) <= edge
    if whole or wanted < 1.1 * np.median(finest) or finest.max() > 4 * finest.min():
        return None
    return wanted if is_spacing(wanted) else None


def _grid_maker(survey: Survey, probe: Probe) -> Callable[[Network], Grid]:
    """A function that prepares the grid of a network's patches."""
    sizes = [volume.facts.size for volume in survey.volumes.values()]
    spacings = [volume.spacing[:2] for volume in survey.volumes.values()]
    usual = float(np.median(spacings))

    def make(network: Network) -> Grid:
        spacing = coarser_spacing(sizes, spacings, network.edge)
        shrunk = 1.0 if spacing is None else usual / spacing
        return probe.grid(spacing, max(round(shrunk * survey.reader.radius), 1))

    return make


def _config_maker(
    survey: Survey, grid_of: Callable[[Network], Grid], slices: _Slices
) -> MakeConfigs:
    """A function that makes the configs of a network, with batches up to a limit."""
    # An estimate trains on as little as half of the labelled slices.
    most = (slices.pretraining, slices.fine_tuning // (2 if slices.folds else 1))

    def make(network: Network, unlabelled: bool, limit: int) -> tuple[Any, Any | None]:
        grid = grid_of(network)
        volumes = _volumes_on(survey, grid)
        patch = suggest_patch([volume["size"] for volume in volumes.values()])
        size = (min(patch[0], network.edge), min(patch[1], network.edge))
        metadata = {"max_keypoints": grid.max_keypoints, "volumes": volumes}
        shared = {
            "data.name": NAME,
            "data.dir": str(grid.data_dir),
            "data.patch_size": size,
            "data.patch_keypoints": count_places(metadata, size),
            **_model_fields(network),
        }
        # From scratch, which takes as long as from the encoder.
        variant = f"scratch,{_UNLABELLED}" if unlabelled else "scratch"
        pretraining, fine_tuning = own_pretrain.get_config(), own_finetune.get_config(variant)
        for config, there in zip((pretraining, fine_tuning), most, strict=True):
            config.update_from_flattened_dict(shared)
            parts = 2 if "semi" in config else 1  # with labels, and as many without
            largest = min(config.batch_size, limit) // parts
            config.batch_size = parts * _batch(min(largest, network.batch, there))
        pretraining.update_from_flattened_dict(_pretraining_fields(network))
        fine_tuning.data.fold = None
        return pretraining, fine_tuning if slices.fine_tuning else None

    return make


def _volumes_on(survey: Survey, grid: Grid) -> dict[str, dict[str, Any]]:
    """Size and number of slices of each volume on a grid."""
    found = {}
    for id, volume in survey.volumes.items():
        size = volume.facts.size
        if grid.pixel_spacing is not None:
            size = size_at(size, volume.spacing[:2], grid.pixel_spacing)
        found[id] = {"size": size, "num_slices": volume.facts.num_slices}
    return found


def _model_fields(network: Network) -> dict[str, Any]:
    """Fields of the network in both configs."""
    if not network.attention_layers:
        return {"model.name": "unet", "model.filters": network.filters}
    return {
        "model.filters": network.filters,
        "model.num_attention_layers": network.attention_layers,
    }


def _pretraining_fields(network: Network) -> dict[str, Any]:
    """Fields of the pretraining heads; a UNet has only the global one, of PCL."""
    fields: dict[str, Any] = {"model.embedding": network.embedding}
    if not network.attention_layers:
        return fields | {"loss.weights.kaf": 0.0, "loss.weights.matching": 0.0}
    return fields | {"model.num_matcher_layers": network.matcher_layers}


def _batch(wanted: int) -> int:
    """A multiple of the devices, as near to what is wanted as there is."""
    devices = jax.device_count()
    return max(wanted // devices, 1) * devices


def _as_plan(
    request: Request,
    survey: Survey,
    choice: Choice,
    grid: Grid,
    slices: _Slices,
) -> Plan:
    first, second = choice.configs
    pretraining, fine_tuning = choice.steps
    names = ("data.name", "data.patch_size", "data.patch_keypoints")
    shared = {name: first.data[name.removeprefix("data.")] for name in names}
    shared |= _model_fields(choice.network)
    seconds = [t.step * n for t, n in zip(choice.timings, choice.steps, strict=True) if t]
    expected = {
        "prepare": grid.seconds_per_slice * slices.whole,
        "pretrain": seconds[0] + choice.timings[0].compilation / 3,
    }
    fields: dict[str, Any] = {}
    if second is not None and choice.timings[1] is not None:
        labelled = batch_options(second).num_labelled
        fields = _schedule(labelled, fine_tuning, slices.fine_tuning)
        fields |= {
            "batch_size": second.batch_size,
            "data.fold": None,
            "every.validation_epochs": 0,
            # The score is of volumes that chose nothing.
            "checkpoint.select": "last",
        }
        if slices.held_out is not None:
            fields["data.validation"] = (slices.held_out,)
        each = seconds[1] + choice.timings[1].compilation / 3
        expected["finetune"] = each
        if slices.folds:
            expected["estimate"] = each * slices.folds
        expected["evaluate"] = choice.predicting / 3
        expected["predict"] = choice.predicting * 2 / 3
    expected["report"] = _REPORT_SECONDS
    return Plan(
        request=request.fields(),
        preparation={
            "max_keypoints": grid.max_keypoints,
            "radius": grid.radius,
            "pixel_spacing": grid.pixel_spacing,
            "intensity": survey.reader.facts["intensity"],
        },
        shared=shared,
        pretraining={
            **_pretraining_fields(choice.network),
            **_schedule(first.batch_size, pretraining, slices.pretraining),
        },
        fine_tuning=fields,
        unlabelled=_UNLABELLED if choice.unlabelled else None,
        folds=slices.folds,
        expected={name: round(value, 1) for name, value in expected.items()},
    )


def _schedule(batch_size: int, steps: int, num_slices: int) -> dict[str, Any]:
    """Fields that make a run as long, with a learning rate that ends with it."""
    epoch = max(num_slices // batch_size, 1)
    return {
        "batch_size": batch_size,
        "num_epochs": max(round(steps / epoch), 1),
        "num_steps": steps if steps < epoch else None,
        "every.log": max(min(20, steps // 10), 1),
        "every.checkpoint": max(steps // _LATER_CHECKPOINTS, 20),
        "every.picture": max(steps // 2, 1),
    }
