"""Segments raw volumes with trained runs; labels come on the source's grid, in its format.

    kafjax predict --workdir RUN[,RUN2...] --input SCAN|FOLDER --output PATH|FOLDER

A volume is prepared like the training volumes of its dataset: the same intensities, grid and
keypoints. Class probabilities are averaged over several runs, such as folds, and mirrored slices.
Labels and probabilities are mapped back to the source's grid and axis order, so that they overlay
the source in any viewer (`kafjax.inference.label_files`).

Volumes are [row, col, slice], reoriented by `data_prep.nifti`, spacing in mm in that order;
keypoints are (row, col). `d` is the number of classes. Needs the extra `data`.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from scipy import ndimage

from data_prep import sift
from data_prep.entries import file_stem
from data_prep.faults import DatasetError, findings_text
from data_prep.formats import notes, open_grid
from data_prep.nifti import from_slices
from data_prep.readers import reader_of
from data_prep.volumes import Prepared, Reader, Volume
from kafjax.cores import usable_cores
from kafjax.data.dataset import add_context
from kafjax.errors import UserError
from kafjax.files import printable
from kafjax.inference.evaluation import rules_of_run
from kafjax.inference.label_files import (
    Classes,
    write_descriptions,
    write_labels,
    write_probabilities,
)
from kafjax.inference.model_file import is_model, read_model
from kafjax.inference.postprocessing import Rules, clear_up, common_rules
from kafjax.inference.prediction_files import Request, list_requests
from kafjax.inference.predictor import Predictor, View, load_predictor
from kafjax.inference.uncertainty import FILE, Meter, add_to_table, check_exclusive
from kafjax.paths import expand
from kafjax.regions import most_probable, regions_of
from kafjax.workdir.preparation import Preparation, check_alike, read_preparation
from kafjax.workdir.workdir import Workdir

# Axes of a slice that test-time mirroring flips.
_MIRRORS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (0, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class VolumePredictor:
    """Trained networks, and the preparation of volumes for them.

    Attributes:
      predictors: of one or more runs; their probabilities are averaged.
      preparation: of the runs' dataset, see `kafjax.workdir.preparation`.
      mirror: also average over each slice's three mirror images; four times the work.
      rules: of post-processing, those that all runs have.
    """

    predictors: tuple[Predictor, ...]
    preparation: Preparation
    mirror: bool = False
    rules: Rules = dataclasses.field(default_factory=dict)

    def clear_up(self, labels: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """Classes [row, col, slice] after post-processing; `spacing` is mm along each axis."""
        if not self.rules:
            return labels
        return clear_up(labels, self.rules, self.reader.classes[1:], float(np.prod(spacing)))

    @property
    def reader(self) -> Reader:
        """The rules of the runs' dataset."""
        return reader_of(self.preparation)


def load_volume_predictor(
    workdirs: Sequence[str | os.PathLike[str]],
    *,
    step: int | str | None = None,
    mirror: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
) -> VolumePredictor:
    """Loads the networks of one or several segmentation runs for raw volumes.

    Args:
      workdirs: of the runs, or packed models.
      step: of the checkpoints, several as '200,300'; by default each run's best by validation.
      mirror: see `VolumePredictor`.
      data_dir: folder of the runs' dataset, if it has moved and the workdirs do not describe it.
      batch_size: see `kafjax.inference.predictor.Predictor`.

    Raises:
      ValueError: no workdir, one that is not a segmentation run's, or runs with differently
        prepared datasets.
    """
    preparation = _read_preparations(workdirs, data_dir)
    predictors: list[Predictor] = []
    rules: list[Rules] = []
    for workdir in workdirs:
        if is_model(workdir):
            if step is not None:
                raise UserError(f"{workdir}: a packed model has one checkpoint; leave --step out")
            model = read_model(workdir)
            predictors += model.predictors(batch_size=batch_size)
            rules += model.rules
            continue
        for of_run in step.split(",") if isinstance(step, str) else [step]:
            predictors.append(load_predictor(workdir, step=of_run, batch_size=batch_size))
            rules.append(rules_of_run(Workdir(workdir), predictors[-1], data_dir=data_dir))
    return VolumePredictor(tuple(predictors), preparation, mirror, common_rules(rules))


def predict_volume(
    array: np.ndarray,
    spacing: tuple[float, float, float],
    predictor: VolumePredictor,
    *,
    volume_id: str = "volume",
) -> np.ndarray:
    """Segments a raw volume.

    Args:
      array: [row, col, slice] of raw integers or floats, not normalised; for
        axial slices rows run to the back, columns to the left and slices to the head. Of runs that
        see several channels, [row, col, slice, channel].
      spacing: mm between rows, columns and slices.
      predictor: of `load_volume_predictor`.
      volume_id: selects keypoints, with the dataset's seed, if there are too many.

    Returns:
      Classes uint8 [row, col, slice].

    Raises:
      ValueError: the array has other dimensions or channels, is not finite, or is constant.
    """
    volume = _as_volume(array, spacing, volume_id, predictor.reader.num_channels)
    found = [
        most_probable(p, predictor.preparation) for p in slice_probabilities(volume, predictor)
    ]
    return predictor.clear_up(np.stack(found, axis=-1), spacing)


def slice_probabilities(volume: Volume, predictor: VolumePredictor) -> Iterator[np.ndarray]:
    """Probabilities float32 [row, col, d] of each slice of a raw volume, on its own grid.

    They are of the classes, or of the regions if the dataset has some.

    Raises `DatasetError` immediately for a volume that cannot be prepared.
    """
    prepared = predictor.reader.prepare(volume)
    views = prepare_views(prepared, predictor.preparation)
    rows, columns, _ = volume.image.shape
    return (_on_grid(p, (rows, columns)) for p in _average(views, predictor))


def prepare_views(prepared: Prepared, preparation: Preparation) -> list[View]:
    """The network's input for each slice, identical to that from the dataset's records.

    The context is not there yet: it depends on the network.
    """
    volume, places = prepared.volume, preparation["max_keypoints"]
    keypoint_image = reader_of(preparation).keypoint_image(volume)

    def view(i: int) -> View:
        found = sift.find_keypoints(
            keypoint_image[:, :, i],
            max_keypoints=places,
            selection=preparation["keypoint_selection"],
            rng=sift.slice_generator(preparation["seed"], volume.id, i),
        ).positions.astype(np.int32)
        image = volume.slice(i)
        normalised = np.subtract(image, np.asarray(prepared.mean, np.float32), dtype=np.float32)
        normalised /= np.asarray(prepared.std, np.float32)
        keypoints = np.pad(found, ((0, places - len(found)), (0, 0)))
        return normalised, keypoints, np.arange(places) < len(found)

    with ThreadPoolExecutor(len(usable_cores())) as threads:  # OpenCV lets other threads run
        return list(threads.map(view, range(volume.image.shape[2])))


def predict_file(
    request: Request, predictor: VolumePredictor, *, title: str = "", keep_header: bool = False
) -> None:
    """Segments a scan; writes labels and, if requested, probabilities and uncertainty.

    Shows progress by slice under `title`; `keep_header` is as in `kafjax.inference.label_files`.
    Raises `DatasetError` for an unusable file and `OSError` if results cannot be written.
    """
    reader = predictor.reader
    volume = reader.read(request.source)
    _note_plane(request.source.image, volume, predictor)
    rows, columns, num_slices = volume.image.shape
    labels = np.empty((rows, columns, num_slices), np.uint8)
    kept = None
    if request.probabilities is not None:  # by far the larger
        count = len(regions_of(predictor.preparation)) or len(reader.classes)
        kept = np.empty((*labels.shape, count), np.float32)
    meter, entropy = Meter(len(reader.classes)), np.empty(labels.shape, np.float32)
    slices = tqdm.tqdm(
        slice_probabilities(volume, predictor),
        desc=title,
        total=num_slices,
        unit="slice",
        disable=None,
    )
    for i, probabilities in enumerate(slices):
        labels[:, :, i] = most_probable(probabilities, predictor.preparation)
        if kept is not None:
            kept[:, :, i] = probabilities
        if request.uncertainty is not None:
            entropy[:, :, i] = meter.add(probabilities)
    labels = reader.raw_labels(predictor.clear_up(labels, volume.spacing))
    scan, grid = request.source.image, open_grid(request.source.image)
    of_scan: dict[str, Any] = {"scan": scan, "grid": grid, "keep_header": keep_header}
    plane = reader.plane(grid.affine)
    # Labels last: their presence means that everything is written.
    if request.probabilities is not None and kept is not None:
        kept = from_slices(kept, grid.affine, plane)
        write_probabilities(request.probabilities, kept, **of_scan)
    if request.uncertainty is not None:
        write_probabilities(
            request.uncertainty, from_slices(entropy, grid.affine, plane), **of_scan
        )
        numbers = dict(zip(reader.classes[1:], meter.numbers(), strict=True))
        add_to_table(request.labels.with_name(FILE), file_stem(request.labels), numbers)
    labels = from_slices(labels, grid.affine, plane)
    write_labels(request.labels, labels, classes=classes_of(reader), **of_scan)


def classes_of(reader: Reader) -> Classes:
    """The foreground classes of a dataset, with the numbers that its label files have."""
    numbers = reader.raw_labels(np.arange(len(reader.classes), dtype=np.uint8))
    return Classes(tuple(reader.classes[1:]), tuple(numbers[1:].tolist()))


def _note_plane(path: Path, volume: Volume, predictor: VolumePredictor) -> None:
    """Reports a scan whose slice plane differs from all training volumes'."""
    seen = predictor.preparation.get("planes")
    if predictor.reader.one_plane and seen and volume.plane not in seen:
        print(
            f"note: {printable(path)}: is cut in {volume.plane} slices; the runs were trained on "
            f"{' and '.join(seen)} ones and may fail on it",
            file=sys.stderr,
            flush=True,
        )


def predict_files(
    workdirs: Sequence[str | os.PathLike[str]],
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    probabilities: bool = False,
    uncertainty: bool = False,
    mirror: bool = False,
    step: int | str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
    ending: str | None = None,
    keep_header: bool = False,
    label_text: str | os.PathLike[str] | None = None,
) -> None:
    """Segments a scan, or all in a folder, and prints the written files.

    Args:
      workdirs: of the runs, or packed models; see `load_volume_predictor`, also for `step`,
        `data_dir` and `batch_size`.
      source: a file, a DICOM series' folder or one of its files, or a folder of scans; `~` is the
        home folder.
      target: the labels' file, or a folder for files named like the sources.
      probabilities: also write float32 [x, y, z, d], as `<name>_probabilities.nii.gz`.
      uncertainty: also write `<name>_uncertainty.nii.gz` and, for all, `uncertainty.csv`; see
        `kafjax.inference.uncertainty`.
      mirror: see `VolumePredictor`.
      overwrite: replace existing results instead of skipping them.
      ending: of labels in a folder, such as `.seg.nrrd`; by default of the scan's format.
      keep_header: see `kafjax.inference.label_files`.
      label_text: also write the classes to this file, as ITK-SNAP reads them.

    Raises:
      ValueError: a mistake in the arguments; uncertainty of regions; or entries that are not
        usable scans, all listed after the others have been written.
    """
    preparation = _read_preparations(workdirs, data_dir)
    if uncertainty:
        check_exclusive(preparation, "uncertainty")
    source, target = map(expand, (source, target))
    requests, left_out = list_requests(
        source,
        target,
        preparation,
        probabilities=probabilities,
        uncertainty=uncertainty,
        ending=ending,
    )
    todo = [request for request in requests if overwrite or not request.done]
    if len(todo) < len(requests):
        print(f"Skipped {len(requests) - len(todo)} of {len(requests)} files: results exist.")
    # Files next to a series, such as localizers, leave no scan out.
    inside = [fault for fault in left_out if not fault.stops and fault.path.parent != source]
    faults = [f"  {fault}" for fault in left_out if fault not in inside]
    if len(requests) == 1 and requests[0].source.image == source:
        inside += notes(source)
    for line in findings_text(inside):
        print(f"note: {printable(line)}", file=sys.stderr, flush=True)
    if label_text is not None:
        write_descriptions(expand(label_text), classes_of(reader_of(preparation)))
    if todo:
        predictor = load_volume_predictor(
            workdirs, step=step, mirror=mirror, data_dir=data_dir, batch_size=batch_size
        )
        for number, request in enumerate(todo, start=1):
            try:
                predict_file(
                    request,
                    predictor,
                    title=f"{number}/{len(todo)} {request.source.image.name}",
                    keep_header=keep_header,
                )
            except DatasetError as error:
                faults += [f"  {fault}" for fault in str(error).splitlines()]
                faulty = printable(request.source.image)
                print(f"{faulty}: could not be predicted, continuing", flush=True)
            else:
                print(f"Wrote {printable(request.labels)}", flush=True)
    if faults:
        raise UserError("\n".join(["these files could not be predicted:", *faults]))


def _read_preparations(
    workdirs: Sequence[str | os.PathLike[str]], data_dir: str | os.PathLike[str] | None
) -> Preparation:
    if not workdirs:
        raise UserError("no run is given; expected --workdir of one or several, or --model")
    found = {
        os.fspath(w): read_model(w).preparation
        if is_model(w)
        else read_preparation(w, data_dir=data_dir)
        for w in workdirs
    }
    check_alike(found)
    return next(iter(found.values()))


def _as_volume(
    array: np.ndarray, spacing: tuple[float, float, float], volume_id: str, num_channels: int = 1
) -> Volume:
    shape, expected = array.shape, "[row, col, slice]"
    if num_channels > 1:
        expected = f"[row, col, slice, channel] of {num_channels} channels"
    elif array.ndim == 3:
        array = array[..., None]
    if (
        array.ndim != 4
        or array.shape[3] != num_channels
        or 0 in array.shape
        or array.dtype.kind not in "iuf"
    ):
        raise UserError(
            f"the volume is {array.dtype} of shape {shape}; expected integers or floats, {expected}"
        )
    if len(spacing) != 3 or not all(np.isfinite(mm) and mm > 0 for mm in spacing):
        raise UserError(f"spacing is {spacing}; expected mm between rows, columns and slices")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)  # as for files of floats
        if not np.isfinite(array).all():
            raise UserError("the volume has values that are NaN or infinite")
    elif array.dtype.itemsize == 8:
        narrow = np.abs(array).max() <= np.iinfo(np.int32).max
        array = array.astype(np.int32 if narrow else np.float32)
    # A preparation fault names the volume as it would name a file.
    first, *further = np.moveaxis(array, -1, 0)
    names = [volume_id, *(f"{volume_id}, channel {i + 1}" for i in range(len(further)))]
    return Volume(
        volume_id,
        first,
        None,
        spacing,
        np.diag([*spacing, 1.0]),
        dict.fromkeys(names, ""),
        further=tuple(further),
    )


def _average(views: list[View], predictor: VolumePredictor) -> Iterator[np.ndarray]:
    """Each slice's probabilities [h, w, d], the mean over mirror images and networks."""
    mirrors = _MIRRORS if predictor.mirror else _MIRRORS[:1]
    seen: dict[int, list[View]] = {}  # by networks of each context
    for context in {network.context for network in predictor.predictors}:
        images = add_context([image for image, _, _ in views], context)
        seen[context] = [
            _mirror((image, keypoints, mask), axes)
            for image, (_, keypoints, mask) in zip(images, views, strict=True)
            for axes in mirrors
        ]
    streams = [network.probabilities(seen[network.context]) for network in predictor.predictors]
    for _ in views:
        parts = [np.flip(next(stream), axes) for axes in mirrors for stream in streams]
        yield np.mean(parts, axis=0)


def _mirror(view: View, axes: tuple[int, ...]) -> View:
    image, keypoints, mask = view
    moved = keypoints.copy()
    for axis in axes:
        moved[:, axis] = image.shape[axis] - 1 - moved[:, axis]
    return np.flip(image, axes), moved, mask


def _on_grid(probabilities: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Undoes in-plane resampling, linearly, in the convention of `data_prep.resampling`."""
    if probabilities.shape[:2] == size:
        return probabilities
    factors = [to / n for to, n in zip(size, probabilities.shape[:2], strict=True)]
    return ndimage.zoom(probabilities, (*factors, 1), order=1, mode="nearest", grid_mode=True)
