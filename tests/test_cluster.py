"""The table of `make test-cluster`."""

from types import SimpleNamespace

from tests.cluster import Table


def test_a_row_has_the_outcome_and_the_time_of_setup_and_call() -> None:
    table = Table()

    def report(name: str, when: str, outcome: str, duration: float) -> None:
        table.pytest_runtest_logreport(
            SimpleNamespace(
                nodeid=f"tests/test_x.py::test_{name}",
                when=when,
                outcome=outcome,
                failed=outcome == "failed",
                skipped=outcome == "skipped",
                duration=duration,
            )
        )

    report("a_run", "setup", "passed", 2)
    report("a_run", "call", "passed", 3)
    report("a_run", "teardown", "failed", 1)
    report("left_out", "setup", "skipped", 0)
    report("b", "setup", "passed", 0)
    report("b", "call", "passed", 1)
    assert table.lines() == [
        "a run     failed       6 s",
        "left out  skipped      0 s",
        "b         passed       1 s",
    ]
