"""nnU-Net's `dataset.json` (version 2): its channels, classes, regions and file ending.

Functions take the file's path, for faults, and its content, None if it cannot be read; they append
what is wrong to `faults`, and return a default in its place.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.entries import NIFTI_ENDINGS
from data_prep.faults import Fault, finding, refuse
from data_prep.volumes import MAX_CLASSES
from kafjax.regions import Region, write_labels

FILE = "dataset.json"
ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", ".mhd")
_IGNORE = "ignore"  # the name of the label of voxels that nobody annotated
_LABEL = "label_{}"  # the name of a single label where there are regions
_ORDER = "regions_class_order"
_CONVERT = "nnUNetv2_convert_MSD_dataset and nnUNetv2_convert_old_nnUNet_dataset write version 2"


def read_classes(path: Path) -> dict[str, Any]:
    """The classes, regions and ignore label, as the metadata of a prepared dataset has them.

    Raises `DatasetError` with all faults of these.
    """
    faults: list[Fault] = []
    description = read_description(path, faults)
    regions = listed_regions(path, description, faults)
    facts = {
        "classes": classes_of(path, description, faults),
        "regions": regions_as_facts(regions),
        "ignore_label": ignore_label_of(description),
    }
    refuse(faults)
    return facts


def regions_as_facts(regions: Sequence[Region]) -> list[list[Any]]:
    """Regions as the metadata of a dataset has them (`kafjax.regions.regions_of`)."""
    return [[name, list(labels), written] for name, labels, written in regions]


def read_description(path: Path, faults: list[Fault]) -> dict[str, Any] | None:
    """The content of `dataset.json`, or None and a fault if it cannot be read."""
    try:
        description = json.loads(path.read_bytes())
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    except ValueError as error:
        found = f"is not JSON ({error})"
    else:
        if isinstance(description, dict):
            if "dataset" in description:
                remedy = "move the files to imagesTr and labelsTr, and remove the entry"
                faults.append(Fault(path, "lists its files under 'dataset'", remedy))
            return description
        found = "does not hold an object"
    remedy = "expected an object with channel_names, labels and file_ending, as in nnU-Net"
    faults.append(Fault(path, found, remedy))
    return None


def listed_channels(
    path: Path, description: dict[str, Any] | None, faults: list[Fault]
) -> list[str]:
    """Names of the channels in order; empty, with a fault, if unknown."""
    if description is None:
        return []
    names = description.get("channel_names")
    if isinstance(names, dict) and names and set(names) == set(map(str, range(len(names)))):
        return [str(names[str(i)]) for i in range(len(names))]
    remedy = 'expected for example {"0": "CT"}'
    if "modality" in description and names is None:
        remedy += f"; {_CONVERT}"
    faults.append(Fault(path, _found("channel_names", description), remedy))
    return []


def choose_channels(
    path: Path, listed: list[str], given: str | None, faults: list[Fault]
) -> tuple[int, ...]:
    """Numbers of the channels that are asked for, by default of all."""
    if given is None:
        return tuple(range(len(listed))) or (0,)
    words = [given] if given in listed else given.split(",")
    found = tuple(_channel_number(path, listed, word, faults) for word in words)
    if len({*found}) < len(found):
        remedy = f"--channel is {given}; expected each channel once"
        faults.append(Fault(path, "has a channel that is asked for twice", remedy))
    return found


def _channel_number(path: Path, listed: list[str], channel: str, faults: list[Fault]) -> int:
    if listed.count(channel) == 1:
        return listed.index(channel)
    if channel.isdecimal() and (not listed or int(channel) < len(listed)):
        return int(channel)
    if listed:
        known = ", ".join(f"{i} ({name})" for i, name in enumerate(listed))
        faults.append(Fault(path, f"has no channel {channel}", f"expected one of {known}"))
    return 0


def choose_keypoint_channel(
    path: Path,
    listed: list[str],
    channels: tuple[int, ...],
    given: str | None,
    faults: list[Fault],
) -> int:
    """The number of the channel whose keypoints are taken, by default the first chosen one."""
    if given is None:
        return channels[0]
    number = _channel_number(path, listed, given, faults)
    if number not in channels:
        known = ", ".join(map(str, channels))
        found = f"its channel {number} is for keypoints, but is none of those prepared"
        faults.append(Fault(path, found, f"expected one of {known}, or --channel with it"))
        return channels[0]
    return number


def classes_of(
    path: Path, description: dict[str, Any] | None, faults: list[Fault]
) -> tuple[str, ...]:
    """Names of the classes in order; empty, with a fault, if unknown.

    With regions the single labels have no names but their numbers.
    """
    if description is not None:
        labels = description.get("labels")
        problem = _labels_problem(labels, description)
        if labels is not None and problem is None:
            if _has_regions(labels):
                return "background", *(_LABEL.format(n) for n in sorted(_numbers(labels) - {0}))
            names = sorted(labels, key=labels.__getitem__)
            return tuple(name for name in names if name != _IGNORE)
        assert problem is not None
        faults.append(Fault(path, *problem))
    return ()


def listed_regions(
    path: Path, description: dict[str, Any] | None, faults: list[Fault]
) -> tuple[Region, ...]:
    """The regions, if `labels` has some; `classes_of` reports their faults.

    A finding names the labels that do not come back as themselves.
    """
    labels: Any = (description or {}).get("labels")
    if not description or _labels_problem(labels, description) or not _has_regions(labels):
        return ()
    regions = tuple(
        Region(name, tuple(value) if isinstance(value, list) else (value,), written)
        for (name, value), written in zip(
            _structures(labels).items(), description[_ORDER], strict=True
        )
    )
    for number in sorted(_numbers(labels) - {0}):
        inside = np.array([number in region.labels for region in regions])
        written = write_labels(inside, [region.written for region in regions])
        if written != number:
            found = f"its regions write label {number} as {written}"
            faults.append(finding(path, found, f"correct {_ORDER} if that is wrong"))
    return regions


def ignore_label_of(description: dict[str, Any] | None) -> int | None:
    """The number of the ignore label, if there is one; `classes_of` reports its faults."""
    labels = (description or {}).get("labels")
    number = labels.get(_IGNORE) if isinstance(labels, dict) else None
    return number if type(number) is int else None


def _labels_problem(labels: Any, description: dict[str, Any]) -> tuple[str, str] | None:
    """The fault of `labels` and its remedy, or None."""
    remedy = 'expected for example {"background": 0, "liver": 1}'
    if not isinstance(labels, dict) or not labels:
        return ("has no labels" if labels is None else f"labels is {labels!r}"), remedy
    each = [value if isinstance(value, list) and value else [value] for value in labels.values()]
    if not all(type(number) is int for value in each for number in value):
        old = f"; {_CONVERT}" if all(name.isdecimal() for name in labels) else ""
        return f"labels is {labels!r}", remedy + old
    numbers = sorted([n for value in each for n in value])
    if _has_regions(labels):
        if problem := _regions_problem(labels, description.get(_ORDER)):
            return problem
        numbers = sorted({*numbers})
    if numbers != list(range(len(numbers))):
        return (
            f"labels are numbered {', '.join(map(str, numbers))}",
            "expected 0 (the background), 1, 2, ... without gaps",
        )
    if _IGNORE in labels and labels[_IGNORE] != max(numbers):
        return (
            f"the ignore label is {labels[_IGNORE]}",
            f"expected {max(numbers)}, the last number, as in nnU-Net",
        )
    if len(numbers) > MAX_CLASSES:
        return f"has {len(numbers)} labels", f"expected at most {MAX_CLASSES}"
    return None


def _regions_problem(labels: dict[str, Any], order: Any) -> tuple[str, str] | None:
    """The fault of regions whose values are numbers, and its remedy, or None."""
    count = len(_structures(labels))
    numbers = [n for value in _structures(labels).values() for n in np.ravel(value).tolist()]
    if labels.get("background") != 0 or isinstance(labels.get(_IGNORE), list):
        return "has regions", 'expected "background": 0, and one number for "ignore" if it is there'
    if taken := [name for name in labels if re.fullmatch(_LABEL.format(r"\d+"), name)]:
        return f"a region is named {taken[0]!r}", "expected another name, as labels are called so"
    if {0, labels.get(_IGNORE)} & {*numbers}:
        return "a region has the background or the ignore label", "expected the other labels"
    known = isinstance(order, list) and all(type(n) is int and n in numbers for n in order)
    if not known or len(order) != count or len({*order}) < count:
        found = f"{_ORDER} is {order!r}" if order is not None else f"has no {_ORDER}"
        return found, f"expected a label of each of the {count} regions, in the order of writing"
    return None


def _structures(labels: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in labels.items() if name not in ("background", _IGNORE)}


def _has_regions(labels: dict[str, Any]) -> bool:
    return any(isinstance(value, list) for value in labels.values())


def _numbers(labels: dict[str, Any]) -> set[int]:
    """The numbers of all labels but the ignore label."""
    kept = (value for name, value in labels.items() if name != _IGNORE)
    return {number for value in kept for number in np.ravel(value).tolist()}


def ending_of(path: Path, description: dict[str, Any] | None, faults: list[Fault]) -> str:
    """The ending of the files' names."""
    if description is None:
        return ENDINGS[0]
    ending = description.get("file_ending")
    if ending not in ENDINGS:
        remedy = f"expected {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}; save the volumes as NIfTI"
        faults.append(Fault(path, _found("file_ending", description), remedy))
    return str(ending)


def _found(field: str, description: dict[str, Any]) -> str:
    return f"{field} is {description[field]!r}" if field in description else f"has no {field}"
