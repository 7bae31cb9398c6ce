"""Runs in folders with odd names: every name that the system allows works; others are refused.

In each folder a dataset is prepared, a run is trained, evaluated and resumed, a scan is segmented,
and a report is written.
"""

import contextlib
import functools
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from data_prep.nifti import read_nifti
from kafjax.errors import UserError
from tests.campaigns import tiny
from tests.campaigns.campaign import Settings, Tally

_LATIN = b"\xe9t\xe9".decode(errors="surrogateescape")  # not UTF-8
NAMES = {
    "many at once": f"[copy] *?**{{0}} gs: a,b 'q\" \\n$HOME 日本🫀 {_LATIN}",
    "brackets": "project [copy]",
    "a class of characters": "[ab]",
    "an asterisk": "a*b",
    "two asterisks": "a**",
    "a question mark": "a?b",
    "spaces": " a  b ",
    "a comma": "lr=0.1,bs=4",
    "quotes": "a'b\"c",
    "a backslash": "a\\b",
    "a backslash alone": "\\",
    "a line break": "a\nb",
    "a control character": "a\x01b",
    "Japanese": "日本語",
    "a combining accent": "e\u0301",
    "from right to left": "\u202eabc",
    "an emoji": "🫀",
    "not UTF-8": _LATIN,
    "a scheme": "gs:",
    "another scheme": "s3:",
    "a percent sign": "a%20b%s",
    "braces": "{0}",
    "a variable": "$HOME",
    "a tilde": "~",
    "a dash first": "-x",
    "hidden": ".hidden",
    "as Orbax's own": "1.orbax-checkpoint-tmp",
    "255 letters": "x" * 255,
    "254 bytes of accents": "é" * 127,
}


def run(settings: Settings) -> Iterator[Tally]:
    """Each name, next to names that it matches as a pattern; and refused names."""
    raw = tiny.make_phantoms(settings.folder("paths/raw"))
    tally = Tally("runs in folders of odd names: prepared, trained, evaluated, resumed, used")
    for number, (what, name) in enumerate(list(NAMES.items())[: settings.tries(len(NAMES))]):
        parent = settings.folder(f"paths/{number}")
        for neighbour in ("a", "aXb", "copy"):
            (parent / neighbour).mkdir()
        before = set(os.listdir(parent))
        try:
            problem = use(parent / name, raw)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        if strange := set(os.listdir(parent)) - before - {name}:
            problem = problem or f"written elsewhere: {strange}"
        tally.expect(not problem, f"{what}: {problem}")
        shutil.rmtree(parent)
        jax.clear_caches()  # or a process has no mappings left for programs after some 20 runs
    yield tally
    yield _refusals(settings, raw)


def use(place: Path, raw: Path) -> str:
    """Goes through the study of a user in a folder; what was wrong, or nothing."""
    from kafjax.inference.evaluation import evaluate_run
    from kafjax.inference.prediction import predict_files
    from kafjax.report.page import report
    from kafjax.training.loop import train

    dataset = tiny.make_dataset(raw, place / "data")
    workdir, scan = place / "run", place / "scan.nii.gz"
    shutil.copy(next(raw.glob("*_image.nii.gz")), scan)
    config = tiny.segmentation_config(dataset, num_steps=1, **{"every.picture": 1})
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config, workdir)
        evaluate_run(workdir)
        config.num_steps = 2
        train(config, workdir)
        predict_files([workdir], scan, place / "labels.nii.gz")
        report([workdir], place / "report.html", data_dir=place / "data")
    if "from step 1" not in said.getvalue():
        return "not resumed"
    if read_nifti(place / "labels.nii.gz").array.shape != read_nifti(scan).array.shape:
        return "labels of another shape"
    page = (place / "report.html").read_text()
    whole = "Dice pooled over" in page and "not at hand" not in page and "no pictures" not in page
    return "" if whole else "the report lacks scores, slices or pictures"


def _refusals(settings: Settings, raw: Path) -> Tally:
    """Names that no system takes, and buckets: refused by name, and nothing is trained."""
    from kafjax.training.loop import train

    dataset = tiny.make_dataset(raw, settings.folder("paths/refused/data"))
    config = tiny.segmentation_config(dataset, num_steps=1)
    place = settings.folder("paths/refused/runs")
    tally = Tally("workdirs that cannot be: refused by name, before any work")
    workdirs: dict[str, str] = {
        "a name of 256 bytes": str(place / ("x" * 256)),
        "a path of 5000 bytes": str(place / "/".join(["x" * 99] * 50)),
        "a web address": "https://host/run",
        "a home of nobody": "~nobody-of-that-name/run",
        "a file": str(dataset / "metadata.json"),
    }
    for what, workdir in workdirs.items():
        error = _error_of(functools.partial(train, config, workdir))
        kept = not isinstance(error, UserError | OSError) or workdir[:40] not in str(error)
        trained = list(place.rglob("checkpoints"))
        tally.expect(not kept and not trained, f"{what}: {type(error).__name__}: {error} {trained}")
    return tally


def _error_of(action: Callable[[], object]) -> Exception | None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            action()
    except Exception as error:
        return error
    return None
