"""The kinds of datasets that can be prepared; add one by subclassing `Reader`."""

from collections.abc import Mapping
from typing import Any

from data_prep.acdc import PIXEL, AcdcReader
from data_prep.chd import ChdReader
from data_prep.folder import FolderReader
from data_prep.nnunet import NnunetReader
from data_prep.volumes import Reader
from kafjax.errors import UserError
from kafjax.registry import Registry

# Datasets with fixed rules; the others' rules depend on the folder's content.
READERS: Registry[Reader] = Registry(
    {reader.kind: reader for reader in (AcdcReader(), ChdReader())}
)
KINDS = (*READERS, FolderReader.kind, NnunetReader.kind)


def channels_of(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of a dataset's channels, from its metadata; of one without numbers, 0."""
    return tuple(metadata.get("channels") or [metadata.get("channel", 0)])


def reader_of(metadata: Mapping[str, Any]) -> Reader:
    """The reader that prepared a dataset, from its metadata, to treat further volumes alike.

    Raises `ValueError` for an unknown kind of dataset.
    """
    kind = str(metadata.get("kind"))
    if kind in (FolderReader.kind, NnunetReader.kind):
        intensity = metadata["intensity"]
        own = {
            "radius": metadata["radius"],
            "intensity": intensity if isinstance(intensity, str) else tuple(intensity),
            "classes": tuple(metadata["classes"]),
            "pixel_spacing": metadata.get("pixel_spacing"),
        }
        if kind == FolderReader.kind:
            return FolderReader(**own, label_values=tuple(metadata["label_values"]))
        channels = channels_of(metadata)
        names = metadata.get("channel_names") or [metadata["channel_name"]]
        keypoints = metadata.get("keypoint_channel", channels[0])
        return NnunetReader(
            **own, channels=channels, channel_names=tuple(names), keypoint_channel=keypoints
        )
    if kind == AcdcReader.kind:
        return AcdcReader(pixel_spacing=metadata.get("pixel_spacing", PIXEL))
    if kind not in READERS:
        raise UserError(f"dataset kind {kind!r}; expected one of {', '.join(KINDS)}")
    return READERS[kind]
