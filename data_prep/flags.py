"""The flags of `kafjax prepare`."""

import argparse
from pathlib import Path
from typing import Any, get_args

from data_prep import sift
from data_prep.acdc import PIXEL
from data_prep.builder import Options
from data_prep.folder import DEFAULT_RADIUS
from data_prep.intensity import Intensity
from data_prep.readers import KINDS
from kafjax.cores import usable_cores
from kafjax.errors import UserError
from kafjax.paths import data_argument, path_argument

_EPILOG = """\
layouts:
  chd      RAW/ct_1001_image.nii.gz, RAW/ct_1001_label.nii.gz, ...; numbers may have gaps
  acdc     RAW/patient001/Info.cfg, patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz, ...,
           also in RAW/training and RAW/testing; resampled to 1.25 mm in plane
  folder   RAW/anna.nii.gz, RAW/ben.nii.gz, ... and, of the same names, --labels LABELS/anna.nii.gz;
           volumes without labels serve for pretraining
  nnunet   RAW/dataset.json, RAW/imagesTr/case_0000.nii.gz, RAW/labelsTr/case.nii.gz, ...;
           volumes without labels serve for pretraining; RAW/imagesTs and RAW/labelsTs are for tests
  phantom  synthetic subjects in the chd layout, written to RAW first

examples:
  kafjax prepare --dataset phantom --num_subjects 6 --size 128x128x24
  kafjax prepare --dataset acdc --raw_dir ACDC/database/training --check
  kafjax prepare --dataset nnunet --raw_dir Dataset005_Prostate --name prostate
  kafjax prepare --dataset folder --raw_dir scans --labels labels --classes liver,tumour --name own

Rerun an interrupted command to finish it.
"""

# Flags of some datasets only, with their defaults there.
_OWN = ("folder", "nnunet")
_DEFAULTS: dict[str, tuple[tuple[str, ...], Any]] = {
    "cine": (("acdc",), False),
    "pixel_spacing": (("acdc", *_OWN), None),
    "labels": (("folder",), None),
    "classes": (("folder",), None),
    "ignore_label": (("folder",), None),
    "blank_slices_unannotated": (_OWN, False),
    "channel": (("nnunet",), None),
    "keypoint_channel": (("nnunet",), None),
    "intensity": (_OWN, None),
    "radius": (_OWN, DEFAULT_RADIUS),
    "num_subjects": (("phantom",), 6),
    "size": (("phantom",), (256, 256, 40)),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser; `refuse_stray` handles the flags that belong to one dataset."""
    parser = argparse.ArgumentParser(
        prog="kafjax prepare",
        description="Turns raw volumes into records with keypoints and correspondences.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_places(parser)
    _add_options(parser)
    _add_dataset_flags(parser)
    return parser


def refuse_stray(arguments: argparse.Namespace) -> None:
    """Fills in defaults of the dataset's own flags; raises `ValueError` for another dataset's."""
    stray = []
    for flag, (datasets, default) in _DEFAULTS.items():
        given = getattr(arguments, flag) is not None
        if given and arguments.dataset not in datasets:
            expected = " or ".join(datasets)
            stray.append(f"--{flag} is for --dataset {expected}, not {arguments.dataset}")
        if not given:
            setattr(arguments, flag, default)
    if arguments.json is not None and not arguments.check:
        stray.append("--json is for --check")
    if stray:
        raise UserError("\n".join(stray))


def _add_places(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", required=True, choices=sorted([*KINDS, "phantom"]), help="what RAW holds")
    add(
        "--raw_dir",
        type=path_argument,
        metavar="RAW",
        help="folder of raw files (phantom: DATA/raw/phantom)",
    )
    add(
        "--data_dir",
        type=data_argument,
        default=Path("data"),
        metavar="DATA",
        help="prepared datasets go to DATA/<name>/<version> (default: %(default)s)",
    )
    add(
        "--subjects",
        type=path_argument,
        metavar="FILE",
        help="CSV or TSV with columns volume and subject, where a subject has several volumes",
    )
    add(
        "--name",
        help="name of the prepared dataset (default: --dataset, or acdc_cine with --cine)",
    )
    add("--overwrite", action="store_true", help="replace a dataset with other options or sources")
    add(
        "--check",
        action="store_true",
        help="only read RAW; report its contents and faults, and suggest K and a patch size",
    )
    add(
        "--strict",
        action="store_true",
        help="treat notes as errors: equal images, other planes, unused entries",
    )
    add(
        "--json",
        type=path_argument,
        metavar="FILE",
        help="with --check: also write the findings to FILE",
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--max_keypoints",
        type=int,
        default=Options.max_keypoints,
        metavar="K",
        help="keypoints per slice; more are cut, fewer padded (default: %(default)s)",
    )
    add(
        "--keypoint_selection",
        choices=sift.SELECTIONS,
        default=Options.keypoint_selection,
        help="which keypoints to keep where there are more than K (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=Options.seed,
        help="seed of the keypoint selection and of phantoms (default: %(default)s)",
    )
    add(
        "--num_workers",
        type=int,
        default=len(usable_cores()),
        metavar="N",
        help="worker processes; 0: this process only; same result (default: one per core)",
    )
    add(
        "--cluster",
        metavar="PLACE",
        help="prepare on a cluster of dask: local, slurm (N jobs), or the address of a scheduler; "
        "same result",
    )


def _add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    acdc = parser.add_argument_group("acdc")
    acdc.add_argument(
        "--cine",
        action="store_true",
        default=None,
        help="also the other frames of patient001_4d.nii.gz, without labels",
    )
    grid = parser.add_argument_group("acdc, folder and nnunet")
    grid.add_argument(
        "--pixel_spacing",
        type=float,
        metavar="MM",
        help="edge of the pixels that slices are resampled to "
        f"(default: the files' own; acdc: {PIXEL:g}, the paper's)",
    )
    folder = parser.add_argument_group("folder")
    folder.add_argument(
        "--labels", type=path_argument, metavar="DIR", help="folder of the scans' labels"
    )
    folder.add_argument(
        "--classes",
        type=lambda text: tuple(text.split(",")),
        metavar="A,B,...",
        help="names of the labels' numbers, ascending, without 0 (default: class_1,class_2,...)",
    )
    folder.add_argument(
        "--ignore_label",
        type=int,
        metavar="N",
        help="number in the labels of voxels that nobody annotated (nnunet: of the label `ignore`)",
    )
    nnunet = parser.add_argument_group("nnunet")
    nnunet.add_argument(
        "--channel",
        metavar="A,B,...",
        help="numbers or names in dataset.json of the records' channels (default: all)",
    )
    nnunet.add_argument(
        "--keypoint_channel",
        metavar="A",
        help="the one of them whose keypoints are taken (default: the first)",
    )
    own = parser.add_argument_group("folder and nnunet")
    own.add_argument(
        "--intensity",
        choices=get_args(Intensity),
        help="ct: clip to the 1st and 99th percentile of a volume; zscore: leave as it is "
        "(default: ct if the channel is named CT or, in a folder, values fall below -200)",
    )
    own.add_argument(
        "--blank_slices_unannotated",
        action="store_true",
        default=None,
        help="slices whose labels are 0 throughout were not annotated: they are no background",
    )
    own.add_argument(
        "--radius",
        type=int,
        metavar="PX",
        help="keypoints of neighbouring slices correspond within PX pixels "
        f"(default: {DEFAULT_RADIUS})",
    )
    phantoms = parser.add_argument_group("phantom")
    phantoms.add_argument("--num_subjects", type=int, metavar="N", help="default: 6")
    phantoms.add_argument(
        "--size",
        type=_size,
        metavar="XxYxZ",
        help="voxels of each volume, up to 512x512x200 (default: 256x256x40)",
    )


def _size(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected columns x rows x slices: 256x256x40")
    return tuple(map(int, parts))
