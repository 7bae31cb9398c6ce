"""Evaluates a run, `kafjax evaluate --workdir RUN`, or anyone's predictions.

    kafjax evaluate --predictions DIR --labels DIR

`kafjax.inference.evaluation` and `kafjax.inference.folders` document the scores and the output.
"""

from kafjax.errors import UserError
from kafjax.inference.evaluation import evaluate_run
from kafjax.workdir.scores import SPLITS


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import define_data_dir, define_path, run_app

    workdir = define_path("workdir", None, "Workdir of a segmentation run.")
    predictions = define_path("predictions", None, "Or a folder of NIfTI predictions.")
    labels = define_path("labels", None, "Their references; without, only volumes in mm^3.")
    output = define_path("output", None, "Of the results. Default: that of --predictions.")
    classes = flags.DEFINE_list("classes", [], "Names of the predictions' numbers 1, 2, ...")
    dataset_json = define_path("dataset_json", None, "Or nnU-Net's: names, regions, ignore label.")
    ignore_label = flags.DEFINE_integer(
        "ignore_label", None, "Number in --labels of voxels that nobody annotated.", lower_bound=1
    )
    split = flags.DEFINE_enum("split", "validation", SPLITS, "Which volumes of the run.")
    step = flags.DEFINE_string(
        "step", None, "Checkpoint: a number, best or last. Default: config.checkpoint.select."
    )
    data_dir = define_data_dir(None, "Default: the run's data directory.")
    batch_size = flags.DEFINE_integer("batch_size", None, "Of prediction. Default: the run's.")

    record_split = flags.DEFINE_bool(
        "record_split", False, "For runs of kafjax 0.1: record the dataset's current split."
    )

    def command() -> None:
        if (workdir.value is None) == (predictions.value is None):
            raise UserError("expected --workdir RUN, or --predictions DIR and --labels DIR")
        if predictions.value is not None:
            from kafjax.inference.folders import evaluate_folders

            evaluate_folders(
                predictions.value,
                labels.value,
                output=output.value,
                classes=classes.value,
                dataset_json=dataset_json.value,
                ignore_label=ignore_label.value,
            )
            return
        evaluate_run(
            workdir.value,
            split=split.value,
            step=step.value,
            data_dir=data_dir.value,
            batch_size=batch_size.value,
            record_split=record_split.value,
        )

    run_app(command)


if __name__ == "__main__":
    _run_from_command_line()
