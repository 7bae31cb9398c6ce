"""`python -m data_prep.main`: prepares a raw dataset for training, or phantoms to try things on.

Exit status: 0 done or already done; 2 a mistake in the command or in the raw files, one line per
fault; 1 anything else that stopped the preparation, which the same command then continues.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep import phantom, sift
from data_prep.builder import Options
from data_prep.prepare import PreparationError, Summary, prepare_dataset
from data_prep.readers import READERS

_EPILOG = """\
layouts:
  chd      RAW/ct_1001_image.nii.gz, RAW/ct_1001_label.nii.gz, ...; numbers may have gaps
  phantom  synthetic subjects in the chd layout, written to RAW first

example:
  python -m data_prep.main --dataset phantom --num_subjects 6 --size 128x128x24

A command that was stopped is finished by running it again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except ValueError as error:
        return _report(error, 2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _report(f"{where}{error.strerror or error}; volumes already finished are kept", 1)
    except PreparationError as error:
        return _report(
            f"{error}\nthe other volumes are kept: run the same command again, "
            "with a smaller --num_workers if memory ran out",
            1,
        )
    except KeyboardInterrupt:
        return _report("stopped; the same command goes on from here", 130)
    return 0


def _report(message: object, status: int) -> int:
    for line in str(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return status


def _run(arguments: argparse.Namespace) -> None:
    options = Options(
        max_keypoints=arguments.max_keypoints,
        keypoint_selection=arguments.keypoint_selection,
        seed=arguments.seed,
    )
    if arguments.num_workers < 0:
        raise ValueError(f"num_workers is {arguments.num_workers}; expected 0 or more")
    raw_dir = _raw_dir(arguments)
    if arguments.dataset == "phantom":
        _write_phantoms(raw_dir, arguments)
    summary = prepare_dataset(
        READERS["chd" if arguments.dataset == "phantom" else arguments.dataset],
        raw_dir,
        arguments.data_dir,
        name=arguments.dataset,
        options=options,
        num_workers=arguments.num_workers,
        overwrite=arguments.overwrite,
    )
    print(_describe(summary, arguments.dataset, options))


def _raw_dir(arguments: argparse.Namespace) -> Path:
    if arguments.raw_dir is not None:
        return arguments.raw_dir
    if arguments.dataset == "phantom":
        return arguments.data_dir / "raw" / "phantom"
    raise ValueError(f"--raw_dir is missing: give the folder of the raw {arguments.dataset} files")


def _write_phantoms(raw_dir: Path, arguments: argparse.Namespace) -> None:
    total = arguments.num_subjects
    with tqdm(total=total, desc="phantoms", unit="subject", disable=None) as progress:
        phantom.write_subjects(
            raw_dir,
            total,
            size=arguments.size,
            seed=arguments.seed,
            overwrite=arguments.overwrite,
            progress=lambda _: progress.update(),
        )


def _describe(summary: Summary, dataset: str, options: Options) -> str:
    counts = f"{summary.num_volumes} volumes, {summary.num_slices} slices"
    if summary.already_prepared:
        return f"Already prepared from these files: {counts}, in {summary.directory}"
    found = np.array(summary.keypoints_found)
    cut = np.mean(found > options.max_keypoints)
    return (
        f"Prepared {counts}, in {summary.directory}\n"
        f"SIFT keypoints per slice: min {found.min()}, median {np.median(found):.0f}, "
        f"max {found.max()}; {cut:.1%} of the slices had more than {options.max_keypoints}\n"
        f"Next: python -m kafjax.main --config configs/{dataset}_pretrain.py"
    )


def _num_cores() -> int:
    # Where a job may use only some of the machine's cores, Linux alone can say which.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected columns x rows x slices: 256x256x40")
    return tuple(map(int, parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.main",
        description="Turns raw volumes into records with keypoints and correspondences.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", required=True, choices=sorted([*READERS, "phantom"]), help="what RAW holds")
    add(
        "--raw_dir",
        type=Path,
        metavar="RAW",
        help="folder of raw files (phantom: DATA/raw/phantom)",
    )
    add(
        "--data_dir",
        type=Path,
        default=Path("data"),
        metavar="DATA",
        help="prepared datasets go to DATA/<dataset>/<version> (default: %(default)s)",
    )
    add(
        "--max_keypoints",
        type=int,
        default=Options.max_keypoints,
        metavar="K",
        help="places for keypoints in a slice; more are cut, fewer padded (default: %(default)s)",
    )
    add(
        "--keypoint_selection",
        choices=sift.SELECTIONS,
        default=Options.keypoint_selection,
        help="which keypoints stay where there are more than K (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=Options.seed,
        help="of the choice of keypoints, and of phantoms (default: %(default)s)",
    )
    add(
        "--num_workers",
        type=int,
        default=_num_cores(),
        metavar="N",
        help="processes, 0 for none but this; the result is the same (default: one per core)",
    )
    add("--overwrite", action="store_true", help="replace a dataset of other options or sources")
    group = parser.add_argument_group("phantoms")
    group.add_argument("--num_subjects", type=int, default=6, help="default: %(default)s")
    group.add_argument(
        "--size",
        type=_size,
        default=(256, 256, 40),
        metavar="XxYxZ",
        help="voxels of each volume, up to 512x512x200 (default: 256x256x40)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
