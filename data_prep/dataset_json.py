"""nnU-Net's `dataset.json` (version 2): its channels, classes and file ending.

Functions take the file's path, for faults, and its content, None if it cannot be read; they append
what is wrong to `faults`, and return a default in its place.
"""

import json
from pathlib import Path
from typing import Any

from data_prep.entries import NIFTI_ENDINGS
from data_prep.faults import Fault
from data_prep.volumes import MAX_CLASSES

FILE = "dataset.json"
ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", ".mhd")
_IGNORE = "ignore"  # the name of the label of voxels that nobody annotated
_CONVERT = "nnUNetv2_convert_MSD_dataset and nnUNetv2_convert_old_nnUNet_dataset write version 2"


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
    """Names of the classes in order; empty, with a fault, if unknown."""
    if description is not None:
        labels = description.get("labels")
        problem = _labels_problem(labels)
        if labels is not None and problem is None:
            names = sorted(labels, key=labels.__getitem__)
            return tuple(name for name in names if name != _IGNORE)
        assert problem is not None
        faults.append(Fault(path, *problem))
    return ()


def ignore_label_of(description: dict[str, Any] | None) -> int | None:
    """The number of the ignore label, if there is one; `classes_of` reports its faults."""
    labels = (description or {}).get("labels")
    number = labels.get(_IGNORE) if isinstance(labels, dict) else None
    return number if type(number) is int else None


def _labels_problem(labels: Any) -> tuple[str, str] | None:
    """The fault of `labels` and its remedy, or None."""
    remedy = 'expected for example {"background": 0, "liver": 1}'
    if not isinstance(labels, dict) or not labels:
        return ("has no labels" if labels is None else f"labels is {labels!r}"), remedy
    if regions := [name for name, value in labels.items() if isinstance(value, list)]:
        return (
            f"labels are regions ({', '.join(regions)})",
            "regions are not supported; give each label one number and one name",
        )
    numbers = list(labels.values())
    if not all(type(number) is int for number in numbers):
        old = f"; {_CONVERT}" if all(name.isdecimal() for name in labels) else ""
        return f"labels is {labels!r}", remedy + old
    if sorted(numbers) != list(range(len(numbers))):
        return (
            f"labels are numbered {', '.join(map(str, sorted(numbers)))}",
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
