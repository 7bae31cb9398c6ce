"""Surveys a raw dataset and reports its faults without preparing anything.

Sizes, spacings, intensities and classes cover whole volumes; keypoints are detected in a few evenly
spaced slices of each. Sizes are in pixels and spacings in mm, both of the prepared grid, in (row,
column, slice) order; intensities are those of the files.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.faults import Fault, finding, sort_faults
from data_prep.findings import equal_images, findings_of, planes
from data_prep.folder import LOWEST_OF_CT
from data_prep.prepare import read_through
from data_prep.sift import find_keypoints
from data_prep.subjects import subjects_of, with_subjects
from data_prep.volumes import Facts, Reader, Source, facts_of
from data_prep.workers import map_in_processes

SAMPLED_SLICES = 8  # of each volume, for keypoints
PERCENTILES = (0, 1, 50, 99, 100)
# The memory of attention and matching grows with the square of K.
_MAX_SUGGESTED_KEYPOINTS = 1024
_MAX_SUGGESTED_EDGE = 512  # the paper's; larger slices are cropped in training
_AXES = ("rows", "columns", "slices")


@dataclass(frozen=True)
class VolumeSurvey:
    """The statistics of one sound volume."""

    facts: Facts
    spacing: tuple[float, float, float]  # mm
    dtype: str  # of the file's values
    intensities: tuple[tuple[float, ...], ...]  # of each channel, at PERCENTILES
    voxels: tuple[int, ...]  # by class; none without labels
    class_slices: tuple[int, ...]  # slices that show the class
    keypoints: tuple[int, ...]  # by sampled slice
    annotated: int | None = None  # slices with annotated voxels, if labels are sparse


@dataclass(frozen=True)
class Survey:
    """The sound volumes of a folder, by id."""

    reader: Reader
    raw_dir: Path
    volumes: dict[str, VolumeSurvey]
    subjects: dict[str, str]  # by volume, where a table names them


def survey_dataset(
    reader: Reader,
    raw_dir: Path,
    *,
    num_workers: int,
    client: Any = None,
    strict: bool = False,
    subjects: Mapping[str, str] | None = None,
) -> tuple[Survey, list[Fault]]:
    """Reads every volume of a folder; all its faults and findings, in order of file.

    With `strict` findings are faults. `subjects` is a table by the volumes' names
    (`data_prep.subjects`).
    """
    sources, faults = reader.find(raw_dir)
    sources, unknown = with_subjects(sources, subjects or {}, raw_dir)
    survey_one = functools.partial(survey_volume, reader)
    map_jobs = functools.partial(map_in_processes, num_workers=num_workers, client=client)
    volumes, more = read_through(survey_one, sources, map_jobs)
    facts = {id: volume.facts for id, volume in volumes.items()}
    faults = [*faults, *unknown, *more, *findings_of(reader, sources, facts)]
    faults += _other_modalities(sources, volumes)
    found = {id: volumes[id] for id in sorted(volumes)}
    survey = Survey(reader, raw_dir, found, subjects_of(sources))
    return survey, sort_faults(faults, strict=strict)


def _other_modalities(
    sources: Sequence[Source], volumes: Mapping[str, VolumeSurvey]
) -> list[Fault]:
    """Findings about volumes without labels whose values are unlike all labelled volumes'."""
    labelled = [volume for volume in volumes.values() if volume.facts.labelled]
    found = []
    for source in sources:
        volume = volumes.get(source.id)
        if volume is None or volume.facts.labelled or not labelled:
            continue
        for i, path in enumerate(source.images):
            own = volume.intensities[i]
            if any(_alike(own, other.intensities[i]) for other in labelled):
                continue
            what = f"its values, {own[1]:.4g} to {own[-2]:.4g}, are unlike those of every labelled"
            remedy = "move it away if it is of another modality"
            found.append(finding(path, f"{what} volume", remedy))
    return found


def _alike(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two images' intensities, at PERCENTILES, can be of the same modality.

    Their middle 98 % overlap, and both or neither have the negative values of CT.
    """
    overlap = first[1] <= second[-2] and second[1] <= first[-2]
    return overlap and (first[0] < LOWEST_OF_CT) == (second[0] < LOWEST_OF_CT)


def survey_volume(reader: Reader, source: Source) -> VolumeSurvey:
    """Reads one volume. Raises `DatasetError` with all its faults."""
    raw = reader.read(source)
    volume = reader.prepare(raw).volume
    num_slices = volume.image.shape[2]
    sampled = np.linspace(0, num_slices - 1, min(SAMPLED_SLICES, num_slices)).round().astype(int)
    keypoint_image = reader.keypoint_image(volume)
    shown = _count_classes(volume.label, len(reader.classes), sparse=reader.sparse)
    return VolumeSurvey(
        facts=facts_of(raw, volume),
        spacing=volume.spacing,
        dtype=raw.image.dtype.name,
        intensities=tuple(tuple(np.percentile(i, PERCENTILES).tolist()) for i in raw.channels),
        voxels=tuple(np.sum(shown, axis=0).tolist()) if shown else (),
        class_slices=tuple(np.count_nonzero(shown, axis=0).tolist()) if shown else (),
        keypoints=tuple(_num_keypoints(keypoint_image[:, :, k]) for k in sampled),
        annotated=sum(bool(of_slice.any()) for of_slice in shown)
        if reader.sparse and shown
        else None,
    )


def _count_classes(label: np.ndarray | None, num_classes: int, *, sparse: bool) -> list[np.ndarray]:
    """Voxels of each class, by slice; empty without labels or if the classes are unknown."""
    slices = () if label is None or not num_classes else np.moveaxis(label, 2, 0)
    counts = [np.bincount(label.ravel(), minlength=num_classes) for label in slices]
    return [of_slice[:num_classes] for of_slice in counts] if sparse else counts


def _num_keypoints(image: np.ndarray) -> int:
    return find_keypoints(image, max_keypoints=1, selection="strongest").num_found


def suggest_max_keypoints(keypoints: Sequence[int]) -> int:
    """The K that holds all keypoints of 99 % of the slices: a multiple of 64, at most 1024."""
    enough = float(np.percentile(keypoints, 99, method="inverted_cdf"))
    return min(max(64, 64 * math.ceil(enough / 64)), _MAX_SUGGESTED_KEYPOINTS)


def suggest_patch(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The patch (rows, columns) that holds the largest slice: multiples of 32, at most 512."""
    rows, columns = (32 * math.ceil(edge / 32) for edge in np.max(sizes, axis=0))
    return min(rows, _MAX_SUGGESTED_EDGE), min(columns, _MAX_SUGGESTED_EDGE)


def as_json(survey: Survey, faults: Sequence[Fault]) -> dict[str, Any]:
    """Everything found, as plain values; `fingerprint` is None where no volume is sound."""
    return {
        "dataset": survey.reader.kind,
        "raw_dir": str(survey.raw_dir),
        "faults": [_as_dict(fault) for fault in faults if fault.stops],
        "findings": [_as_dict(fault) for fault in faults if not fault.stops],
        "fingerprint": fingerprint(survey) if survey.volumes else None,
        "volumes": {
            id: {
                "size": [*volume.facts.size, volume.facts.num_slices],
                "spacing_mm": list(map(_round, volume.spacing)),
                "dtype": volume.dtype,
                "intensities": _one_or_all(
                    [list(map(_round, channel)) for channel in volume.intensities]
                ),
                "voxels": list(volume.voxels),
                **({} if volume.annotated is None else {"annotated_slices": volume.annotated}),
                "keypoints": list(volume.keypoints),
            }
            for id, volume in survey.volumes.items()
        },
    }


def _as_dict(fault: Fault) -> dict[str, str]:
    return {"file": str(fault.path), "found": fault.found, "remedy": fault.remedy}


def fingerprint(survey: Survey) -> dict[str, Any]:
    """The statistics of all sound volumes together; needs at least one volume."""
    volumes = list(survey.volumes.values())
    sizes = [(*volume.facts.size, volume.facts.num_slices) for volume in volumes]
    keypoints = [n for volume in volumes for n in volume.keypoints]
    places = suggest_max_keypoints(keypoints)
    patch = suggest_patch([volume.facts.size for volume in volumes])
    inside = [all(np.array(volume.facts.size) <= patch) for volume in volumes]
    return {
        "num_volumes": len(volumes),
        "num_labelled": sum(volume.facts.labelled for volume in volumes),
        "num_slices": sum(volume.facts.num_slices for volume in volumes),
        "size": _spreads(_AXES, sizes),
        "spacing_mm": _spreads(_AXES, [volume.spacing for volume in volumes]),
        "dtypes": sorted({volume.dtype for volume in volumes}),
        "intensity": _one_or_all(
            [_intensity(channel) for channel in zip(*(v.intensities for v in volumes), strict=True)]
        ),
        "planes": planes(volume.facts for volume in volumes),
        "equal_images": equal_images(volume.facts for volume in volumes),
        "classes": _classes(survey),
        **({"annotated": _annotated(survey)} if survey.reader.sparse else {}),
        "keypoints_per_slice": {"sampled_slices": len(keypoints), **_spread(keypoints)},
        "suggestion": {
            "max_keypoints": places,
            "slices_within": _round(sum(n <= places for n in keypoints) / len(keypoints)),
            "patch_size": list(patch),
            "volumes_within": sum(inside),
        },
    }


def _intensity(volumes: Sequence[Sequence[float]]) -> dict[str, Any]:
    return _spreads([f"percentile_{p}" for p in PERCENTILES], volumes)


def _one_or_all(channels: list[Any]) -> Any:
    """What is known of the only channel, or a list by channel."""
    return channels[0] if len(channels) == 1 else channels


def _classes(survey: Survey) -> list[dict[str, Any]]:
    """The number of volumes, slices and voxels that show each class; empty without labels."""
    labelled = [volume for volume in survey.volumes.values() if volume.voxels]
    if not labelled:
        return []
    voxels = np.array([volume.voxels for volume in labelled])
    slices = np.array([volume.class_slices for volume in labelled])
    return [
        {
            "name": name,
            "volumes": int(np.count_nonzero(voxels[:, i])),
            "slices": int(slices[:, i].sum()),
            "voxels": int(voxels[:, i].sum()),
            "share": _round(voxels[:, i].sum() / voxels.sum()),
        }
        for i, name in enumerate(survey.reader.classes)
    ]


def _annotated(survey: Survey) -> dict[str, float]:
    """Annotated slices and voxels of the volumes with labels, and all of both."""
    labelled = [volume for volume in survey.volumes.values() if volume.annotated is not None]
    facts = [volume.facts for volume in labelled]
    return {
        "slices": sum(volume.annotated or 0 for volume in labelled),
        "of_slices": sum(fact.num_slices for fact in facts),
        "voxels": sum(sum(volume.voxels) for volume in labelled),
        "of_voxels": sum(math.prod(fact.size) * fact.num_slices for fact in facts),
    }


def _spreads(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    columns = zip(*rows, strict=True)
    return {name: _spread(column) for name, column in zip(names, columns, strict=True)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "min": _round(min(values)),
        "median": _round(float(np.median(values))),
        "max": _round(max(values)),
    }


def _round(value: float) -> float:
    """Rounds to six digits, float32's precision; whole numbers stay whole."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def as_text(survey: Survey) -> str:
    """The fingerprint as a table, and what it suggests."""
    if not survey.volumes:
        return f"{survey.raw_dir}: no sound volume"
    found = fingerprint(survey)
    sampled, suggestion = found["keypoints_per_slice"], found["suggestion"]
    lines = [
        f"{survey.raw_dir}: {found['num_volumes']} sound volumes, {found['num_labelled']} of them "
        f"labelled, {found['num_slices']} slices, {', '.join(found['dtypes'])}",
        *[f"{fact}: {value}" for fact, value in survey.reader.facts.items()],
        f"cut in {' and '.join(found['planes'])} slices",
        *[f"equal images: {', '.join(group)}" for group in found["equal_images"]],
        "",
        _line("", "min", "median", "max"),
        *[_spread_line(axis, found["size"][axis]) for axis in _AXES],
        *[_spread_line(f"mm between {axis}", found["spacing_mm"][axis]) for axis in _AXES],
        *_intensity_lines(found["intensity"], survey.reader.facts.get("channels", ())),
        _spread_line("keypoints in a slice", sampled),
        *_class_lines(found["classes"], found["num_labelled"]),
        *_annotated_lines(found.get("annotated")),
        "",
        f"Keypoints were counted in {sampled['sampled_slices']} slices, at most {SAMPLED_SLICES} "
        "of a volume. Suggested:",
        f"  --max_keypoints {suggestion['max_keypoints']}: enough for "
        f"{suggestion['slices_within']:.1%} of them",
        f"  --config.data.patch_size='{tuple(suggestion['patch_size'])}' in training: holds the "
        f"slices of {suggestion['volumes_within']} of {found['num_volumes']} volumes whole",
    ]
    return "\n".join(lines)


def _intensity_lines(
    found: dict[str, Any] | list[dict[str, Any]], numbers: Sequence[int]
) -> list[str]:
    """Lines for the only channel, or for each of several, by its number."""
    channels = zip(numbers, found, strict=True) if isinstance(found, list) else [("", found)]
    return [
        _spread_line(f"intensity{f' {number}' if numbers else ''}, percentile {p}", of)
        for number, channel in channels
        for p, of in zip(PERCENTILES, channel.values(), strict=True)
    ]


def _class_lines(classes: list[dict[str, Any]], num_labelled: int) -> list[str]:
    if not classes:
        return ["", "No labels of known classes."]
    lines = ["", _line("class", "volumes", "slices", "voxels")]
    for i, of in enumerate(classes):
        never = "" if of["volumes"] else f"  in none of {num_labelled}"
        share = f"{of['share']:.2%}"
        lines.append(_line(f"{i} {of['name']}", of["volumes"], of["slices"], share) + never)
    return lines


def _annotated_lines(annotated: dict[str, float] | None) -> list[str]:
    if not annotated or not annotated["of_voxels"]:
        return []
    share = annotated["voxels"] / annotated["of_voxels"]
    return [
        "",
        f"Annotated: {annotated['slices']} of {annotated['of_slices']} slices and {share:.2%} of "
        "the voxels of the volumes with labels; shares of classes are of annotated voxels.",
    ]


def _spread_line(name: str, spread: dict[str, float]) -> str:
    """A line of the table; rounding fits any number into its column, however small."""
    texts = [f"{spread[key]:g}" for key in ("min", "median", "max")]
    return _line(name, *(text if len(text) < 10 else f"{float(text):.3g}" for text in texts))


def _line(name: str, *values: object) -> str:
    return f"{name:<27}" + "".join(f" {value!s:>9}" for value in values)
