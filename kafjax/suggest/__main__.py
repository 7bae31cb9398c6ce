"""Suggests which volumes to label next, with pictures: `kafjax suggest --workdir RUN`.

    kafjax suggest --workdir runs/own_pretrain --number 2 --output suggestions
    kafjax suggest --workdir runs/own_seed0,runs/own_seed1 --number 5 --output suggestions

With a pretraining run: the subjects that represent all others best, k-medoids of its encoder's
features. With segmentation runs: the volumes that they have not seen and are least sure of. Writes
`suggestions.csv` and `suggestions.png`. See `kafjax.suggest.suggestions`.
"""


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import define_data_dir, define_path, define_paths, run_app

    workdirs = define_paths(
        "workdir", None, "A pretraining run, or segmentation runs A,B,C.", required=True
    )
    output = define_path("output", "suggestions", "Folder of the table and the pictures.")
    number = flags.DEFINE_integer("number", 5, "How many to suggest.")
    data_dir = define_data_dir(None, "Default: the runs' data directory.")
    ignore_labels = flags.DEFINE_bool(
        "ignore_labels", False, "With a pretraining run: as if no volume had labels."
    )

    def command() -> None:
        from kafjax.suggest.suggestions import suggest

        suggest(
            workdirs.value,
            output.value,
            number=number.value,
            data_dir=data_dir.value,
            ignore_labels=ignore_labels.value,
        )

    run_app(command)


if __name__ == "__main__":
    _run_from_command_line()
