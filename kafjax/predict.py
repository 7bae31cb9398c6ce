"""Segments raw volumes: `kafjax predict --workdir RUN[,RUN2...] --input X --output Y`.

Or with a packed model: `kafjax predict --model model.kafjax --input X --output Y`.

`kafjax.inference.prediction` documents the details.
"""

from typing import Any


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    import signal
    import sys

    from absl import flags

    from kafjax.commands import define_data_dir, define_path, define_paths, run_app

    workdirs = define_paths("workdir", None, "Workdirs of segmentation runs, averaged.")
    models = define_paths("model", None, "Files of `kafjax pack`, instead or as well.")
    source = define_path(
        "input",
        None,
        "A scan (NIfTI, NRRD, MetaImage, a folder of DICOM or one of its files), or a folder of "
        "scans.",
        required=True,
    )
    target = define_path("output", None, "The labels' file, or a folder.", required=True)
    options = {
        "probabilities": flags.DEFINE_bool(
            "probabilities", False, "Also write class probabilities, 4-d float32."
        ),
        "uncertainty": flags.DEFINE_bool(
            "uncertainty", False, "Also write maps of uncertainty and uncertainty.csv."
        ),
        "mirror": flags.DEFINE_bool(
            "mirror", False, "Average over mirrored slices; four times the work."
        ),
        "step": flags.DEFINE_string(
            "step",
            None,
            "Checkpoint: a number, best or last; several are averaged: 200,300. "
            "Default: config.checkpoint.select.",
        ),
        "data_dir": define_data_dir(
            None, "Folder of the runs' dataset, for workdirs without preparation.json."
        ),
        "batch_size": flags.DEFINE_integer("batch_size", None, "Default: the run's."),
        "ending": flags.DEFINE_string(
            "format",
            None,
            "Of labels in a folder: .nii.gz, .nii, .seg.nrrd, .nrrd, .mha or .dcm. Default: the "
            "scan's.",
        ),
        "keep_header": flags.DEFINE_bool(
            "keep_header",
            False,
            "Copy the scan's header too; may hold names and dates of the patient.",
        ),
        "label_text": define_path(
            "label_text", None, "Also write the classes to this file, for ITK-SNAP."
        ),
        "overwrite": flags.DEFINE_bool("overwrite", False, "Replace existing results."),
    }

    def command() -> None:
        from kafjax.inference.prediction import predict_files  # needs the extra `data`

        # As an exception, so that partial output is removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        given: dict[str, Any] = {name: holder.value for name, holder in options.items()}
        runs = [*(workdirs.value or ()), *(models.value or ())]
        predict_files(runs, source.value, target.value, **given)

    run_app(command)


if __name__ == "__main__":
    from kafjax.xla import use_huge_pages

    use_huge_pages()
    _run_from_command_line()
