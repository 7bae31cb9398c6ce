"""Packs segmentation runs as one file: `kafjax pack RUN [RUN2 ...] model.kafjax`.

Several runs, such as folds, make one model, which averages them. `kafjax predict --model` needs
nothing but the file; `kafjax.inference.model_file` documents it.
"""

from kafjax.files import printable


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import define_data_dir, expand_list, run_app

    step = flags.DEFINE_string(
        "step", None, "Checkpoint: a number, best or last. Default: config.checkpoint.select."
    )
    data_dir = define_data_dir(
        None, "Folder of the runs' dataset, for workdirs without preparation.json."
    )

    def command(arguments: list[str]) -> None:
        from kafjax.inference.model_file import pack

        *workdirs, target = [path for text in arguments for path in expand_list(text)] or [""]
        pack(workdirs, target, step=step.value, data_dir=data_dir.value)
        print(f"Wrote {printable(target)}", flush=True)

    run_app(command, with_arguments=True)


if __name__ == "__main__":
    _run_from_command_line()
