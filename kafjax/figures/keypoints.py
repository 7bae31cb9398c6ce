"""Figures 2 and 3 of the appendix: two neighbouring slices, their keypoints and correspondences.

Columns: (a) the slices with their keypoints, (b) the correspondences, (c) and (d) the same after
augmentation, as one sample of pretraining. Keypoints that the augmentation masks are crosses in (a)
and (b); (c) and (d) show the network's input.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kafjax.augment import AugmentConfig
from kafjax.data.dataset import SliceDataset
from kafjax.data.patches import PatchSize
from kafjax.drawing import colours
from kafjax.drawing.figures import Pair, make_grid, plot_pair, write_below, write_beside
from kafjax.figures.choice import as_pair, augment_sample, choose_offset, make_chosen_pair

_GAP = 0.03  # between the two slices, of their height


def keypoints_figure(
    dataset: SliceDataset,
    record: int,
    *,
    offset: int | None = None,
    patch_size: PatchSize | None = None,
    mode: str = "index_map",
    seed: int = 0,
) -> Figure:
    """Draws a slice and its neighbour, before and after augmentation.

    Args:
      dataset: where the slices are.
      record: number of the slice's record.
      offset: of the neighbour; by default the next slice, else the previous one.
      patch_size: of the run, (h, w); by default the slice's own.
      mode: how keypoints are moved, see `kafjax.augment.transfer_keypoints`.
      seed: of the augmentation, and of the crop if the patch is smaller.

    Raises:
      ValueError: no such neighbour or mode.
    """
    offset = choose_offset(dataset, record, offset)
    if patch_size is None:
        rows, columns, _ = dataset.read(record).image.shape
        patch_size = rows, columns
    sample = make_chosen_pair(dataset, record, offset, patch_size=patch_size, seed=seed)
    moved = augment_sample(sample, mode=mode, config=AugmentConfig())
    before, after = as_pair(sample), as_pair(moved)
    figure = _draw(before, after)
    captions = (
        f"(a) {_count(before.masks)} keypoints",
        f"(b) {len(before.matches())} correspondences",
        f"(c) {_count(after.masks)} after augmentation",
        f"(d) {len(after.matches())} after augmentation",
    )
    for axes, caption in zip(figure.axes, captions, strict=True):
        write_below(axes, caption)
    for shown, height in ((record, 0.75), (record + offset, 0.25)):
        write_beside(figure.axes[0], dataset.describe_record(shown), height=height)
    return figure


def _draw(before: Pair, after: Pair) -> Figure:
    """The four columns and their legend, without captions."""
    _, height, width = before.images.shape
    total = height * (2 + _GAP)
    lost = [m & ~kept for m, kept in zip(before.masks, after.masks, strict=True)]
    legend = [
        _dot(colours.MATCHED, "o", "matched"),
        _dot(colours.UNMATCHED, "o", "unmatched"),
        _dot(colours.MASKED, "x", f"masked by the augmentation ({_count(lost)})"),
        Line2D([], [], color=colours.CORRESPONDENCE, linewidth=1, label="correspondence"),
    ]
    grid = make_grid(1, 4, total / width, top=0.03, bottom=0.2, widest=2.0, legend=legend)
    for i, axes in enumerate(grid[0]):
        axes.set(xlim=(0, width), ylim=(total, 0), autoscale_on=False)
        plot_pair(
            axes,
            before if i < 2 else after,
            second=(height * (1 + _GAP), 0),
            lines=i % 2 == 1,
            lost=lost if i < 2 else None,
            marker_size=1.8,
            line_width=0.45,
        )
    figure: Figure = grid[0, 0].figure
    return figure


def _dot(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markersize=4, linestyle="", label=label)


def _count(masks: Sequence[np.ndarray]) -> str:
    return f"{masks[0].sum()} and {masks[1].sum()}"
