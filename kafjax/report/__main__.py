"""Writes one HTML page about a set of runs, which opens from disk and loads nothing.

    kafjax report --workdir runs/chd_pretrain runs/chd_fold0_M2 --output report.html

A cross-validation's folder stands for its runs. What a workdir lacks is said on the page.
"""

from absl import app, flags

from kafjax.commands import parse_flags, run_command
from kafjax.report.page import NUM_SAMPLES, report
from kafjax.xla import set_up_xla

_WORKDIR = flags.DEFINE_list(
    "workdir", None, "Workdirs of runs or cross-validations: A B C, or A,B,C.", required=True
)
_OUTPUT = flags.DEFINE_string("output", "report.html", "The page's file.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Default: where the runs had their datasets.")
_SAMPLES = flags.DEFINE_integer(
    "samples", NUM_SAMPLES, "Slices of each dataset that the runs segment for the page; 0: none."
)


def main(argv: list[str]) -> None:
    """Dispatches to `report`; what stands after a workdir is another one."""
    set_up_xla()
    workdirs = [*_WORKDIR.value, *argv[1:]]
    run_command(
        lambda: report(
            workdirs, _OUTPUT.value, data_dir=_DATA_DIR.value, num_samples=_SAMPLES.value
        )
    )


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt()  # flags may follow workdirs
    app.run(main, flags_parser=parse_flags)
