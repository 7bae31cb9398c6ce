"""The datasets that can be prepared, by kind; another one is one more subclass of `Reader`."""

from data_prep.acdc import AcdcReader
from data_prep.chd import ChdReader
from data_prep.volumes import Reader

READERS: dict[str, Reader] = {reader.kind: reader for reader in (AcdcReader(), ChdReader())}
