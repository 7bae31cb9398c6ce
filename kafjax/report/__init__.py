"""One self-contained HTML page about a set of runs.

    kafjax report --workdir runs/chd_pretrain runs/chd_fold0_M2 --output report.html

Curves, tables of evaluation, worst and slowest volumes, sample segmentations, configurations and
how they differ, environments. A folder of `kafjax.cross_validate` stands for its runs, and its
table is shown. What a workdir lacks is said on the page. The same workdirs give the same bytes.
"""

from kafjax.report.page import report

__all__ = ["report"]
