"""The CHD dataset's raw layout and rules (Yang et al., NeurIPS 2023, appendix; Xu et al., 2019)."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from data_prep.entries import list_entries, unused_folder
from data_prep.faults import Fault
from data_prep.intensity import clip_percentiles
from data_prep.volumes import Prepared, Reader, Source, Volume

_PHANTOMS = "phantom.json"  # how the phantoms in the folder were made


class ChdReader(Reader):
    """Congenital heart disease CT: `ct_1001_image.nii.gz` next to `ct_1001_label.nii.gz`."""

    kind = "chd"
    classes = (
        "background",
        "left_ventricle",
        "right_ventricle",
        "left_atrium",
        "right_atrium",
        "myocardium",
        "aorta",
        "pulmonary_artery",
    )
    radius = 20

    _NAME = re.compile(r"ct_(\d+)_(image|label)\.nii(\.gz)?")
    _EXPECTED = "ct_<number>_image.nii.gz and ct_<number>_label.nii.gz"

    def find(self, raw_dir: Path) -> tuple[list[Source], list[Fault]]:
        """Pairs images and labels by number; numbers may have gaps."""
        if not raw_dir.is_dir():
            return [], [Fault(raw_dir, "is not a folder", "give the folder of the raw volumes")]
        files: dict[tuple[int, str], list[Path]] = defaultdict(list)
        entries = list_entries(raw_dir, used=(_PHANTOMS,))
        faults = [*entries.faults]
        faults += [unused_folder(path, self._EXPECTED) for path in entries.folders]
        for path in entries.scans:
            if match := self._NAME.fullmatch(path.name):
                files[int(match[1]), match[2]].append(path)
            else:
                remedy = f"rename it to {self._EXPECTED}, or move it away"
                faults.append(Fault(path, "its name does not fit this layout", remedy))
        if not entries.scans:
            faults.append(Fault(raw_dir, "holds no volume", f"expected {self._EXPECTED}"))
        sources, faults = self._pair(files, faults)
        return [source for source in sources if not entries.broken & {*source.files}], faults

    def _pair(
        self, files: dict[tuple[int, str], list[Path]], faults: list[Fault]
    ) -> tuple[list[Source], list[Fault]]:
        sources = []
        for number in sorted({number for number, _ in files}):
            images, labels = files.get((number, "image"), []), files.get((number, "label"), [])
            for extra in images[1:] + labels[1:]:
                faults.append(
                    Fault(extra, f"is a second file of ct_{number}", "move one of them away")
                )
            if not images or not labels:
                path, missing = (images or labels)[0], "label" if images else "image"
                remedy = f"add ct_{number}_{missing}.nii.gz, or move this file away"
                faults.append(Fault(path, f"has no {missing} next to it", remedy))
            for image in images[:1]:
                sources.append(Source(f"ct_{number}", image, labels[0] if labels else None))
        return sources, faults

    def reach(self, num_slices: int) -> int:
        """5 % of the slices."""
        return max(1, num_slices // 20)

    def map_labels(self, raw: np.ndarray) -> np.ndarray:
        """Maps raw labels above 7, which the method does not segment, to background."""
        return np.where(raw < len(self.classes), raw, 0).astype(np.uint8)

    def prepare(self, volume: Volume) -> Prepared:
        """Clips to the volume's 1st and 99th percentile."""
        return clip_percentiles(volume)
