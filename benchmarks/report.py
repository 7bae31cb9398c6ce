"""Results with the machine and versions, as JSON and Markdown."""

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kafjax.cores import usable_cores

DEFAULT_FOLDER = Path("benchmarks/results")
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "torch", "monai", "grain", "opencv-python-headless")


@dataclass
class Table:
    """Rows of cells below their columns' names; numbers as they shall be printed."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table with its title and notes."""
        lines = [f"### {self.title}", ""]
        lines += [_row(self.columns), _row(["---"] * len(self.columns))]
        lines += [_row(row) for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)


@dataclass
class Result:
    """The answer to one question: tables to read, and the numbers behind them."""

    name: str  # of the module
    title: str
    tables: list[Table]
    numbers: dict[str, Any]
    settings: dict[str, Any]

    def markdown(self) -> str:
        """A section of docs/performance.md."""
        settings = " ".join(_flag(name, value) for name, value in self.settings.items())
        parts = [f"## {self.title}", f"`python -m benchmarks.{self.name} {settings}`"]
        return "\n\n".join([*parts, *(table.markdown() for table in self.tables)]) + "\n"


def write(result: Result, folder: Path) -> None:
    """Writes NAME.json and NAME.md into the folder, and prints the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {**asdict(result), "machine": machine(), "date": today()}
    (folder / f"{result.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{result.name}.md").write_text(result.markdown())
    print(result.markdown(), flush=True)


def gather(names: Iterable[str], folder: Path) -> str:
    """The page of all results that the folder holds, in the order of `names`.

    Raises `ValueError` where it holds none.
    """
    found = [name for name in names if (folder / f"{name}.json").exists()]
    if not found:
        raise ValueError(f"{folder} holds no results, expected some of {', '.join(names)}")
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in found}
    # Results of several machines or days say so each.
    origins = {name: (r["date"], describe(r["machine"])) for name, r in records.items()}
    shared = len(set(origins.values())) == 1
    parts = [" ".join(origins[found[0]]) + "\n"] if shared else []
    for name in found:
        parts.append((folder / f"{name}.md").read_text())
        parts += [] if shared else [" ".join(origins[name]) + "\n"]
    return "\n".join(parts)


def machine() -> dict[str, Any]:
    """The processor, its cores and memory, and the versions of what is compared."""
    return {
        "processor": _processor(),
        "cores": len(usable_cores()),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: v for name in _LIBRARIES if (v := version(name))},
    }


def describe(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items())
    accelerator = f"{facts['accelerator']}, " if "accelerator" in facts else ""
    return (
        f"{accelerator}{facts['cores']} cores of {facts['processor']}, {facts['memory_gb']} GB; "
        f"Python {facts['python']}, {versions}."
    )


def today() -> str:
    """The date."""
    return datetime.date.today().isoformat()


def version(library: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def gigabytes(value: float) -> str:
    """A number of bytes."""
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"


def ratio(value: float) -> str:
    """How many times."""
    return f"{value:.2f}x"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _flag(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    return f"--{name} {','.join(map(str, value)) if isinstance(value, list | tuple) else value}"
