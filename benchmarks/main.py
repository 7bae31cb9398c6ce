"""Answers all questions that need no GPU, one after the other, and gathers the answers.

    python -m benchmarks.main                    # 16 to 31 minutes on two cores
    python -m benchmarks.main --only step,input
    python -m benchmarks.main --gather           # only writes performance.md of results at hand

Each question is a module that runs alone: `python -m benchmarks.step --help`. The GPU's is
`python -m benchmarks.cuda`.
"""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.flags import make_parser
from benchmarks.report import gather

QUESTIONS = ("step", "memory", "growth", "sinkhorn", "input", "preparation", "compute")
PAGE = "performance.md"
# Sizes at which numbers mean nothing: whether the commands work.
QUICK = {
    "step": "--cases unet:32:2:1 --num_keypoints 16 --turns 1",
    "memory": "--size 32 --num_keypoints 16 --filters 2 --turns 1 --micro_size 32 "
    "--micro_batch_size 2 --num_microbatches 2",
    "growth": "--filters 2 --base_size 32 --base_num_keypoints 16 --base_num_attention_layers 2 "
    "--size 32,64 --num_keypoints 16 --num_attention_layers 2 --batch_size 1 --turns 1",
    "sinkhorn": "--size 32 --num_keypoints 16 --filters 2 --batch_size 2 --num_iterations 10 "
    "--memory_iterations 5,10 --turns 1",
    "input": "--size 64 --num_slices 6 --num_keypoints 32 --batch_size 2 --num_batches 2 "
    "--step_seconds 0.05 --turns 1",
    "preparation": "--size 64 --num_slices 6 --num_keypoints 32 --num_volumes 2 --turns 1",
    "compute": "--edges 32,64 --num_keypoints 16 --filters 2",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; its exit status: 1 where a question failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", default=",".join(QUESTIONS), help="questions to answer")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that all works")
    parser.add_argument("--gather", action="store_true", help="measure nothing")
    arguments = parser.parse_args(argv)
    only = arguments.only.split(",")
    if unknown := [name for name in only if name not in QUESTIONS]:
        parser.error(f"--only has {', '.join(unknown)}, expected some of {', '.join(QUESTIONS)}")
    failed = []
    for name in [] if arguments.gather else only:
        if not answer(name, arguments.output, quick=arguments.quick):
            failed.append(name)
    try:
        page = gather((*QUESTIONS, "cuda"), arguments.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (arguments.output / PAGE).write_text(page)
    print(f"Wrote {arguments.output / PAGE}")
    if failed:
        print(f"error: no answer to {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def answer(name: str, folder: Path, *, quick: bool) -> bool:
    """Runs one question in a process of its own; whether it was answered."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--output", str(folder)]
    begin = time.perf_counter()
    status = subprocess.run(command + (QUICK[name].split() if quick else []), check=False)
    print(f"{name}: {time.perf_counter() - begin:.0f} s\n", flush=True)
    return status.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
