"""`kafjax prepare`: prepares a raw dataset for training, or phantoms to try things on.

Exit status: 0 done or already done; 2 a mistake in the command or in the raw files, one line per
fault; 1 the disk or memory ran out: rerun the command to resume; 70 a fault of kafjax.
With `--check` nothing is prepared: 0 the raw files are sound, 2 they have faults.
"""

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kafjax.errors import FAULT, MISTAKE, UserError, describe_fault, require_extra

if __name__ == "__main__":
    require_extra("data")  # before the imports that need it

from data_prep.acdc import PIXEL, AcdcReader
from data_prep.builder import Options
from data_prep.check import as_json, as_text, survey_dataset
from data_prep.faults import DatasetError, Fault, findings_text, refuse
from data_prep.flags import make_parser, refuse_stray
from data_prep.folder import FolderReader, open_folder
from data_prep.nnunet import NnunetReader, open_nnunet
from data_prep.phantom.subjects import write_subjects
from data_prep.prepare import PreparationError, Summary, prepare_dataset
from data_prep.readers import READERS
from data_prep.subjects import read_subjects
from data_prep.volumes import Reader
from kafjax.buckets import BucketError, send, show
from kafjax.cluster import open_cluster
from kafjax.files import show_any_name, write_text
from kafjax.paths import data_folder, with_buckets

_LONGEST_NAME = 60  # the name is part of file names


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    show_any_name()
    arguments = make_parser().parse_args(argv)
    kept = "" if arguments.check else "; volumes already finished are kept"
    try:
        refuse_stray(arguments)
        with with_buckets():
            _run(arguments)
    except DatasetError as error:
        _note(fault for fault in error.faults if not fault.stops)
        return _report("\n".join(str(fault) for fault in error.faults if fault.stops), MISTAKE)
    except PreparationError as error:
        hint = "run the same command again, with a smaller --num_workers if memory ran out"
        return _report(f"{error}\n{hint}{kept}", 1)
    except UserError as error:
        return _report(error, MISTAKE)
    except BucketError as error:
        return _report(f"{error}{kept}", 1)
    except OSError as error:
        # The error of a full disk does not name its file.
        where = error.filename or arguments.data_dir
        return _report(f"{where}: {error.strerror or error}{kept}", 1)
    except KeyboardInterrupt:
        return _report(f"stopped{'; rerun the command to resume' if kept else ''}", 130)
    except Exception as error:
        print(describe_fault(error), file=sys.stderr, flush=True)
        return FAULT
    return 0


def _report(message: object, status: int) -> int:
    for line in show(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return status


def _note(findings: Iterable[Fault]) -> None:
    for line in findings_text(findings):
        print(f"note: {show(line)}", file=sys.stderr)


def _run(arguments: argparse.Namespace) -> None:
    options = Options(
        max_keypoints=arguments.max_keypoints,
        keypoint_selection=arguments.keypoint_selection,
        seed=arguments.seed,
    )
    if arguments.num_workers < 0:
        raise UserError(f"num_workers is {arguments.num_workers}; expected 0 or more")
    if arguments.cluster is not None:
        _absolute(arguments)
    name, raw_dir = _name(arguments), _raw_dir(arguments)
    if not arguments.check:
        data_folder(arguments.data_dir, name)  # of a bucket
    if arguments.dataset == "phantom" and not arguments.check:
        _write_phantoms(raw_dir, arguments)
    reader = _reader(arguments, raw_dir)
    with _cluster(arguments) as client:
        if arguments.check:
            _check(reader, raw_dir, arguments, client)
            return
        summary = prepare_dataset(
            reader,
            raw_dir,
            arguments.data_dir,
            name=name,
            options=options,
            num_workers=arguments.num_workers,
            client=client,
            overwrite=arguments.overwrite,
            strict=arguments.strict,
            subjects=_subjects(arguments),
        )
    _note(summary.findings)
    send(arguments.data_dir)
    print(show(_describe(summary, name, reader, options)))


def _absolute(arguments: argparse.Namespace) -> None:
    """Makes paths absolute, which workers elsewhere need."""
    for name in ("raw_dir", "data_dir", "labels"):
        if (path := getattr(arguments, name)) is not None:
            setattr(arguments, name, path.absolute())


def _cluster(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    if arguments.cluster is None:
        return contextlib.nullcontext()
    return open_cluster(arguments.cluster, [{}] * max(1, arguments.num_workers))


def _check(reader: Reader, raw_dir: Path, arguments: argparse.Namespace, client: Any) -> None:
    """Prints the survey of the raw folder and its findings. Raises `DatasetError` for faults."""
    survey, faults = survey_dataset(
        reader,
        raw_dir,
        num_workers=arguments.num_workers,
        client=client,
        strict=arguments.strict,
        subjects=_subjects(arguments),
    )
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(as_json(survey, faults), indent=1) + "\n")
    print(as_text(survey))
    _note(refuse(faults))


def _subjects(arguments: argparse.Namespace) -> dict[str, str] | None:
    return None if arguments.subjects is None else read_subjects(arguments.subjects)


def _name(arguments: argparse.Namespace) -> str:
    default = "acdc_cine" if arguments.cine else arguments.dataset
    name = default if arguments.name is None else arguments.name
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(
            f"name is {name!r}; expected lower-case letters, digits and underscores, a letter first"
        )
    if len(name) > _LONGEST_NAME:
        raise UserError(f"name has {len(name)} letters; expected at most {_LONGEST_NAME}")
    return name


def _raw_dir(arguments: argparse.Namespace) -> Path:
    if arguments.raw_dir is not None:
        return arguments.raw_dir
    if arguments.dataset == "phantom":
        return arguments.data_dir / "raw" / "phantom"
    raise UserError(f"--raw_dir is missing: give the folder of the raw {arguments.dataset} files")


def _reader(arguments: argparse.Namespace, raw_dir: Path) -> Reader:
    if arguments.dataset == NnunetReader.kind:
        return open_nnunet(
            raw_dir,
            channel=arguments.channel,
            keypoint_channel=arguments.keypoint_channel,
            intensity=arguments.intensity,
            radius=arguments.radius,
            blank_slices_unannotated=arguments.blank_slices_unannotated,
            pixel_spacing=arguments.pixel_spacing,
        )
    if arguments.dataset == FolderReader.kind:
        return open_folder(
            raw_dir,
            arguments.labels,
            classes=arguments.classes or (),
            intensity=arguments.intensity,
            radius=arguments.radius,
            ignore_label=arguments.ignore_label,
            blank_slices_unannotated=arguments.blank_slices_unannotated,
            pixel_spacing=arguments.pixel_spacing,
        )
    if arguments.dataset == AcdcReader.kind:
        spacing = arguments.pixel_spacing
        return AcdcReader(
            cine=bool(arguments.cine), pixel_spacing=PIXEL if spacing is None else spacing
        )
    kind = "chd" if arguments.dataset == "phantom" else arguments.dataset  # phantoms are like CHD
    return READERS[kind]


def _write_phantoms(raw_dir: Path, arguments: argparse.Namespace) -> None:
    total = arguments.num_subjects
    with tqdm(total=total, desc="phantoms", unit="subject", disable=None) as progress:
        write_subjects(
            raw_dir,
            total,
            size=arguments.size,
            seed=arguments.seed,
            overwrite=arguments.overwrite,
            progress=lambda _: progress.update(),
        )


def _describe(summary: Summary, name: str, reader: Reader, options: Options) -> str:
    counts = f"{summary.num_volumes} volumes, {summary.num_slices} slices"
    if summary.already_prepared:
        return f"Already prepared from these files: {counts}, in {summary.directory}"
    found = np.array(summary.keypoints_found)
    cut = np.mean(found > options.max_keypoints)
    return (
        f"Prepared {counts}, in {summary.directory}\n"
        f"with labels: {summary.num_labelled} of {summary.num_volumes} volumes\n"
        + "".join(f"{fact}: {value}\n" for fact, value in reader.facts.items())
        + f"SIFT keypoints per slice: min {found.min()}, median {np.median(found):.0f}, "
        f"max {found.max()}; {cut:.1%} of the slices had more than {options.max_keypoints}\n"
        f"Next: {_next_command(summary, name, reader)}"
    )


def _next_command(summary: Summary, name: str, reader: Reader) -> str:
    """The command that pretrains on the dataset, with its own config or `own_pretrain`."""
    known = "phantom" if name == "phantom" else reader.kind
    config = known if known in ("phantom", "chd", "acdc") else "own"
    words = ["kafjax", "train", "--config", f"{config}_pretrain"]
    data_dir = show(summary.directory.parent.parent)
    changes = {"name": (name, config), "dir": (data_dir, "data")}  # the value, and the config's
    return shlex.join(
        [*words, *(f"--config.data.{n}={to}" for n, (to, usual) in changes.items() if to != usual)]
    )


if __name__ == "__main__":
    sys.exit(main())
