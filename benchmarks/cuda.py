"""How fast is the training step on a CUDA GPU, against the same network in PyTorch there?

The paper's two problems with 64 slices a step, in bfloat16 and in float32 (whose products are TF32
on both sides), against the peer as it is, with channels_last and autocast, and compiled. Sides are
called turn about, each peer with ours; a side that runs out of memory is reported. Needs
jax, flax, optax, scipy and torch only. Ends with status 1 where there is no GPU.
"""

import argparse
import dataclasses
import shutil
import statistics
import subprocess
from typing import Any

from benchmarks.case import Case
from benchmarks.flags import integers, make_parser, run, settings
from benchmarks.report import Result, Table, gigabytes, ratio, seconds, version
from benchmarks.workers import SideError, Worker, take_turns, workers

PROBLEMS = {
    "chd": Case(size=512, filters=32, num_keypoints=512, num_classes=8, batch_size=64),
    "acdc": Case(size=352, filters=48, num_keypoints=512, num_classes=4, batch_size=64),
}
# Slices/s of one H200 in bfloat16 at its peak rates of arithmetic and memory, one after the other.
FLOORS = {"chd": 400.0, "acdc": 435.0}
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
FORMS = ("eager", "channels_last", "compiled")


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    flags.add_argument("--problems", default="chd,acdc", help=f"of {', '.join(PROBLEMS)}")
    flags.add_argument("--dtypes", default="bfloat16,float32")
    flags.add_argument("--forms", default=",".join(FORMS), help="of the peer; may be empty")
    flags.add_argument("--batch_size", type=int, default=64, help="slices")
    flags.add_argument("--num_microbatches", type=integers, default=(1,))
    flags.add_argument("--remat", action="store_true", help="config.model.remat")
    flags.add_argument("--scale", type=int, default=1, help="divides sizes, filters: to try it out")
    flags.add_argument("--turns", type=int, default=5)
    flags.add_argument("--allow_cpu", action="store_true", help="run without a GPU, to try it out")
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Compares every problem in every type."""
    gpu = find_gpu()
    if gpu is None and not arguments.allow_cpu:
        raise RuntimeError("found no NVIDIA GPU (nvidia-smi lists none): nothing was measured")
    tables, numbers = [], {}
    for problem in arguments.problems.split(","):
        for dtype in arguments.dtypes.split(","):
            case = make_case(problem, dtype, arguments)
            compared = compare(case, arguments)
            numbers[f"{problem} {dtype}"] = compared
            tables += make_tables(case, compared, FLOORS[problem])
    title = f"Training step on {gpu or 'a CPU, to try the script out'}"
    return Result("cuda", title, tables, {"gpu": gpu, **numbers}, settings(arguments))


def find_gpu() -> str | None:
    """Name, memory and driver of the GPUs that nvidia-smi lists, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return "; ".join(answer.stdout.strip().splitlines()) if answer.returncode == 0 else None


def make_case(problem: str, dtype: str, arguments: argparse.Namespace) -> Case:
    """The problem as the flags change it."""
    if problem not in PROBLEMS:
        raise ValueError(f"--problems has {problem!r}, expected some of {', '.join(PROBLEMS)}")
    case, scale = PROBLEMS[problem], arguments.scale
    return dataclasses.replace(
        case,
        dtype=dtype,
        size=max(case.size // scale // 16, 1) * 16,  # as the networks need it
        filters=case.filters // scale,
        num_keypoints=case.num_keypoints // scale,
        batch_size=arguments.batch_size,
        remat=arguments.remat,
    )


def compare(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """The results of each side; ours with every number of microbatches, peers next to the first."""
    results: dict[str, Any] = {}
    for n in arguments.num_microbatches:
        ours = dataclasses.replace(case, num_microbatches=n)
        label = "kafjax" if n == 1 else f"kafjax, {n} microbatches"
        is_first = n == arguments.num_microbatches[0]
        forms = [form for form in arguments.forms.split(",") if form and is_first]
        try:
            with workers(
                {label: ("benchmarks.ours:make_profiled_side", ours)}, ENVIRONMENT
            ) as sides:
                results |= _beside(sides, label, case, forms, arguments.turns)
        except SideError as error:
            results[label] = {"failed": str(error)}
    return results


def _beside(
    sides: dict[str, Worker], label: str, case: Case, forms: list[str], turns: int
) -> dict[str, Any]:
    """Times ours alone, and with each form of the peer turn about."""
    results = {label: _facts(sides[label], take_turns(sides, ("step",), turns)[label]["step"])}
    if forms and not version("torch"):
        results["PyTorch"] = {"failed": "not installed"}
        return results
    for form in forms:
        name = f"PyTorch, {form}"
        maker = ("benchmarks.peer_side:make_profiled_side", case, form)
        try:
            with workers({name: maker}) as peers:
                timed = take_turns({**sides, **peers}, ("step",), turns)
                results[name] = _facts(peers[name], timed[name]["step"])
                results[name]["kafjax_seconds"] = timed[label]["step"]
        except SideError as error:
            results[name] = {"failed": str(error)}
    return results


def _facts(side: Worker, times: list[float]) -> dict[str, Any]:
    return {
        "facts": side.facts,
        "seconds": times,
        "device_peak": side.ask("device_peak"),
        "kernels": side.ask("profile"),
    }


def make_tables(case: Case, compared: dict[str, Any], floor: float) -> list[Table]:
    """Times and memory of all sides; and each side's kernels."""
    columns = ["", "step", "of kafjax's time next to it", "slices/s", "of the paper floor"]
    table = Table(str(case), [*columns, "peak memory of the device"], [])
    tables = [table]
    for name, facts in compared.items():
        if "failed" in facts:
            table.rows.append([name, *[""] * (len(columns))])
            table.notes.append(f"{name}: {facts['failed']}")
            continue
        step = statistics.median(facts["seconds"])
        beside = statistics.median(facts.get("kafjax_seconds", facts["seconds"]))
        rate = case.batch_size / step
        share = f"{rate / floor:.0%}" if case.dtype == "bfloat16" else ""
        peak = gigabytes(facts["device_peak"])
        cells = [seconds(step), ratio(step / beside), f"{rate:.1f}", share, peak]
        table.rows.append([name, *cells])
        kernels = [[k[0][:90], seconds(k[1]), f"{k[2]:.1%}"] for k in facts["kernels"]]
        title = f"{name}, {case.dtype}, {case.size} px: kernels"
        tables.append(Table(title, ["kernel", "time a step", "share"], kernels))
    return tables


if __name__ == "__main__":
    run(parser(), measure)
