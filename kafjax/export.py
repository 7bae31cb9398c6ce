"""Writes networks as one program: `kafjax export --model model.kafjax --output net.stablehlo`.

Of a packed model or of runs; `net.json` next to it describes inputs and output. An output that ends
in .onnx is ONNX. `kafjax.inference.exported` documents both.
"""

from kafjax.files import printable


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import define_data_dir, define_path, define_paths, run_app

    workdirs = define_paths("workdir", None, "Workdirs of segmentation runs, averaged.")
    models = define_paths("model", None, "Files of `kafjax pack`, instead or as well.")
    target = define_path(
        "output", None, "The program: a name that ends in .stablehlo or .onnx.", required=True
    )
    logits = flags.DEFINE_bool("logits", False, "Logits instead of probabilities.")
    step = flags.DEFINE_string(
        "step", None, "Checkpoint: a number, best or last. Default: config.checkpoint.select."
    )
    data_dir = define_data_dir(
        None, "Folder of the runs' dataset, for workdirs without preparation.json."
    )

    def command() -> None:
        from kafjax.inference.exported import export

        runs = [*(workdirs.value or ()), *(models.value or ())]
        export(runs, target.value, logits=logits.value, step=step.value, data_dir=data_dir.value)
        print(f"Wrote {printable(target.value)}", flush=True)

    run_app(command)


if __name__ == "__main__":
    _run_from_command_line()
