"""Anyone's data in the raw layout of nnU-Net (version 2): `dataset.json` and folders of NIfTI.

    RAW/dataset.json                     channel_names, labels, file_ending
    RAW/imagesTr/case_0000.nii.gz        the case's channel 0; case_0001.nii.gz its channel 1, ...
    RAW/labelsTr/case.nii.gz             its labels; a case without is a volume without labels
    RAW/imagesTs/other_0000.nii.gz       further volumes, without labels

One channel of a case makes a volume. Source of the layout: nnU-Net's documentation of its dataset
format (Isensee et al., Nature Methods 2021). Neighbours follow the CHD rule of the KAF paper, as
do the intensities of CT; those of other channels are not clipped.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.faults import Fault
from data_prep.intensity import INTENSITIES, Intensity
from data_prep.nifti import Plane, slice_plane
from data_prep.volumes import MAX_CLASSES, Prepared, Reader, Source, Volume, is_nifti
from kafjax.errors import UserError

ENDINGS = (".nii.gz", ".nii")
DEFAULT_RADIUS = 20
_FILE = "dataset.json"
_EXPECTED = "imagesTr/<case>_0000.nii.gz"
_CONVERT = "nnUNetv2_convert_MSD_dataset and nnUNetv2_convert_old_nnUNet_dataset write version 2"


@dataclass(frozen=True)
class NnunetReader(Reader):
    """One channel of a dataset; `faults` are those of its `dataset.json`, which `find` reports."""

    classes: tuple[str, ...]
    radius: int = DEFAULT_RADIUS
    channel: int = 0
    channel_name: str = ""
    intensity: Intensity = "zscore"
    ending: str = ENDINGS[0]
    num_channels: int = 1
    faults: tuple[Fault, ...] = ()

    kind = "nnunet"

    @property
    def facts(self) -> dict[str, Any]:
        """The channel and what is done with it."""
        return {
            "channel": self.channel,
            "channel_name": self.channel_name,
            "intensity": self.intensity,
        }

    def plane(self, affine: np.ndarray) -> Plane:
        """Across the coarsest axis, where there is one; else axial."""
        return slice_plane(affine)

    def reach(self, num_slices: int) -> int:
        """5 % of the slices, as in CHD."""
        return max(1, num_slices // 20)

    def prepare(self, volume: Volume) -> Prepared:
        """Clips CT to its 1st and 99th percentile; leaves other channels as they are."""
        return INTENSITIES[self.intensity](volume)

    def find(self, raw_dir: Path) -> tuple[list[Source], list[Fault]]:
        """The cases of both folders of images, by name."""
        faults = list(self.faults)
        if self.ending not in ENDINGS or not raw_dir.is_dir():
            return [], faults
        labels, more = self._find_labels(raw_dir / "labelsTr")
        faults += more
        sources: list[Source] = []
        cases: set[str] = set()
        for folder in ("imagesTr", "imagesTs"):
            images, more = self._find_images(raw_dir / folder)
            faults += more
            for case, path in images.items():
                if case in cases:
                    faults.append(Fault(path, f"is a second case {case!r}", "rename one of them"))
                elif path.is_file():
                    id = split_name(case)
                    own_name = None if id == case else case
                    sources.append(Source(id, path, labels.get(case), case=own_name))
            cases |= images.keys()
        if not cases and not faults:
            faults.append(Fault(raw_dir, "holds no volume", f"expected {_EXPECTED}"))
        remedy = "add it, or move this file away"
        for case in sorted(labels.keys() - cases):
            faults.append(Fault(labels[case], "has no image in imagesTr", remedy))
        return sorted(sources, key=lambda source: source.id), faults

    def _find_images(self, folder: Path) -> tuple[dict[str, Path], list[Fault]]:
        """The chosen channel's file of each case, whether it is there or not, with a fault."""
        name = re.compile(rf"(.+)_(\d{{4}}){re.escape(self.ending)}", re.DOTALL)
        cases: dict[str, dict[int, Path]] = defaultdict(dict)
        faults = []
        for path in _nifti_files(folder):
            match = name.fullmatch(path.name)
            if match is None:
                remedy = f"expected <case>_<channel, 4 digits>{self.ending}"
                faults.append(Fault(path, "its name is not one of this layout's", remedy))
            elif int(match[2]) >= self.num_channels:
                remedy = f"{_FILE} has channels up to {self.num_channels - 1}"
                faults.append(Fault(path, f"is of channel {int(match[2])}", remedy))
            else:
                cases[match[1]][int(match[2])] = path
        chosen = {case: folder / f"{case}_{self.channel:04d}{self.ending}" for case in cases}
        for case, channels in cases.items():
            if self.channel not in channels:
                remedy = f"add {chosen[case].name}, or move the case away"
                found = f"has no channel {self.channel} beside it"
                faults.append(Fault(next(iter(channels.values())), found, remedy))
        return chosen, faults

    def _find_labels(self, folder: Path) -> tuple[dict[str, Path], list[Fault]]:
        labels, faults = {}, []
        for path in _nifti_files(folder):
            if path.name.endswith(self.ending):
                labels[path.name.removesuffix(self.ending)] = path
            else:
                remedy = f"expected <case>{self.ending}, as {_FILE} says"
                faults.append(Fault(path, "its name is not one of this layout's", remedy))
        return labels, faults


def open_nnunet(
    raw_dir: Path,
    *,
    channel: str | None = None,
    intensity: Intensity | None = None,
    radius: int | None = None,
) -> NnunetReader:
    """The reader of a folder, by its `dataset.json`; what is wrong there is found by `find`.

    `channel` is a number or a name, by default 0. `intensity` is by default `ct` where the channel
    is named CT, else `zscore`. Raises `ValueError` for a radius below 1.
    """
    if radius is not None and radius < 1:
        raise UserError(f"radius is {radius}; expected 1 px or more")
    if not raw_dir.is_dir():
        remedy = f"give the folder that holds {_FILE} and imagesTr"
        return NnunetReader((), faults=(Fault(raw_dir, "is not a folder", remedy),))
    path = raw_dir / _FILE
    faults: list[Fault] = []
    description = _read_description(path, faults)
    channels = _channels(path, description, faults)
    number = _choose_channel(path, channels, channel, faults)
    name = channels[number] if number < len(channels) else ""
    return NnunetReader(
        classes=_classes(path, description, faults),
        radius=DEFAULT_RADIUS if radius is None else radius,
        channel=number,
        channel_name=name,
        intensity=intensity or ("ct" if name.upper() == "CT" else "zscore"),
        ending=_ending(path, description, faults),
        num_channels=len(channels) or 10_000,
        faults=tuple(faults),
    )


def split_name(case: str) -> str:
    """A split's name for a case: letters, digits and underscores, another one for each case.

    Every other character, and an underscore before an x, becomes `_x<code point, hexadecimal>_`;
    most names stay as they are. Names that tfds reserves or refuses have their first so written.
    """
    special = case == "all" or not re.search("[A-Za-z0-9]", case)
    first = _escape(case[0]) if special else ""
    return first + re.sub(
        "[^A-Za-z0-9_]|_(?=x)", lambda match: _escape(match[0]), case[1:] if special else case
    )


def _escape(character: str) -> str:
    return f"_x{ord(character):x}_"


def _nifti_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if is_nifti(p)) if folder.is_dir() else []


def _read_description(path: Path, faults: list[Fault]) -> dict[str, Any] | None:
    """`dataset.json`, or nothing, with a fault, if it cannot be read."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
    except ValueError as error:
        found = f"is not JSON ({error})"
    else:
        if isinstance(description, dict):
            if "dataset" in description:
                remedy = "move the files to imagesTr and labelsTr, and take the entry out"
                faults.append(Fault(path, "lists its files under 'dataset'", remedy))
            return description
        found = "does not hold an object"
    remedy = "expected an object with channel_names, labels and file_ending, as nnU-Net has it"
    faults.append(Fault(path, found, remedy))
    return None


def _channels(path: Path, description: dict[str, Any] | None, faults: list[Fault]) -> list[str]:
    """Names of the channels in order; none, with a fault, where they cannot be known."""
    if description is None:
        return []
    names = description.get("channel_names")
    if isinstance(names, dict) and names and set(names) == set(map(str, range(len(names)))):
        return [str(names[str(i)]) for i in range(len(names))]
    remedy = 'expected such as {"0": "CT"}'
    if "modality" in description and names is None:
        remedy += f"; {_CONVERT}"
    faults.append(Fault(path, _found("channel_names", description), remedy))
    return []


def _choose_channel(
    path: Path, channels: list[str], channel: str | None, faults: list[Fault]
) -> int:
    if channel is None:
        return 0
    if channels.count(channel) == 1:
        return channels.index(channel)
    if channel.isdecimal() and (not channels or int(channel) < len(channels)):
        return int(channel)
    if channels:
        known = ", ".join(f"{i} ({name})" for i, name in enumerate(channels))
        faults.append(Fault(path, f"has no channel {channel}", f"expected one of {known}"))
    return 0


def _classes(
    path: Path, description: dict[str, Any] | None, faults: list[Fault]
) -> tuple[str, ...]:
    """Names of the classes in order; none, with a fault, where they cannot be known."""
    if description is not None:
        labels = description.get("labels")
        problem = _labels_problem(labels)
        if labels is not None and problem is None:
            return tuple(sorted(labels, key=labels.__getitem__))
        assert problem is not None
        faults.append(Fault(path, *problem))
    return ()


def _labels_problem(labels: Any) -> tuple[str, str] | None:
    """What makes `labels` unfit, and what to do, or nothing."""
    remedy = 'expected such as {"background": 0, "liver": 1}'
    if not isinstance(labels, dict) or not labels:
        return ("has no labels" if labels is None else f"labels is {labels!r}"), remedy
    if regions := [name for name, value in labels.items() if isinstance(value, list)]:
        return (
            f"labels are regions ({', '.join(regions)})",
            "regions are not supported; give every label one number and one name",
        )
    if "ignore" in labels:
        return "has an ignore label", "it is not supported; label those voxels, or leave them out"
    numbers = list(labels.values())
    if not all(type(number) is int for number in numbers):
        old = f"; {_CONVERT}" if all(name.isdecimal() for name in labels) else ""
        return f"labels is {labels!r}", remedy + old
    if sorted(numbers) != list(range(len(numbers))):
        return (
            f"labels are numbered {', '.join(map(str, sorted(numbers)))}",
            "expected 0 (the background), 1, 2, ... without gaps",
        )
    if len(numbers) > MAX_CLASSES:
        return f"has {len(numbers)} labels", f"expected at most {MAX_CLASSES}"
    return None


def _ending(path: Path, description: dict[str, Any] | None, faults: list[Fault]) -> str:
    if description is None:
        return ENDINGS[0]
    ending = description.get("file_ending")
    if ending not in ENDINGS:
        remedy = f"expected {' or '.join(ENDINGS)}; save the volumes as NIfTI"
        faults.append(Fault(path, _found("file_ending", description), remedy))
    return str(ending)


def _found(field: str, description: dict[str, Any]) -> str:
    return f"{field} is {description[field]!r}" if field in description else f"has no {field}"
