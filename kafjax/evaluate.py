"""Evaluates a segmentation run: `kafjax evaluate --workdir RUN`.

`kafjax.inference.evaluation` describes what it computes and writes.
"""

from kafjax.inference.evaluation import SPLITS, evaluate_run


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import define_path, run_app

    workdir = define_path("workdir", None, "Workdir of a segmentation run.", required=True)
    split = flags.DEFINE_enum("split", "validation", SPLITS, "Which volumes of the run's fold.")
    step = flags.DEFINE_integer("step", None, "Checkpoint. Default: the best by validation.")
    data_dir = define_path("data_dir", None, "Default: where the run had its dataset.")
    batch_size = flags.DEFINE_integer("batch_size", None, "Of prediction. Default: the run's.")

    def command() -> None:
        evaluate_run(
            workdir.value,
            split=split.value,
            step=step.value,
            data_dir=data_dir.value,
            batch_size=batch_size.value,
        )

    run_app(command)


if __name__ == "__main__":
    _run_from_command_line()
