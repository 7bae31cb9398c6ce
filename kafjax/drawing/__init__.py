"""Drawing of slices with their keypoints, correspondences and labels."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".figures": (
            "Pair",
            "SegmentedSlice",
            "draw_pair",
            "draw_segmentations",
            "plot_pair",
            "save_figure",
        ),
        ".overlay": (
            "class_colours",
            "draw_labels",
            "draw_sample",
        ),
    },
)
