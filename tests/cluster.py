"""Runs the tests of clusters and of large datasets, and ends with a table: `make test-cluster`."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    name
    for name in (
        *("tests/test_engine.py", "tests/test_slurm.py", "tests/test_hosts.py"),
        *("tests/test_buckets.py", "tests/test_bucket_runs.py", "tests/test_archive.py"),
    )
    if (ROOT / name).exists()
]


class Table:
    """A pytest plugin that collects each test's outcome and seconds."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, float]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        outcome, seconds = self.rows.get(report.nodeid, ("", 0.0))
        if report.failed or report.skipped or (report.when == "call" and not outcome):
            outcome = report.outcome
        self.rows[report.nodeid] = outcome, seconds + report.duration

    def lines(self) -> list[str]:
        """The table, a line for each test."""
        names = {
            node: node.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            for node in self.rows
        }
        width = max(map(len, names.values()), default=0)
        return [
            f"{names[node]:<{width}}  {outcome:<7}  {seconds:5.0f} s"
            for node, (outcome, seconds) in self.rows.items()
        ]


def main() -> int:
    """Returns 0 if every test passed, and none was left out."""
    table = Table()
    os.environ["KAFJAX_CLUSTER"] = "1"  # for what takes too long elsewhere
    status = int(pytest.main(["-q", "-p", "no:xdist", *FILES], plugins=[table]))
    print("\n" + "\n".join(table.lines()))
    return status or int(any(outcome != "passed" for outcome, _ in table.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
