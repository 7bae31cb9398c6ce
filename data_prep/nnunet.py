"""The raw layout of nnU-Net (version 2): `dataset.json` and folders of scans.

    RAW/dataset.json                     channel_names, labels, file_ending
    RAW/imagesTr/case_0000.nii.gz        the case's channel 0; case_0001.nii.gz its channel 1, ...
    RAW/labelsTr/case.nii.gz             its labels, which are optional
    RAW/imagesTs/other_0000.nii.gz       the test set, which runs train on only if asked to
    RAW/labelsTs/other.nii.gz            its labels, which are optional

The channels of a case, or some of them, make a volume. Source of the layout: nnU-Net's
documentation of its dataset format (Isensee et al., Nature Methods 2021). Neighbours follow the CHD
rule of the KAF paper, and so do CT intensities; those of other channels are not clipped.
"""

import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset_json import (
    ENDINGS,
    FILE,
    choose_channels,
    choose_keypoint_channel,
    classes_of,
    ending_of,
    ignore_label_of,
    listed_channels,
    listed_regions,
    read_description,
    regions_as_facts,
)
from data_prep.entries import NIFTI_ENDINGS, list_entries, misplaced, unused_folder
from data_prep.faults import Fault
from data_prep.folder import DEFAULT_RADIUS, OwnReader, check_grid, split_name
from data_prep.intensity import Intensity
from data_prep.volumes import Source, Volume
from kafjax.errors import UserError
from kafjax.regions import Region

_PARTS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))  # to train on, and to test on
_LAYOUT = (FILE, *(name for part in _PARTS for name in part))
_EXPECTED = "imagesTr/<case>_0000.nii.gz"


@dataclass(frozen=True)
class NnunetReader(OwnReader):
    """Channels of a dataset, by their numbers in its `dataset.json`, and names.

    `keypoint_channel` is the number of the one whose keypoints are taken, `listed` how many
    channels the file has, and `faults` are its own, which `find` reports.
    """

    channels: tuple[int, ...] = (0,)
    channel_names: tuple[str, ...] = ("",)
    keypoint_channel: int = 0
    regions: tuple[Region, ...] = ()
    ending: str = NIFTI_ENDINGS[0]
    listed: int = 1
    faults: tuple[Fault, ...] = ()

    kind = "nnunet"

    @property
    def num_channels(self) -> int:  # type: ignore[override]
        """The number of a record's channels."""
        return len(self.channels)

    @property
    def facts(self) -> dict[str, Any]:
        """The channels and their intensity preparation, and the regions if there are some."""
        channels = {"channel": self.channels[0], "channel_name": self.channel_names[0]}
        if self.num_channels > 1:
            channels = {
                "channels": list(self.channels),
                "channel_names": list(self.channel_names),
                "keypoint_channel": self.keypoint_channel,
            }
        regions = regions_as_facts(self.regions)
        return {**channels, **super().facts, **({"regions": regions} if regions else {})}

    def keypoint_image(self, volume: Volume) -> np.ndarray:
        """The chosen channel."""
        return volume.channels[self.channels.index(self.keypoint_channel)]

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
                further = tuple(self._file(path.parent, case, n) for n in self.channels[1:])
                source = Source(
                    id, path, labels.get(case), case=own_name, test=is_test, further=further
                )
                if all(p.exists() for p in source.images) and not broken & {*source.files}:
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
        """The first chosen channel's file of each case; missing files have a fault."""
        name = re.compile(rf"(.+)_(\d{{4}}){re.escape(self.ending)}", re.DOTALL)
        entries = list_entries(folder)
        cases: dict[str, dict[int, Path]] = defaultdict(dict)
        others: list[tuple[Path, str]] = []
        faults = [*entries.faults, *(unused_folder(path, _EXPECTED) for path in entries.folders)]
        for path in entries.scans:
            match = name.fullmatch(path.name)
            if match is not None and int(match[2]) < self.listed:
                cases[match[1]][int(match[2])] = path
            elif path not in entries.broken:
                found = "its name does not fit this layout"
                others.append((path, f"belongs to channel {int(match[2])}" if match else found))
        # Names without a channel still count as cases: labels are named like this.
        nameless: dict[str, Path] = {}
        for path, found in others:
            stem = path.name.removesuffix(self.ending)
            right = self._file(folder, stem, self.channels[0]).name
            if stem in labels and stem not in cases:
                nameless[stem] = path
                faults.append(Fault(path, "has no channel in its name", f"rename it to {right}"))
            else:
                remedy = (
                    f"expected <case>_<channel, 4 digits>{self.ending}, channels up to "
                    f"{self.listed - 1}"
                )
                faults.append(Fault(path, found, remedy))
        chosen = {case: self._file(folder, case, self.channels[0]) for case in cases}
        for case, there in cases.items():
            for channel in self.channels:
                if channel not in there:
                    right = self._file(folder, case, channel).name
                    remedy = f"add {right}, or move the case away"
                    found = f"has no channel {channel} next to it"
                    faults.append(Fault(next(iter(there.values())), found, remedy))
        broken = entries.broken | frozenset(nameless.values())
        return nameless | chosen, broken, faults

    def _file(self, folder: Path, case: str, channel: int) -> Path:
        return folder / f"{case}_{channel:04d}{self.ending}"

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
        expected = f"<case>{self.ending}, as {FILE} says"
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
    keypoint_channel: str | None = None,
    intensity: Intensity | Sequence[Intensity] | None = None,
    radius: int = DEFAULT_RADIUS,
    blank_slices_unannotated: bool = False,
    pixel_spacing: float | None = None,
) -> NnunetReader:
    """The reader that a folder's `dataset.json` describes; `find` reports the faults in it.

    `channel` is a number or a name, or several joined by commas, by default all; keypoints are
    those of `keypoint_channel`, by default the first of them. `intensity` is of each channel or of
    all; it defaults to `ct` for a channel named CT, else to `zscore`. `blank_slices_unannotated` is
    `OwnReader`'s. Slices are resampled to `pixel_spacing`, mm, if it is given. Raises `UserError`
    for a radius below 1, or a spacing outside 0.1 to 10 mm.
    """
    check_grid(radius, pixel_spacing)
    if not raw_dir.is_dir():
        remedy = f"give the folder that holds {FILE} and imagesTr"
        return NnunetReader((), faults=(Fault(raw_dir, "is not a folder", remedy),))
    path = raw_dir / FILE
    faults: list[Fault] = []
    description = read_description(path, faults)
    listed = listed_channels(path, description, faults)
    channels = choose_channels(path, listed, channel, faults)
    names = tuple(listed[n] if n < len(listed) else "" for n in channels)
    each = (intensity,) * len(names) if isinstance(intensity, str) else tuple(intensity or ())
    each = each or tuple("ct" if name.upper() == "CT" else "zscore" for name in names)
    if len(each) != len(names):
        raise UserError(f"{len(each)} intensities for {len(names)} channels; expected as many")
    return NnunetReader(
        classes=classes_of(path, description, faults),
        ignore_label=ignore_label_of(description),
        blank_slices_unannotated=blank_slices_unannotated,
        radius=radius,
        pixel_spacing=pixel_spacing,
        channels=channels,
        channel_names=names,
        regions=listed_regions(path, description, faults),
        keypoint_channel=choose_keypoint_channel(path, listed, channels, keypoint_channel, faults),
        intensity=each if len(each) > 1 else each[0],
        ending=ending_of(path, description, faults),
        listed=len(listed) or 10_000,
        faults=tuple(faults),
    )


def _outside(raw_dir: Path) -> list[Fault]:
    """Faults and findings about everything next to the layout's own entries."""
    layout = ", ".join(_LAYOUT)
    entries = list_entries(raw_dir, used=_LAYOUT)
    faults = [*entries.faults, *misplaced(entries.scans, layout)]
    return faults + [unused_folder(path, layout) for path in entries.folders]
