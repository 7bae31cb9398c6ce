"""What `kafjax auto` is asked for, and the reader of the scans it is given."""

from pathlib import Path
from typing import Any, NamedTuple, Self

from data_prep.folder import OwnReader, open_folder
from data_prep.nnunet import open_nnunet
from data_prep.subjects import read_subjects
from kafjax.errors import UserError
from kafjax.paths import expand

_OF_NNUNET = ("imagesTr", "imagesTs")


class Request(NamedTuple):
    """The command's arguments, as the plan records them.

    Attributes:
      images: folder of scans, or of nnU-Net's layout.
      labels: folder of their labels, None in nnU-Net's layout or without.
      subjects: table of subjects that have several scans (`data_prep.subjects`), if any.
      classes: names of the labels' numbers, ascending; none for class_<number>.
      minutes: of the whole command; None for as long as training needs, up to a night.
      estimate: whether the score is estimated by leaving labelled subjects out.
    """

    images: str
    labels: str | None = None
    subjects: str | None = None
    classes: tuple[str, ...] = ()
    minutes: float | None = None
    estimate: bool = False

    @classmethod
    def of(
        cls, images: str, labels: str | None = None, subjects: str | None = None, **options: Any
    ) -> Self:
        """A request with absolute paths."""
        folder = expand(images).resolve()
        others = [None if p is None else str(expand(p).resolve()) for p in (labels, subjects)]
        return cls(str(folder), others[0], others[1], **options)

    def fields(self) -> dict[str, Any]:
        """The request as a plan's file holds it."""
        return {**self._asdict(), "classes": list(self.classes)}

    @property
    def is_nnunet(self) -> bool:
        """Whether the images are in nnU-Net's layout."""
        return any((Path(self.images) / name).exists() for name in _OF_NNUNET)

    def check(self, output: Path) -> None:
        """Raises `UserError` listing everything wrong with the request itself."""
        faults = []
        if self.minutes is not None and not self.minutes > 0:
            faults.append(f"--minutes is {self.minutes:g}; expected more than 0")
        if self.is_nnunet and self.labels is not None:
            faults.append(f"--labels: {self.images} has nnU-Net's layout, with labels in labelsTr")
        if self.is_nnunet and self.classes:
            faults.append(f"--classes: {self.images} has nnU-Net's layout, with names of its own")
        given = {"--images": self.images, "--labels": self.labels}
        faults += [
            f"--output is the folder of {flag}; expected another one"
            for flag, place in given.items()
            if place is not None and output == Path(place)
        ]
        try:
            self.read_subjects()
        except OSError as error:
            faults.append(f"--subjects is {self.subjects}: {error.strerror}")
        except UserError as error:
            faults.append(str(error))
        if output.exists() and not output.is_dir():
            faults.append(f"--output is {output}, a file; expected a folder")
        if faults:
            raise UserError("\n".join(faults))

    def read_subjects(self) -> dict[str, str] | None:
        """The subjects of the scans, if a table names them."""
        return None if self.subjects is None else read_subjects(Path(self.subjects))

    def open_reader(self, **changes: Any) -> OwnReader:
        """The reader of the scans; `changes` are of intensity, radius and pixel spacing."""
        if self.is_nnunet:
            return open_nnunet(Path(self.images), **changes)
        labels = None if self.labels is None else Path(self.labels)
        return open_folder(Path(self.images), labels, classes=self.classes, **changes)

    def scan_folders(self) -> list[Path]:
        """The folders whose scans are segmented."""
        root = Path(self.images)
        if not self.is_nnunet:
            return [root]
        return [folder for folder in (root / name for name in _OF_NNUNET) if folder.is_dir()]
