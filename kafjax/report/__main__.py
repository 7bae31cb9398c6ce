"""Writes one HTML page about a set of runs, which opens from disk and loads nothing.

    kafjax report --workdir runs/chd_pretrain runs/chd_fold0_M2 --output report.html

A cross-validation's folder stands for its runs. What a workdir lacks is said on the page.
"""

from absl import app, flags

from kafjax.commands import (
    define_data_dir,
    define_path,
    define_paths,
    expand_list,
    parse_flags,
    run_command,
)
from kafjax.report.page import NUM_SAMPLES, report
from kafjax.xla import set_up_xla

_WORKDIR = define_paths(
    "workdir", None, "Workdirs of runs or cross-validations: A B C, or A,B,C.", required=True
)
_OUTPUT = define_path("output", "report.html", "The page's file.")
_DATA_DIR = define_data_dir(None, "Default: where the runs had their datasets.")
_SAMPLES = flags.DEFINE_integer(
    "samples", NUM_SAMPLES, "Slices of each dataset that the runs segment for the page; 0: none."
)


def main(argv: list[str]) -> None:
    """Dispatches to `report`; what stands after a workdir is another one."""
    set_up_xla()
    run_command(
        lambda: report(
            [*_WORKDIR.value, *(path for text in argv[1:] for path in expand_list(text))],
            _OUTPUT.value,
            data_dir=_DATA_DIR.value,
            num_samples=_SAMPLES.value,
        )
    )


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt()  # flags may follow workdirs
    app.run(main, flags_parser=parse_flags)
