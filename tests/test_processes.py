"""Two processes of a run: what ends one ends both, with the reason."""

import os
import subprocess
import sys

import pytest

from kafjax.errors import TRY_AGAIN, UserError
from kafjax.processes import check_same, gather, together
from tests.runs import ROOT, free_address

CHILD = """
    import sys, jax
    from pathlib import Path
    number = int(sys.argv[2])
    jax.distributed.initialize(sys.argv[1], 2, number)
    import numpy as np
    from kafjax.checkpoint.checkpointer import Checkpointer
    from kafjax.processes import check_same, gather, together
    folder = Path(sys.argv[3])
    state = {"a": np.arange(4.0)}

    def outcome(action):
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}".replace(str(folder), "RUN")
        return "held"

    def fail_on_1():
        with together():
            if number:
                raise OSError("no such disk")

    def restore(at):
        with Checkpointer(at, keep_newest=2, best_metric=None) as checkpointer:
            checkpointer.restore_latest(state)

    print(gather(f"é{number}"))
    print(outcome(lambda: check_same("the dataset", "equal")))
    print(outcome(lambda: check_same("the dataset", f"content {number}")))
    print(outcome(fail_on_1))
    # Each has a disk of its own, and only the first has a checkpoint on it.
    with Checkpointer(folder / "0", keep_newest=2, best_metric=None) as checkpointer:
        checkpointer.save(3, state, metrics={}, data={})
    print(outcome(lambda: restore(folder / str(number))))
    print(outcome(lambda: restore(folder / "0")))
"""


def start_two(code: str, argument: str) -> list[subprocess.Popen[str]]:
    """Two processes that run the code with an address to meet at, a number and the argument."""
    address = free_address()
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(i), argument],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What the two processes print."""
    folder = tmp_path_factory.mktemp("processes")
    children = start_two("\n".join(line[4:] for line in CHILD.splitlines()), str(folder))
    try:
        results = [child.communicate(timeout=300) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], results
    gloo = "[Gloo]"  # which prints to stdout that it is connected
    return [[x for x in output.splitlines() if not x.startswith(gloo)] for output, _ in results]


def test_every_process_has_the_texts_of_all(said: list[list[str]]) -> None:
    assert [lines[0] for lines in said] == ["['é0', 'é1']"] * 2


def test_a_difference_is_told_by_all(said: list[list[str]]) -> None:
    for lines in said:
        assert lines[1:5] == [
            "held",
            "UserError: the processes differ in the dataset; expected the same:",
            "  process 0: content 0",
            "  process 1: content 1",
        ]


def test_an_error_of_one_ends_all_with_its_reason(said: list[list[str]]) -> None:
    assert said[0][5] == "UserError: process 1 ended: no such disk"
    assert said[1][5] == "OSError: no such disk"


def test_no_process_starts_afresh_where_another_finds_a_checkpoint(said: list[list[str]]) -> None:
    for i, lines in enumerate(said):
        reason = "not all processes find a checkpoint: process 0 3, process 1 none"
        assert lines[6:] == [f"UserError: RUN/{i}: {reason}", "held"]


def test_one_process_alone_needs_no_other() -> None:
    assert gather("text") == ["text"]
    check_same("the dataset", "text")
    with pytest.raises(UserError, match="mine"), together():
        raise UserError("mine")


SILENT = """
import os, signal, sys, time
from kafjax.processes import join

join(sys.argv[1], 2, int(sys.argv[2]), heartbeat_seconds=3)
time.sleep(3)
print("joined", flush=True)
if sys.argv[2] == sys.argv[3]:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_without_a_sign_ends_the_others(silent: int) -> None:
    children = start_two(SILENT, str(silent))
    try:
        _, error = children[1 - silent].communicate(timeout=120)
        assert children[1 - silent].returncode == TRY_AGAIN, error
        assert f"(no sign from process {silent} for 3 s)" in error
    finally:
        for child in children:
            child.kill()
            child.communicate()
