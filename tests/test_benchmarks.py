"""The parts of benchmarks that are computed and not measured, and the protocol on a toy side."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import main, ours, preparation, report, step
from benchmarks.case import Case
from benchmarks.growth import exponent
from benchmarks.profiles import device_events, top_kernels
from benchmarks.workers import Side, SideError, take_turns, time_paired, workers

ROOT = Path(__file__).parents[1]
TOY = "tests.test_benchmarks:make_toy"


def make_toy(log: Path, name: str) -> Side:
    """A side whose first call is slow, and that writes down when it is called."""
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        with log.open("a") as stream:
            stream.write(name)
        time.sleep(0.2 if calls % 2 else 0)

    def fill() -> None:
        np.ones(10_000_000).sum()

    def fail() -> None:
        raise MemoryError("too large\nindeed")

    environment = {"hugepages": float("hugetlb" in os.environ.get("GLIBC_TUNABLES", ""))}
    return Side(
        {"step": step, "fill": fill, "fail": fail, "end": functools.partial(os._exit, 9)},
        environment,
    )


def test_sides_are_called_turn_about_and_the_second_call_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    makers = {name: (TOY, log, name) for name in "ab"}
    with workers(makers, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}) as sides:
        seconds = take_turns(sides, ("step",), 3)
        assert log.read_text() == "aabb" * 3
        assert all(s < 0.2 for side in "ab" for s in seconds[side]["step"])
        assert len(take_turns(sides, ("step",), 5, limit=0)["a"]["step"]) == 3
        assert sides["a"].facts == {"hugepages": 1.0}
        before = sides["a"].peak_memory()
        sides["a"].ask("fill")
        assert 70e6 < sides["a"].peak_memory() - before < 120e6
        assert sides["b"].peak_memory() < before + 40e6
        with pytest.raises(SideError, match=r"MemoryError: too large$"):
            sides["a"].ask("fail")
        with pytest.raises(SideError, match="ended with 9"):
            sides["b"].ask("end")
    assert "GLIBC_TUNABLES" not in os.environ


def test_a_side_that_cannot_be_made_says_why() -> None:
    with (
        pytest.raises(SideError, match="ModuleNotFoundError: No module named 'nothing'"),
        workers({"a": ("nothing:make",)}),
    ):
        pass


def test_paired_times_are_medians_of_second_calls_and_of_long_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    naps, now = iter([4, 1, 7, 4, 3]), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += next(naps)

    assert time_paired(call, 3) == 3


@pytest.mark.parametrize("text", ["fcn:512:32:1", "unet:512:32", "unet:512:x:1"])
def test_a_case_that_the_peer_cannot_have_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}', expected .* one of kaf_unet, unet, unet_c2"):
        step.make_case(text, 400)


def test_the_exponent_is_that_of_a_power() -> None:
    values = [64, 128, 512]
    assert exponent(values, [3 * v**1.7 for v in values]) == pytest.approx(1.7)
    assert np.isnan(exponent([1], [1]))


def test_kernels_are_added_up_by_kind() -> None:
    def line(name: str, events: list[tuple[str, float]]) -> Any:
        return SimpleNamespace(
            name=name, events=[SimpleNamespace(name=n, duration_ns=d * 1e9) for n, d in events]
        )

    gpu = [
        line("Stream #13(Compute)", [("fusion.1", 1.0), ("gemm_fusion_dot_23", 4.0)]),
        line("Steps", [("step", 9.0)]),
    ]
    gpu.append(line("Stream #14(MemcpyD2D)", [("fusion.12", 2.0), ("copy", 1.0)]))
    planes = [
        SimpleNamespace(name="/host:CPU", lines=[line("Stream", [("x", 9.0)])]),
        SimpleNamespace(name="/device:GPU:0", lines=gpu),
    ]
    found = top_kernels(device_events(planes), steps=2, count=2)
    assert found == [("gemm_fusion_dot", 2.0, 0.5), ("fusion", 1.5, 0.375)]


def test_results_are_gathered_with_machine_and_versions(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="holds no results, expected some of growth, input"):
        report.gather(("growth", "input"), tmp_path)
    table = report.Table("T", ["", "step"], [["kafjax", report.seconds(0.0123)]], ["A note."])
    for name in ("input", "growth"):
        result = report.Result(
            name, name.title(), [table], {"seconds": 1}, {"turns": 5, "size": (1, 2)}
        )
        report.write(result, tmp_path)
    page = report.gather(("growth", "input", "step"), tmp_path)
    assert page.count(f"numpy {np.__version__}") == page.count(report.today()) == 1
    assert page.index("## Growth") < page.index("## Input")
    assert "`python -m benchmarks.growth --turns 5 --size 1,2`" in page
    assert "| kafjax | 12.3 ms |\n\nA note.\n" in page
    assert "## Input" in capsys.readouterr().out
    (tmp_path / "input.json").write_text(
        (tmp_path / "input.json").read_text().replace(report.today(), "2001-01-01")
    )
    assert report.gather(("growth", "input"), tmp_path).count("numpy ") == 2


def test_children_are_looked_at() -> None:
    program = "import time; x = bytearray(100_000_000); time.sleep(0.4)"
    with preparation.children_peak() as peak:
        subprocess.run([sys.executable, "-c", program], check=True)
    assert 100e6 < max(peak) < 150e6


def test_every_question_tells_its_flags_and_has_a_quick_form() -> None:
    assert main.QUICK.keys() == set(main.QUESTIONS)
    for name in (*main.QUESTIONS, "cuda"):
        module = __import__(f"benchmarks.{name}", fromlist=["parser"])
        quick = main.QUICK.get(name, "").split()
        arguments = module.parser().parse_args(quick)
        assert arguments.output == report.DEFAULT_FOLDER
        assert name in ("compute", "cuda") or arguments.turns == 1


def test_our_side_trains_and_predicts_without_ml_collections() -> None:
    side = ours.make_side(Case(network="unet", size=32, filters=2, num_classes=3))
    first = side.calls["step"]()
    assert side.calls["step"]() < first
    side.calls["forward"]()
    assert side.facts["temporaries"] > 0


@pytest.mark.slow
def test_every_question_is_answered_at_tiny_sizes(tmp_path: Path) -> None:
    only = ",".join(name for name in main.QUESTIONS if name != "compute")  # has a test of its own
    assert main.main(["--quick", "--only", only, "--output", str(tmp_path)]) == 0
    page = (tmp_path / main.PAGE).read_text()
    assert all(f"benchmarks.{name}" in page for name in only.split(","))


def test_without_a_gpu_cuda_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cuda", "--output", str(tmp_path)]
    environment = {**os.environ, "PATH": ""}  # no nvidia-smi
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: found no NVIDIA GPU")
    assert not list(tmp_path.iterdir())
