"""Files that would run code or write elsewhere: nothing is executed, nothing outside is touched.

A payload that is executed makes a marker; what lies outside the folder that a command may write to
is compared before and after.
"""

import contextlib
import gzip
import io
import json
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ml_collections
import numpy as np

from data_prep.main import main as prepare
from kafjax.configs import phantom_pretrain
from kafjax.data.dataset import SliceDataset
from kafjax.data.records import INDEX_NAME
from kafjax.errors import UserError
from tests.campaigns import tiny
from tests.campaigns.campaign import Settings, Tally
from tests.campaigns.checkpoints import make_state, open_checkpointer, save_run


class _Payload:
    """Makes a marker when it is unpickled."""

    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self._marker,))


class _Place:
    """A fresh raw folder, dataset and run for each try, and what must not be touched."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.marker = folder / "executed"
        self.outside = folder / "outside"
        self.inside = folder / "inside"
        self.raw = tiny.make_phantoms(folder / "raw", 2)
        self._good = tiny.make_dataset(self.raw, folder / "good")
        self._run = save_run(folder / "run")
        self.shards = {path.name for path in self._good.glob("*.tfrecord*")}

    def begin(self) -> None:
        """Makes everything anew."""
        for path in (self.outside, self.inside):
            shutil.rmtree(path, ignore_errors=True)
        self.outside.mkdir()
        (self.outside / "precious").write_text("precious")
        shutil.copytree(self._good, self.dataset)
        shutil.copytree(self._run, self.workdir)
        shutil.copytree(self.raw, self.scans)

    @property
    def dataset(self) -> Path:
        """Prepared."""
        return self.inside / "data" / "phantom" / "1.0.0"

    @property
    def workdir(self) -> Path:
        """With checkpoints."""
        return self.inside / "run"

    @property
    def scans(self) -> Path:
        """Raw, in the CHD layout."""
        return self.inside / "raw"

    def pickled(self) -> bytes:
        """A pickle that makes the marker."""
        return pickle.dumps(_Payload(self.marker))

    def with_objects(self) -> bytes:
        """An .npz whose array is such a pickle."""
        stream = io.BytesIO()
        np.savez(stream, weight=np.array([_Payload(self.marker)], dtype=object))
        return stream.getvalue()

    def archive(self) -> bytes:
        """A zip with a file that would be written to `outside`."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr("../outside/evil", "evil")
            file.writestr("archive/data.pkl", self.pickled())
        return stream.getvalue()

    def tar(self) -> bytes:
        """The same as tar."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as file:
            member = tarfile.TarInfo("../outside/evil")
            member.size = 4
            file.addfile(member, io.BytesIO(b"evil"))
        return stream.getvalue()


def _import(content: Callable[[_Place], bytes], name: str) -> Callable[[_Place], object]:
    """Gives a file to the import of PyTorch checkpoints."""

    def attempt(place: _Place) -> object:
        from kafjax.torch_import import import_checkpoint

        (place.inside / name).write_bytes(content(place))
        config: ml_collections.ConfigDict = phantom_pretrain.get_config()
        import_checkpoint(place.inside / name, config, place.inside / "imported")
        return None

    return attempt


def _as_scan(content: Callable[[_Place], bytes]) -> Callable[[_Place], object]:
    """Gives it as a scan, compressed as scans are."""

    def attempt(place: _Place) -> object:
        next(place.scans.glob("*_image.nii.gz")).write_bytes(gzip.compress(content(place)))
        arguments = ("--dataset", "chd", "--raw_dir", place.scans, "--check", "--num_workers", 0)
        _raise(*tiny.call_command(prepare, *arguments))
        return None

    return attempt


def _in_dataset(name: str, content: Callable[[_Place], bytes]) -> Callable[[_Place], object]:
    """Places it as a file of a prepared dataset, and reads the whole dataset."""

    def attempt(place: _Place) -> object:
        path = next(place.dataset.glob(name))
        path.write_bytes(content(place))
        if path.name != INDEX_NAME:  # or the index would give the change away
            (place.dataset / INDEX_NAME).unlink()
        dataset = SliceDataset(place.dataset)
        return [dataset.read(i, with_label=True) for i in range(len(dataset.reader))]

    return attempt


def _in_run(name: str, content: Callable[[_Place], bytes]) -> Callable[[_Place], object]:
    """Gives it as every file of that name in a run's checkpoints, from which is resumed."""

    def attempt(place: _Place) -> object:
        for path in list(place.workdir.rglob(name)):
            if path.is_file():
                path.write_bytes(content(place))
        with open_checkpointer(place.workdir) as checkpointer:
            return checkpointer.restore_latest(make_state(0))

    return attempt


def _foreign_feature(place: _Place) -> object:
    """Features of a class in a module that would be imported."""
    (place.inside / "evil_features.py").write_text(f"open({str(place.marker)!r}, 'w').close()")
    content = (place.dataset / "features.json").read_text()
    ours = "tensorflow_datasets.core.features.scalar.Scalar"
    assert ours in content
    sys.path.insert(0, str(place.inside))
    try:
        return _in_dataset(
            "features.json", lambda _: content.replace(ours, "evil_features.Scalar").encode()
        )(place)
    finally:
        sys.path.remove(str(place.inside))


def _outside_shards(place: _Place) -> object:
    """Shards that are said to lie elsewhere, by a relative path."""
    for path in place.dataset.glob("*.tfrecord*"):
        shutil.move(path, place.outside / path.name)
    content = (place.dataset / "dataset_info.json").read_text()
    content = content.replace("{DATASET}-", "../../../../outside/{DATASET}-")
    return _in_dataset("dataset_info.json", lambda _: content.encode())(place)


def _outside_name(place: _Place) -> None:
    """A dataset whose name leads elsewhere."""
    arguments: tuple[object, ...] = ("--dataset", "chd", "--raw_dir", place.scans)
    arguments += ("--data_dir", place.inside / "new")
    arguments += ("--name", "../../outside/x", "--num_workers", 0)
    _raise(*tiny.call_command(prepare, *arguments))


def _outside_ending(place: _Place) -> None:
    """An nnU-Net description whose ending leads elsewhere."""
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "../../outside/x": 1},
        "file_ending": "/../../outside/x.nii.gz",
    }
    (place.scans / "dataset.json").write_text(json.dumps(description))
    arguments = ("--dataset", "nnunet", "--raw_dir", place.scans, "--num_workers", 0)
    _raise(*tiny.call_command(prepare, *arguments, "--data_dir", place.inside / "new"))


def _linked_step(place: _Place) -> object:
    """A step that is a link to elsewhere, and damaged there, so that it is moved aside."""
    step = place.workdir / "checkpoints" / "3"
    shutil.move(step, place.outside / "3")
    (place.outside / "3" / "meta" / "metadata").write_text("{}")
    step.symlink_to(place.outside / "3")
    with open_checkpointer(place.workdir) as checkpointer:
        restored = checkpointer.restore_latest(make_state(0))
        assert restored is not None
        for number in range(4, 8):
            state = make_state(number)
            checkpointer.save(number, state, metrics={"loss": 0.1}, data={"step": number})
    refused = restored[1] == {"step": 2}
    if refused:
        raise UserError("the linked step was not accepted")
    return restored


ATTEMPTS: dict[str, Callable[[_Place], object]] = {
    "a pickle as .pth": _import(_Place.pickled, "evil.pth"),
    "a zip with a pickle and a path outside as .pth": _import(_Place.archive, "evil.pth"),
    "a tar with a path outside as .pth": _import(_Place.tar, "evil.pth"),
    "an .npz with objects as .pth": _import(_Place.with_objects, "evil.npz"),
    "a pickle as scan": _as_scan(_Place.pickled),
    "an .npz with objects as scan": _as_scan(_Place.with_objects),
    "a zip with a path outside as scan": _as_scan(_Place.archive),
    "a tar with a path outside as scan": _as_scan(_Place.tar),
    "a pickle as shard": _in_dataset("*.tfrecord*", _Place.pickled),
    "a pickle as index": _in_dataset(INDEX_NAME, _Place.pickled),
    "a pickle as metadata": _in_dataset("metadata.json", _Place.pickled),
    "an .npz with objects as shard": _in_dataset("*.tfrecord*", _Place.with_objects),
    "features of a foreign module": _foreign_feature,
    "shards that lie elsewhere": _outside_shards,
    "a pickle as checkpoint's description": _in_run("metadata", _Place.pickled),
    "a pickle as checkpoint's arrays": _in_run("*", _Place.pickled),
    "an .npz with objects as checkpoint's arrays": _in_run("manifest.ocdbt", _Place.with_objects),
    "a pickle as a run's config": _in_run("config.json", _Place.pickled),
    "a dataset's name with a path outside": _outside_name,
    "an nnU-Net description with paths outside": _outside_ending,
    "a checkpoint that is a link to elsewhere": _linked_step,
}
# What these give is read all the same, without what was hostile.
_MENDED = ("a pickle as index",)


def run(settings: Settings) -> Iterator[Tally]:
    """Each attempt is refused by an error that is a user's, and leaves no trace."""
    place = _Place(settings.folder("hostile"))
    tally = Tally("pickles, .pth, .npz with objects, paths that point outside")
    for name, attempt in ATTEMPTS.items():
        place.begin()
        refused, problem = False, ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                attempt(place)
        except (UserError, OSError):
            refused = True
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if place.marker.exists():
            place.marker.unlink()
            tally.add("silent", f"{name}: executed")
        elif trace := _trace(place):
            tally.add("silent", f"{name}: {trace}")
        elif problem:
            tally.add("unclear", f"{name}: {problem}")
        else:
            tally.expect(refused or name in _MENDED, f"{name}: accepted", otherwise="silent")
    yield tally


def _trace(place: _Place) -> str:
    """What has changed outside."""
    if (place.outside / "precious").read_text() != "precious":
        return "a file outside was changed"
    ours = {"precious", "3", *place.shards}
    foreign = [path.name for path in place.outside.iterdir() if path.name not in ours]
    return f"written outside: {', '.join(foreign)}" if foreign else ""


def _raise(status: int, errors: str) -> None:
    if status == 2 and "Traceback" not in errors:
        raise UserError(errors)
