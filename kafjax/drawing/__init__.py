"""Drawing of slices with their keypoints, correspondences and labels."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".figures": (
            "Pair",
            "draw_pair",
            "plot_pair",
            "save_figure",
        ),
        ".segmentations": (
            "SegmentedSlice",
            "draw_segmentations",
        ),
        ".overlay": (
            "class_colours",
            "draw_labels",
            "draw_sample",
        ),
    },
)
