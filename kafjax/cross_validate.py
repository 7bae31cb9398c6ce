"""Trains and evaluates a config over folds, M and seeds: `kafjax cross-validate --help`.

`kafjax.study.cross_validation` describes what it does and writes.
"""

from typing import Any


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags
    from ml_collections import config_flags

    from kafjax.commands import define_path, run_app
    from kafjax.config_files import define_config
    from kafjax.errors import UserError

    config = define_config("The runs: a config file, or the name of a shipped one.")
    workdir = define_path("workdir", None, "Folder of the runs.", required=True)
    num_labeled = flags.DEFINE_string(
        "num_labeled", None, "Values of M, as in 2,6,10.", required=True
    )
    folds = flags.DEFINE_string("folds", None, "As in 0-4 or 0,2. Default: all of the config's.")
    seeds = flags.DEFINE_string("seeds", None, "As in 0,1,2. Default: the config's.")
    collect = flags.DEFINE_bool("collect", False, "Only make the table of the runs there are.")

    def command() -> int | None:
        from kafjax.study.cross_validation import cross_validate
        from kafjax.study.runs import parse_numbers

        given = {"data.num_labeled": num_labeled, "data.fold": folds, "seed": seeds}
        overrides = config_flags.get_override_values(flags.FLAGS["config"])
        numbers: dict[str, Any] = {}
        for field, flag in given.items():
            if field in overrides and (flag.value is not None or field == "data.fold"):
                raise UserError(f"--config.{field} is given; expected --{flag.name} instead")
            numbers[flag.name] = parse_numbers(flag.name, flag.value)
        return cross_validate(config.value, workdir.value, collect=collect.value, **numbers)

    run_app(command)


if __name__ == "__main__":
    from kafjax.xla import use_huge_pages

    use_huge_pages()
    _run_from_command_line()
