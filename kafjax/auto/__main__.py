"""Segments a folder of partly labelled scans: `kafjax auto`.

    kafjax auto --images scans --labels labels --output out [--minutes 60]

Looks at the scans, plans what fits this device and the time, pretrains on all of them, fine-tunes
on the labelled ones, segments each and writes a report. `--images` may also be a folder in
nnU-Net's layout. The plan, `out/plan.py`, is a config: edit it, or run `--dry_run` first. The same
command continues after a stop. `kafjax.auto.walk` lists what it writes.
"""


def _run_from_command_line() -> None:
    # Inside a function, so that importing this module defines no flag.
    from absl import flags

    from kafjax.commands import define_path, run_app

    images = define_path(
        "images", None, "Folder of scans, files or folders of DICOM.", required=True
    )
    labels = define_path("labels", None, "Folder of labels with the scans' names.")
    subjects = define_path("subjects", None, "CSV or TSV of subjects that have several scans.")
    output = define_path("output", None, "Folder of all results.", required=True)
    minutes = flags.DEFINE_float("minutes", None, "Of the whole. Default: up to a night.")
    estimate = flags.DEFINE_bool(
        "estimate", False, "Estimate the score: leave each labelled subject out once (5 folds)."
    )
    classes = flags.DEFINE_list("classes", [], "Names of the labels' numbers, ascending.")
    dry_run = flags.DEFINE_bool("dry_run", False, "Plan only.")

    def command() -> int | None:
        from absl import logging

        from kafjax.auto.request import Request
        from kafjax.auto.walk import run_auto

        # Orbax warns of a slow disk, in the middle of the line of progress.
        logging.get_absl_handler().setLevel("ERROR")
        request = Request.of(
            images.value,
            labels.value,
            subjects.value,
            classes=tuple(classes.value),
            minutes=minutes.value,
            estimate=estimate.value,
        )
        return run_auto(request, output.value, dry_run=dry_run.value)

    run_app(command)


if __name__ == "__main__":
    from kafjax.xla import use_huge_pages

    use_huge_pages()
    _run_from_command_line()
