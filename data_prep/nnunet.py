"""The raw layout of nnU-Net (version 2): `dataset.json` and folders of scans.

    RAW/dataset.json                     channel_names, labels, file_ending
    RAW/imagesTr/case_0000.nii.gz        the case's channel 0; case_0001.nii.gz its channel 1, ...
    RAW/labelsTr/case.nii.gz             its labels, which are optional
    RAW/imagesTs/other_0000.nii.gz       the test set, which runs train on only if asked to
    RAW/labelsTs/other.nii.gz            its labels, which are optional

One channel of a case makes a volume. Source of the layout: nnU-Net's documentation of its dataset
format (Isensee et al., Nature Methods 2021). Neighbours follow the CHD rule of the KAF paper, and
so do CT intensities; those of other channels are not clipped.
"""

import json
import re
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.entries import NIFTI_ENDINGS, list_entries, misplaced, unused_folder
from data_prep.faults import Fault
from data_prep.folder import DEFAULT_RADIUS, OwnReader, check_grid, split_name
from data_prep.intensity import Intensity
from data_prep.volumes import MAX_CLASSES, Source

ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", ".mhd")
_FILE = "dataset.json"
_PARTS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))  # to train on, and to test on
_LAYOUT = (_FILE, *(name for part in _PARTS for name in part))
_IGNORE = "ignore"  # the name of the label of voxels that nobody annotated
_EXPECTED = "imagesTr/<case>_0000.nii.gz"
_CONVERT = "nnUNetv2_convert_MSD_dataset and nnUNetv2_convert_old_nnUNet_dataset write version 2"


@dataclass(frozen=True)
class NnunetReader(OwnReader):
    """One channel of a dataset; `faults` are those of its `dataset.json`, which `find` reports."""

    channel: int = 0
    channel_name: str = ""
    ending: str = NIFTI_ENDINGS[0]
    num_channels: int = 1
    faults: tuple[Fault, ...] = ()

    kind = "nnunet"

    @property
    def facts(self) -> dict[str, Any]:
        """The channel and its intensity preparation."""
        channel = {"channel": self.channel, "channel_name": self.channel_name}
        return {**channel, **super().facts}

    def find(self, raw_dir: Path) -> tuple[list[Source], list[Fault]]:
        """The cases of both folders of images, by name."""
        faults = list(self.faults)
        if self.ending not in ENDINGS or not raw_dir.is_dir():
            return [], faults
        faults += _outside(raw_dir)
        sources: list[Source] = []
        cases: dict[str, Path] = {}
        for images_name, labels_name in _PARTS:
            labels, broken, more = self._find_labels(raw_dir, labels_name)
            images, unread, more_of_images = self._find_images(raw_dir / images_name, labels)
            faults += more + more_of_images
            broken |= unread
            for case, path in images.items():
                if case in cases:
                    faults.append(Fault(path, f"is a second case {case!r}", "rename one of them"))
                    continue
                id = split_name(case)
                own_name = None if id == case else case
                is_test = images_name == _PARTS[1][0]
                source = Source(id, path, labels.get(case), case=own_name, test=is_test)
                if path.exists() and not broken & {*source.files}:
                    sources.append(source)
            for case in sorted(labels.keys() - images.keys()):
                faults.append(self._without_image(labels, case, images, images_name))
            cases = images | cases
        if not cases and not any(fault.stops for fault in faults):
            faults.append(Fault(raw_dir, "holds no volume", f"expected {_EXPECTED}"))
        return sorted(sources, key=lambda source: source.id), faults

    def _find_images(
        self, folder: Path, labels: Container[str]
    ) -> tuple[dict[str, Path], frozenset[Path], list[Fault]]:
        """The chosen channel's file of each case; a missing file has a fault."""
        name = re.compile(rf"(.+)_(\d{{4}}){re.escape(self.ending)}", re.DOTALL)
        entries = list_entries(folder)
        cases: dict[str, dict[int, Path]] = defaultdict(dict)
        others: list[tuple[Path, str]] = []
        faults = [*entries.faults, *(unused_folder(path, _EXPECTED) for path in entries.folders)]
        for path in entries.scans:
            match = name.fullmatch(path.name)
            if match is not None and int(match[2]) < self.num_channels:
                cases[match[1]][int(match[2])] = path
            elif path not in entries.broken:
                found = "its name does not fit this layout"
                others.append((path, f"belongs to channel {int(match[2])}" if match else found))
        # Names without a channel still count as cases: labels are named like this.
        nameless: dict[str, Path] = {}
        for path, found in others:
            stem = path.name.removesuffix(self.ending)
            right = f"{stem}_{self.channel:04d}{self.ending}"
            if stem in labels and stem not in cases:
                nameless[stem] = path
                faults.append(Fault(path, "has no channel in its name", f"rename it to {right}"))
            else:
                remedy = (
                    f"expected <case>_<channel, 4 digits>{self.ending}, channels up to "
                    f"{self.num_channels - 1}"
                )
                faults.append(Fault(path, found, remedy))
        chosen = {case: folder / f"{case}_{self.channel:04d}{self.ending}" for case in cases}
        for case, channels in cases.items():
            if self.channel not in channels:
                remedy = f"add {chosen[case].name}, or move the case away"
                found = f"has no channel {self.channel} next to it"
                faults.append(Fault(next(iter(channels.values())), found, remedy))
        broken = entries.broken | frozenset(nameless.values())
        return nameless | chosen, broken, faults

    def _find_labels(
        self, raw_dir: Path, name: str
    ) -> tuple[dict[str, Path], frozenset[Path], list[Fault]]:
        """Labels by case, the unreadable ones, and faults."""
        folder = raw_dir / name
        for images, _ in _PARTS:
            if (
                folder.is_dir()
                and (raw_dir / images).is_dir()
                and folder.samefile(raw_dir / images)
            ):
                fault = Fault(
                    folder, f"is the same folder as {images}", "expected the labels alone"
                )
                return {}, frozenset(), [fault]
        entries = list_entries(folder)
        labels: dict[str, Path] = {}
        faults = [*entries.faults]
        expected = f"<case>{self.ending}, as {_FILE} says"
        faults += [unused_folder(path, expected) for path in entries.folders]
        for path in entries.scans:
            if path.name.endswith(self.ending):
                labels[path.name.removesuffix(self.ending)] = path
            elif path not in entries.broken:
                found = "its name does not fit this layout"
                faults.append(Fault(path, found, f"expected {expected}"))
        return labels, entries.broken, faults

    def _without_image(
        self, labels: Mapping[str, Path], case: str, cases: Mapping[str, Path], folder: str
    ) -> Fault:
        """The fault of a label without an image, with the image of the nearest name."""
        found, remedy = f"has no image in {folder}", "add it, or move this file away"
        near = max((other for other in cases if case.startswith(other)), key=len, default=None)
        if near is not None:
            image = cases[near]
            remedy = f"if it belongs to {image.name}, rename it to {near}{self.ending}"
            if case == image.name.removesuffix(self.ending):
                found = f"has the name of its image, {image.parent.name}/{image.name}"
                remedy = f"rename it to {near}{self.ending}"
            if near in labels:
                remedy = f"move it away: {image.name} has labels, {labels[near].name}"
        return Fault(labels[case], found, remedy)


def open_nnunet(
    raw_dir: Path,
    *,
    channel: str | None = None,
    intensity: Intensity | None = None,
    radius: int = DEFAULT_RADIUS,
    blank_slices_unannotated: bool = False,
    pixel_spacing: float | None = None,
) -> NnunetReader:
    """The reader that a folder's `dataset.json` describes; `find` reports the faults in it.

    `channel` is a number or a name, by default 0. `intensity` defaults to `ct` for a channel named
    CT, else to `zscore`. `blank_slices_unannotated` is `OwnReader`'s. Slices are resampled to
    `pixel_spacing`, mm, if it is given. Raises `UserError` for a radius below 1, or a spacing
    outside 0.1 to 10 mm.
    """
    check_grid(radius, pixel_spacing)
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
        ignore_label=_ignore_label(description),
        blank_slices_unannotated=blank_slices_unannotated,
        radius=radius,
        pixel_spacing=pixel_spacing,
        channel=number,
        channel_name=name,
        intensity=intensity or ("ct" if name.upper() == "CT" else "zscore"),
        ending=_ending(path, description, faults),
        num_channels=len(channels) or 10_000,
        faults=tuple(faults),
    )


def _outside(raw_dir: Path) -> list[Fault]:
    """Faults and findings about everything next to the layout's own entries."""
    layout = ", ".join(_LAYOUT)
    entries = list_entries(raw_dir, used=_LAYOUT)
    faults = [*entries.faults, *misplaced(entries.scans, layout)]
    return faults + [unused_folder(path, layout) for path in entries.folders]


def _read_description(path: Path, faults: list[Fault]) -> dict[str, Any] | None:
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


def _channels(path: Path, description: dict[str, Any] | None, faults: list[Fault]) -> list[str]:
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


def _ignore_label(description: dict[str, Any] | None) -> int | None:
    """The number of the ignore label, if there is one; `_classes` reports what is wrong with it."""
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


def _ending(path: Path, description: dict[str, Any] | None, faults: list[Fault]) -> str:
    if description is None:
        return ENDINGS[0]
    ending = description.get("file_ending")
    if ending not in ENDINGS:
        remedy = f"expected {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}; save the volumes as NIfTI"
        faults.append(Fault(path, _found("file_ending", description), remedy))
    return str(ending)


def _found(field: str, description: dict[str, Any]) -> str:
    return f"{field} is {description[field]!r}" if field in description else f"has no {field}"
