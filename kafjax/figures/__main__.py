"""Draws the paper's figures: `kafjax figures keypoints|similarity|segmentation ...`."""

import argparse
import textwrap
from pathlib import Path
from typing import Any, NoReturn

from absl import app
from absl.flags import argparse_flags

from kafjax.commands import fail, run_command
from kafjax.drawing.figures import check_output, save_figure
from kafjax.errors import UserError
from kafjax.figures import choice
from kafjax.files import printable
from kafjax.paths import data_argument, path_argument
from kafjax.workdir.workdir import Workdir
from kafjax.xla import set_up_xla


class _Parser(argparse_flags.ArgumentParser):
    """A parser that reports mistakes in one line with status 2, like the other commands."""

    def error(self, message: str) -> NoReturn:
        fail(message, 2)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the three figures; each sets `draw`, a function of the arguments."""
    parser = _Parser(prog="kafjax figures", description=__doc__)
    figures = parser.add_subparsers(metavar="FIGURE", required=True)
    _add_keypoints(
        _add_figure(figures, "keypoints", "two slices, keypoints, correspondences", _KEYPOINTS)
    )
    _add_similarity(
        _add_figure(figures, "similarity", "a point's feature and all others", _SIMILARITY)
    )
    _add_segmentation(
        _add_figure(figures, "segmentation", "slices segmented by runs", _SEGMENTATION)
    )
    return parser


_KEYPOINTS = """
A slice and its neighbour (a) with their keypoints, (b) with their correspondences, (c, d) the same
after augmentation, as a sample of pretraining (figures 2 and 3 of the paper's appendix). Matched
keypoints are blue, unmatched ones orange; crosses are those that the augmentation masks.

  kafjax figures keypoints --data_dir data --volume ct_1001 --slice 40 --output out.png
"""
_SIMILARITY = """
The cosine similarity of a point's feature in a run's encoder with the features of all positions, on
the slice, its neighbour, and both after augmentation: a row for each pretraining or segmentation
run, of any network (figure 4). The star is the query, the ring the keypoint of the neighbour that
corresponds with it.

  kafjax figures similarity --workdir runs/chd_pretrain runs/chd_unet \\
      --volume ct_1001 --slice 40 --output out.pdf
"""
_SEGMENTATION = """
Slices, their reference and a column for each segmentation run (figure 5). Below each prediction is
its Dice in the slice, the mean over the classes present in the slice or the prediction; a star
marks a run trained on the volume.

  kafjax figures segmentation --workdir runs/chd_scratch runs/chd_M2 --output out.pdf
"""


def _add_figure(figures: Any, name: str, title: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = figures.add_parser(
        name,
        help=title,
        description=textwrap.dedent(text),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", type=path_argument, required=True, help="file to write: .png, .pdf or .svg")
    return parser


def _add_slice(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--volume", required=True, help="such as ct_1001")
    add("--slice", type=int, required=True, help="its number, from 0")
    add("--offset", type=int, help="of the neighbour, in slices; default: the next slice")
    add("--seed", type=int, default=0, help="of the augmentation (0)")


def _add_keypoints(parser: argparse.ArgumentParser) -> None:
    from kafjax.augment import KEYPOINT_MODES

    add = parser.add_argument
    add(
        "--data_dir",
        type=data_argument,
        default=Path("data"),
        help="folder of prepared datasets (data)",
    )
    add("--dataset", help="its name; default: the only one of the folder")
    _add_slice(parser)
    size = "HxW of the patch, as the run's config.data.patch_size; default: the whole slice"
    add("--patch_size", type=_parse_size, metavar="HxW", help=size)
    modes = "as config.augment.keypoints (index_map)"
    add("--keypoints", choices=KEYPOINT_MODES, default="index_map", help=modes)
    parser.set_defaults(draw=_draw_keypoints)


def _add_similarity(parser: argparse.ArgumentParser) -> None:
    _add_workdirs(parser)
    _add_slice(parser)
    add = parser.add_argument
    query = "pixel of the slice; default: its keypoint with the most correspondences"
    add("--query", type=_parse_point, metavar="ROW,COL", help=query)
    levels = "of the encoder, one to three of 0 (finest) to 4 (centre); default: 1 3"
    add("--levels", type=int, nargs="+", default=[1, 3], metavar="LEVEL", help=levels)
    parser.set_defaults(draw=_draw_similarity)


def _add_segmentation(parser: argparse.ArgumentParser) -> None:
    _add_workdirs(parser)
    add = parser.add_argument
    volumes = "a row for each; default: the first that all runs were validated on"
    add("--volume", nargs="+", metavar="VOLUME", help=volumes)
    slices = "one of each volume, from 0; default: that with the largest foreground"
    add("--slice", type=int, nargs="+", metavar="SLICE", help=slices)
    add("--num_slices", type=int, default=3, help="rows, where no volume is given (3)")
    parser.set_defaults(draw=_draw_segmentation)


def _add_workdirs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--workdir",
        type=path_argument,
        nargs="+",
        required=True,
        metavar="RUN",
        help="workdirs of runs",
    )
    add(
        "--data_dir",
        type=data_argument,
        help="folder of their dataset; default: the first run's",
    )


def _draw_keypoints(arguments: argparse.Namespace) -> Any:
    from kafjax.figures.keypoints import keypoints_figure

    dataset = choice.open_only_dataset(arguments.data_dir, arguments.dataset)
    return keypoints_figure(
        dataset,
        choice.find_record(dataset, arguments.volume, arguments.slice),
        offset=arguments.offset,
        patch_size=arguments.patch_size,
        mode=arguments.keypoints,
        seed=arguments.seed,
    )


def _draw_similarity(arguments: argparse.Namespace) -> Any:
    from kafjax.figures.similarity import similarity_figure

    dataset = _dataset_of_runs(arguments)
    return similarity_figure(
        dataset,
        choice.find_record(dataset, arguments.volume, arguments.slice),
        arguments.workdir,
        query=arguments.query,
        offset=arguments.offset,
        levels=arguments.levels,
        seed=arguments.seed,
    )


def _draw_segmentation(arguments: argparse.Namespace) -> Any:
    from kafjax.figures.segmentation import segmentation_figure

    if arguments.slice and not arguments.volume:
        raise UserError("--slice is given without --volume; expected the volumes of the slices")
    if arguments.num_slices < 1:
        raise UserError(f"--num_slices is {arguments.num_slices}; expected 1 or more")
    return segmentation_figure(
        _dataset_of_runs(arguments),
        arguments.workdir,
        volumes=arguments.volume,
        slices=arguments.slice,
        num_slices=arguments.num_slices,
    )


def _dataset_of_runs(arguments: argparse.Namespace) -> Any:
    data = Workdir(arguments.workdir[0]).read_config()["data"]
    return choice.open_only_dataset(arguments.data_dir or data["dir"], data["name"])


def _parse_size(text: str) -> tuple[int, int]:
    return _parse_pair(text, "x", "HxW, such as 512x512", least=1)


def _parse_point(text: str) -> tuple[int, int]:
    return _parse_pair(text, ",", "ROW,COL, such as 200,130", least=0)


def _parse_pair(text: str, separator: str, expected: str, *, least: int) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in text.split(separator))
    except ValueError:
        first = second = least - 1
    if min(first, second) < least:
        raise argparse.ArgumentTypeError(f"{text!r}; expected {expected}")
    return first, second


def _draw(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    if getattr(arguments, "seed", 0) < 0:
        raise UserError(f"--seed is {arguments.seed}; expected 0 or more")
    set_up_xla()
    save_figure(arguments.draw(arguments), arguments.output)
    print(f"Wrote {printable(arguments.output)}", flush=True)


def main(arguments: argparse.Namespace) -> None:
    """Draws the figure that the arguments name."""
    run_command(_draw, arguments)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: make_parser().parse_args(argv[1:]))
