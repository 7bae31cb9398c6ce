"""Separates users' mistakes from faults of kafjax.

Bad input to a command raises `UserError` or, from the system, `OSError`: one line, without a
traceback. Any other error that ends a command is reported as a fault of kafjax.
"""

import importlib
import sys
import traceback
from typing import Any

import kafjax

# Exit statuses of commands; docs/recipes.md lists which to retry.
MISTAKE = 2
FAULT = 70  # EX_SOFTWARE of sysexits.h
TRY_AGAIN = 75  # EX_TEMPFAIL
LOST = "another process of the run has ended; start all with the same command again"
# XLA's errors when a process, or the network to it, is lost.
_LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "Gloo", "NCCL")
# Modules that only some commands need, and the extra in setup.cfg that installs them.
_EXTRAS = {
    "cv2": "data",
    "nibabel": "data",
    "torch": "torch",
    **dict.fromkeys(("SimpleITK", "pydicom", "highdicom"), "formats"),
    "onnxruntime": "onnx",
    "huggingface_hub": "hub",
    "s3fs": "s3",
    "gcsfs": "gcs",
    **dict.fromkeys(("distributed", "dask", "dask_jobqueue"), "cluster"),
}


class UserError(ValueError):
    """A mistake that the user can fix; the message states what was found and expected."""


def describe_fault(error: BaseException) -> str:
    """The traceback of an unexpected error, and a request to report it."""
    lines = "".join(traceback.format_exception(error))
    version = kafjax.__version__
    return (
        f"{lines}error: this is a fault of kafjax {version}: please report it with the lines above"
    )


def missing_extra(error: ModuleNotFoundError) -> str:
    """How to install a missing module of an extra; empty for other modules."""
    extra = _EXTRAS.get(error.name or "")
    return f"{error.name} is missing; expected: pip install 'kafjax[{extra}]'" if extra else ""


def import_extra(module: str) -> Any:
    """A module of an extra. Raises `UserError`, which says how to install it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if advice := missing_extra(error):
            raise UserError(advice) from error
        raise


def require_extra(extra: str) -> None:
    """Exits with one line if a module of an extra is missing."""
    for module in (name for name, of in _EXTRAS.items() if of == extra):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            print(f"error: {missing_extra(error) or error}", file=sys.stderr)
            sys.exit(MISTAKE)


def lost_process(error: BaseException) -> str:
    """Advice if another process of the run, or the network to it, is lost; else empty."""
    if type(error).__name__ != "JaxRuntimeError" or not any(word in str(error) for word in _LOST):
        return ""
    reason = " ".join(str(error).split())[:200]
    return f"{LOST} ({reason})"


def out_of_memory(error: BaseException) -> str:
    """Advice if the machine or a device ran out of memory; else empty."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"out of memory: a smaller batch or more config.num_microbatches need less ({reason})"
