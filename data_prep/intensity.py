"""Intensity preparation of a volume: clipped as for CT, or left unchanged.

Either way the volume gets its mean and standard deviation, and is normalised when read. Channels
are prepared one by one.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.faults import DatasetError, Fault
from data_prep.volumes import Prepared, Volume

Intensity = Literal["ct", "zscore"]


def clip_percentiles(volume: Volume) -> Prepared:
    """Clips to the volume's 1st and 99th percentile; integer images stay integer."""
    low, high = np.percentile(volume.image, [1, 99]).tolist()
    if volume.image.dtype.kind in "iu":
        # The same as clipping and then truncating, without a float copy of the volume.
        low, high = int(low), int(high)
    clipped = np.clip(volume.image, low, high).astype(volume.image.dtype)
    constant = "is constant between its 1st and 99th percentile"
    return with_moments(dataclasses.replace(volume, image=clipped), constant=constant)


def with_moments(volume: Volume, *, constant: str = "is constant") -> Prepared:
    """Adds mean and standard deviation; `DatasetError`, worded as `constant`, if it is 0."""
    slices = np.moveaxis(volume.image, 2, 0)  # one by one, to save memory
    mean = np.mean([s.mean(dtype=np.float64) for s in slices])
    std = np.sqrt(np.mean([((s - mean) ** 2).mean() for s in slices]))
    if std == 0:
        file = Path(next(iter(volume.sha256)))
        raise DatasetError([Fault(file, constant, "leave this volume out")])
    return Prepared(volume, float(mean), float(std))


INTENSITIES: dict[Intensity, Callable[[Volume], Prepared]] = {
    "ct": clip_percentiles,
    "zscore": with_moments,
}


def prepare_channels(volume: Volume, intensities: Sequence[Intensity]) -> Prepared:
    """Prepares each channel by its own rule. Raises `DatasetError` with the file of a bad one."""
    names = list(volume.sha256)  # the channels' files come first
    parts = []
    for i, (how, image) in enumerate(zip(intensities, volume.channels, strict=True)):
        file = {names[i]: volume.sha256[names[i]]}
        parts.append(INTENSITIES[how](dataclasses.replace(volume, image=image, sha256=file)))
    prepared = dataclasses.replace(
        volume,
        image=parts[0].volume.image,
        further=tuple(part.volume.image for part in parts[1:]),
    )
    if len(parts) == 1:
        return Prepared(prepared, parts[0].mean, parts[0].std)
    means, stds = zip(*((part.mean, part.std) for part in parts), strict=True)
    return Prepared(prepared, means, stds)
