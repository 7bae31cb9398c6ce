"""What the benchmarks' commands share: flags, and one line for a mistake."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from kafjax.xla import leave_out_ynnpack


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the question as its help, and where results go."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=report.DEFAULT_FOLDER, help="folder")
    return parser


def network_flags(
    parser: argparse.ArgumentParser, *, size: int = 512, num_keypoints: int = 400, filters: int = 32
) -> None:
    """The sizes of a case."""
    parser.add_argument("--size", type=int, default=size, help="pixels, both edges")
    parser.add_argument("--num_keypoints", type=int, default=num_keypoints)
    parser.add_argument("--filters", type=int, default=filters)
    parser.add_argument("--batch_size", type=int, default=1, help="slices")


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas, as a flag's type."""
    return tuple(int(part) for part in text.split(","))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that repeat a result."""
    return {
        k: v for k, v in vars(arguments).items() if k != "output" and v not in (None, "", False)
    }


def run(
    parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], report.Result]
) -> None:
    """Parses, measures and writes; a mistake is one line and status 2."""
    arguments = parser.parse_args()
    leave_out_ynnpack()  # as the product's commands do; processes started later do as well
    try:
        report.write(measure(arguments), arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(_fail(error, 2))
    except RuntimeError as error:
        sys.exit(_fail(error, 1))


def _fail(error: Exception, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
