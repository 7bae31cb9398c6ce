"""Damaged `.nii.gz` files, in preparation and in prediction."""

import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.faults import DatasetError
from data_prep.main import main as prepare
from data_prep.nifti import read_nifti
from data_prep.scan import Scan
from kafjax.errors import UserError
from tests.campaigns import tiny
from tests.campaigns.campaign import Settings, Tally
from tests.campaigns.damage import DAMAGES

USUAL = 100
# Most are flips, the fault that readers miss.
_KINDS = ("flip", "flip", "flip", "flip", "flip", "flip", *sorted(DAMAGES), "stored", "wrapped")


def make_damaged(folder: Path, original: Path, rng: np.random.Generator, count: int) -> list[Path]:
    """Damaged copies `ct_5000_image...`, with sound labels, and one sound volume, `ct_1`."""
    label = original.with_name(original.name.replace("image", "label"))
    _copy(original, folder / "ct_1_image.nii.gz")
    _copy(label, folder / "ct_1_label.nii.gz")
    damaged = []
    for i in range(count):
        stem, kind = f"ct_{5000 + i}", _KINDS[i % len(_KINDS)]
        content = original.read_bytes()
        path = folder / f"{stem}_image.nii.gz"
        if kind == "stored":  # not compressed, though its name says so
            content = gzip.decompress(content)
        elif kind == "wrapped":  # compressed, though its name does not say so
            path = folder / f"{stem}_image.nii"
        else:
            content = DAMAGES[kind](content, rng)
        path.write_bytes(content)
        _copy(label, folder / f"{stem}_label.nii.gz")
        damaged.append(path)
    return damaged


def run_preparation(settings: Settings) -> Iterator[Tally]:
    """All damaged files of a folder are named in one pass, and no sound one."""
    rng = settings.generator("volumes")
    raw = tiny.make_phantoms(settings.folder("volumes/raw"), 1)
    original = next(raw.glob("*_image.nii.gz"))
    folder = settings.folder("volumes/damaged")
    damaged = make_damaged(folder, original, rng, settings.tries(USUAL))
    status, errors = tiny.call_command(
        prepare, "--dataset", "chd", "--raw_dir", folder, "--check", "--num_workers", 0
    )
    tally = Tally("damaged .nii.gz in preparation")
    for path in damaged:
        tally.add(*_judge(path, original, _lines_about(errors, path)))
    if status != 2:
        tally.add("unclear", f"exit status {status}")
    if lines := _lines_about(errors, folder / "ct_1_image.nii.gz"):
        tally.add("unclear", f"a sound file is refused: {lines}")
    yield tally


def run_prediction(settings: Settings) -> Iterator[Tally]:
    """All damaged scans of a folder are named, none is segmented, and the sound one is."""
    from kafjax.inference.prediction import predict_files

    rng = settings.generator("prediction")
    raw = tiny.make_phantoms(settings.folder("prediction/raw"))
    dataset = tiny.make_dataset(raw, settings.folder("prediction/data"))
    workdir, output = settings.folder("prediction/run"), settings.scratch / "prediction/output"
    tiny.make_run(workdir, dataset)
    original = next(raw.glob("*_image.nii.gz"))
    folder = settings.folder("prediction/damaged")
    damaged = make_damaged(folder, original, rng, settings.tries(USUAL))
    tally, errors = Tally("damaged .nii.gz in prediction"), ""
    try:
        predict_files([workdir], folder, output)
    except UserError as error:
        errors = str(error)
    written = {path.name for path in output.glob("*.nii*")}
    for path in damaged:
        outcome, what = _judge(path, original, _lines_about(errors, path))
        if outcome == "caught" and path.name in written:
            outcome, what = "silent", f"{path.name} was named and segmented all the same"
        tally.add(outcome, what)
    tally.expect("ct_1_image.nii.gz" in written, "the sound scan was not segmented")
    yield tally


def _judge(path: Path, original: Path, lines: list[str]) -> tuple[str, str]:
    """How a damaged file was taken: what was said of it, or else what is read of it."""
    said = [line for line in lines if "has the same values as" not in line]
    if said:
        return "caught", ""
    try:
        found = read_nifti(path)
    except DatasetError as error:
        return "unclear", f"{path.name} is not named: {error}"
    return ("harmless", "") if _same(found, read_nifti(original)) else ("silent", path.name)


def _same(a: Scan, b: Scan) -> bool:
    arrays = ((a.array, b.array), (a.affine, b.affine))
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in arrays)


def _lines_about(errors: str, path: Path) -> list[str]:
    return [line for line in errors.splitlines() if f"{path}:" in line]


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
