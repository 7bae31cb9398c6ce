"""Traced programs, kept from one process to the next.

XLA's cache saves compiling, but its key is the traced and lowered program. Tracing a training step
of KAF-UNet takes Python seconds more at each start, most of the time to a second run's first step.
A kept program, StableHLO by `jax.export`, needs no tracing.

    <XLA's cache>/programs/<key>    a digest of the rest: the results' structure and the program

The key covers everything that tracing depends on: the config's fields that reach the network, the
arguments' shapes and places, the devices, JAX's options, the versions of the libraries and kafjax's
own files. Only commands keep programs, only for kafjax's own networks, and only for runs of one
process; everything else is traced as always. The folder is as private as XLA's cache, which holds
machine code.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import export

import kafjax
from kafjax.files import replacing

_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
_MOST = 100  # programs, about a megabyte each; the least recently used go
_folder: Path | None = None


def keep_programs(folder: Path | None) -> None:
    """Makes this process use the programs in a folder and add its own; None: neither.

    Nor does a process where flatbuffers is missing, which JAX needs to write programs but does not
    require.
    """
    global _folder
    _folder = folder if importlib.util.find_spec("flatbuffers") else None


class Program:
    """A jitted or mapped function, compiled on first use for each shape of its arguments.

    Args:
      function: with the method `lower` of jitted functions.
      facts: what the function depends on besides this package's code, for the key: texts, numbers
        and configs' fields. With a None among them, the function is never kept.
      donate_argnums: arguments whose memory the results may reuse, as `function` declares them.
      after_compiling: called after each compilation.
    """

    def __init__(
        self,
        function: Any,
        *facts: Any,
        donate_argnums: tuple[int, ...] = (),
        after_compiling: Callable[[], None] = lambda: None,
    ):
        self._function = function
        self._facts = None if None in facts else facts
        self._donate_argnums = donate_argnums
        self._after_compiling = after_compiling
        self._programs: dict[Any, Callable[..., Any] | None] = {}  # of flat leaves, if kept

    def lower(self, *arguments: Any) -> Any:
        """Lowers the function, as `jax.jit(...).lower` does."""
        return self._function.lower(*arguments)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        leaves, structure = jax.tree.flatten(arguments)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return self._function(*arguments)
        shapes = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if shapes not in self._programs:
            self._programs[shapes] = self._kept(arguments, leaves, structure)
            if self._programs[shapes] is None:
                self.lower(*arguments).compile()  # the call reuses it
            self._after_compiling()
        program = self._programs[shapes]
        return self._function(*arguments) if program is None else program(*leaves)

    def _kept(
        self, arguments: tuple[Any, ...], leaves: list[Any], structure: Any
    ) -> Callable[..., Any] | None:
        """The program by its export, compiled; None if there is none and none can be made."""
        if _folder is None or self._facts is None or jax.process_count() > 1:
            return None
        path = _folder / _key(self._facts, leaves, structure)
        found = _load(path)
        if found is None:
            found = self._export(leaves, structure)
            if found is None:
                return None
            _store(path, *found)
        results, exported = found
        ends = [0, *itertools.accumulate(len(jax.tree.leaves(given)) for given in arguments)]
        donated = [n for i in self._donate_argnums for n in range(ends[i], ends[i + 1])]
        call = jax.jit(exported.call, donate_argnums=donated)
        call.lower(*leaves).compile()  # the call reuses it
        return lambda *leaves: jax.tree.unflatten(results, call(*leaves))

    def _export(self, leaves: list[Any], structure: Any) -> tuple[Any, export.Exported] | None:
        """The structure of the function's results, and the function of and to flat leaves."""
        structures = []

        def flat(*leaves: Any) -> list[Any]:
            results, found = jax.tree.flatten(
                self._function(*jax.tree.unflatten(structure, leaves))
            )
            structures.append(found)
            return results

        try:
            exported = export.export(jax.jit(flat))(*leaves)
        except (ValueError, NotImplementedError):  # a custom call that JAX does not guarantee
            return None
        return structures[0], exported


def _key(facts: Any, leaves: list[Any], structure: Any) -> str:
    """A digest of everything that tracing depends on."""
    parts = (
        *(facts, str(structure), [(x.shape, str(x.dtype), str(x.sharding)) for x in leaves]),
        [(device.id, device.device_kind) for device in jax.devices()],
        *(_own_files(), [importlib.metadata.version(library) for library in _LIBRARIES]),
        sorted((name, str(value)) for name, value in jax.config.values.items()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _own_files() -> list[tuple[str, int, int]]:
    """Name, size and time of each of kafjax's source files."""
    root = Path(kafjax.__file__).parent
    found = ((path, path.stat()) for path in sorted(root.rglob("*.py")))
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _load(path: Path) -> tuple[Any, export.Exported] | None:
    """A kept program with its results' structure, or None where there is none that is whole."""
    try:
        digest, data = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(data).hexdigest().encode() != digest:
            return None
        results, exported = pickle.loads(data)
        os.utime(path)
        return results, export.deserialize(bytearray(exported))
    except (OSError, ValueError):
        return None


def _store(path: Path, results: Any, exported: export.Exported) -> None:
    """Keeps a program if the folder allows it, and forgets those least recently used."""
    data = pickle.dumps((results, bytes(exported.serialize())))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
        kept = sorted(path.parent.iterdir(), key=lambda found: found.stat().st_mtime_ns)
        for old in kept[:-_MOST]:
            old.unlink(missing_ok=True)
