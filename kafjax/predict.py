"""Segments raw volumes: `kafjax predict --workdir RUN[,RUN2...] --input X --output Y`.

`kafjax.inference.prediction` documents the details.
"""

from typing import Any


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    import signal
    import sys

    from absl import flags

    from kafjax.commands import define_path, define_paths, run_app

    workdirs = define_paths(
        "workdir", None, "Workdirs of segmentation runs, averaged.", required=True
    )
    source = define_path("input", None, "A NIfTI file, or a folder of them.", required=True)
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
        "data_dir": flags.DEFINE_string(
            "data_dir", None, "Folder of the runs' dataset, for workdirs without preparation.json."
        ),
        "batch_size": flags.DEFINE_integer("batch_size", None, "Default: the run's."),
        "overwrite": flags.DEFINE_bool("overwrite", False, "Replace existing results."),
    }

    def command() -> None:
        from kafjax.inference.prediction import predict_files  # needs the extra `data`

        # As an exception, so that partial output is removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        given: dict[str, Any] = {name: holder.value for name, holder in options.items()}
        predict_files(workdirs.value, source.value, target.value, **given)

    run_app(command)


if __name__ == "__main__":
    _run_from_command_line()
