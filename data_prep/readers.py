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


def reader_of(metadata: Mapping[str, Any]) -> Reader:
    """The reader that prepared a dataset, from its metadata, to treat further volumes alike.

    Raises `ValueError` for an unknown kind of dataset.
    """
    kind = str(metadata.get("kind"))
    if kind in (FolderReader.kind, NnunetReader.kind):
        own = {name: metadata[name] for name in ("radius", "intensity")}
        own |= {
            "classes": tuple(metadata["classes"]),
            "pixel_spacing": metadata.get("pixel_spacing"),
        }
        if kind == FolderReader.kind:
            return FolderReader(**own, label_values=tuple(metadata["label_values"]))
        channel = {name: metadata[name] for name in ("channel", "channel_name")}
        return NnunetReader(**own, **channel)
    if kind == AcdcReader.kind:
        return AcdcReader(pixel_spacing=metadata.get("pixel_spacing", PIXEL))
    if kind not in READERS:
        raise UserError(f"dataset kind {kind!r}; expected one of {', '.join(KINDS)}")
    return READERS[kind]
