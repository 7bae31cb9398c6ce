"""Prepared datasets: records and their index, slices, batches, patches, splits."""

from kafjax._lazy import public

__all__, __getattr__ = public(
    __name__,
    {
        ".dataset": (
            "Slice",
            "SliceDataset",
            "open_dataset",
        ),
        ".samples": (
            "make_pair",
            "make_labelled",
            "make_unlabelled",
        ),
        ".batches": (
            "BatchOptions",
            "pretraining_batches",
            "segmentation_batches",
            "semi_supervised_batches",
            "evaluation_batches",
        ),
        ".dataset_files": (
            "RecordError",
            "find_dataset",
        ),
        ".records": (
            "RecordReader",
            "load_index",
            "write_index",
        ),
        ".splits": (
            "Split",
            "folds",
            "choose_labeled",
            "split_volumes",
            "subject_of",
        ),
        ".patches": (
            "cut_patch",
            "cut_view",
            "tile_origins",
            "blend_tiles",
        ),
    },
)
