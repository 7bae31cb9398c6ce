"""The kinds of datasets that can be prepared; add one by subclassing `Reader`."""

from collections.abc import Mapping
from typing import Any

from data_prep.acdc import PIXEL, AcdcReader
from data_prep.chd import ChdReader
from data_prep.nnunet import NnunetReader
from data_prep.volumes import Reader
from kafjax.errors import UserError
from kafjax.registry import Registry

# Datasets with fixed rules; nnU-Net's rules are in the folder's own description.
READERS: Registry[Reader] = Registry(
    {reader.kind: reader for reader in (AcdcReader(), ChdReader())}
)
KINDS = (*READERS, NnunetReader.kind)


def reader_of(metadata: Mapping[str, Any]) -> Reader:
    """The reader that prepared a dataset, from its metadata, to treat further volumes alike.

    Raises `ValueError` for an unknown kind of dataset.
    """
    kind = str(metadata.get("kind"))
    if kind == NnunetReader.kind:
        return NnunetReader(
            classes=tuple(metadata["classes"]),
            radius=metadata["radius"],
            channel=metadata["channel"],
            channel_name=metadata["channel_name"],
            intensity=metadata["intensity"],
        )
    if kind == AcdcReader.kind:
        return AcdcReader(pixel_spacing=metadata.get("pixel_spacing", PIXEL))
    if kind not in READERS:
        raise UserError(f"dataset kind {kind!r}; expected one of {', '.join(KINDS)}")
    return READERS[kind]
