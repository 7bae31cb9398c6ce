"""The files of a split for `benchmarks.nnunet`: links to raw volumes to train on and predict."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.nnunet import open_nnunet
from data_prep.readers import reader_of
from data_prep.volumes import Source
from kafjax.data.dataset import SliceDataset
from kafjax.data.splits import Split
from kafjax.errors import UserError
from kafjax.files import write_text

_DATASET = "Dataset001_benchmark"
# A channel's name chooses nnU-Net's normalisation.
_CHANNELS = {"acdc": "MRI", "chd": "CT"}


class Case(NamedTuple):
    """A split's files: to train nnU-Net on, to predict, and the references."""

    split: Split
    folder: Path

    @property
    def images(self) -> Path:
        """Unseen volumes by their raw names, for kafjax."""
        return self.folder / "images"

    @property
    def labels(self) -> Path:
        """Their references."""
        return self.folder / "labels"

    @property
    def raw(self) -> Path:
        """nnU-Net's raw dataset: labelled volumes in imagesTr, unseen ones in imagesTs."""
        return self.folder / "raw" / _DATASET

    def environment(self, results: Path) -> dict[str, str]:
        """nnU-Net's folders."""
        return {
            "nnUNet_raw": str(self.folder / "raw"),
            "nnUNet_preprocessed": str(self.folder / "preprocessed"),
            "nnUNet_results": str(results),
        }


def find_sources(dataset: SliceDataset, raw_dir: Path) -> dict[str, Source]:
    """The raw files of a dataset's volumes by name."""
    if dataset.num_channels > 1:
        raise UserError(f"{dataset.directory}: has several channels; expected one")
    reader = reader_of(dataset.metadata)
    if dataset.metadata["kind"] == "nnunet":
        reader = open_nnunet(raw_dir, channel=str(dataset.metadata["channel"]))
    sources, _ = reader.find(raw_dir)
    found = {source.id: source for source in sources}
    if missing := [name for name in dataset.volumes if name not in found]:
        raise UserError(f"{raw_dir}: has no file of {', '.join(missing)}")
    return found


def link_case(case: Case, sources: Mapping[str, Source], dataset: SliceDataset) -> None:
    """Links the files of a split, and describes nnU-Net's dataset.

    Raises:
      UserError: files have different endings, or labels other than 0, 1, ... that nnU-Net needs.
    """
    used = [sources[name] for name in (*case.split.train, *case.split.validation)]
    endings = {"".join(path.suffixes[-2:]) for source in used for path in source.files}
    classes = np.arange(len(dataset.classes), dtype=np.uint8)
    numbers = list(reader_of(dataset.metadata).raw_labels(classes))
    if len(endings) > 1 or numbers != list(range(len(dataset.classes))):
        raise UserError(
            f"files end in {', '.join(sorted(endings))} and their labels are {numbers}; nnU-Net "
            f"needs one ending and 0 to {len(dataset.classes) - 1}: convert them first"
        )
    ending = endings.pop()
    for name, number in (("Tr", case.split.train), ("Ts", case.split.validation)):
        for source in map(sources.__getitem__, number):
            assert source.label is not None
            _link(source.image, case.raw / f"images{name}" / f"{source.id}_0000{ending}")
            if name == "Tr":
                _link(source.label, case.raw / "labelsTr" / f"{source.id}{ending}")
            else:
                _link(source.image, case.images / source.image.name)
                _link(source.label, case.labels / source.label.name)
    kind = dataset.metadata["kind"]
    channel = _CHANNELS.get(kind, dataset.metadata.get("channel_name") or "MRI")
    description = {
        "channel_names": {"0": channel},
        "labels": {name: number for number, name in enumerate(dataset.classes)},
        "numTraining": len(case.split.train),
        "file_ending": ending,
    }
    write_text(case.raw / "dataset.json", json.dumps(description, indent=1))


def _link(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(source.resolve())
