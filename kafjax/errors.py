"""Users' mistakes and our own, told apart.

What a command was given and cannot use raises `UserError` or, from the system, `OSError`: one line,
without a traceback. Anything else that ends a command is a fault of kafjax, and is reported as one.
"""

import importlib
import sys
import traceback

import kafjax

# Exit statuses of commands; docs/recipes.md says which of them to retry.
MISTAKE = 2
FAULT = 70  # EX_SOFTWARE of sysexits.h
TRY_AGAIN = 75  # EX_TEMPFAIL
# What XLA reports of a process that is gone, or of the network to it.
_LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "Gloo", "NCCL")
# Modules that only some commands need, and the extra of setup.cfg that has them.
_EXTRAS = {"cv2": "data", "nibabel": "data", "torch": "torch"}


class UserError(ValueError):
    """A mistake that the user can mend; the text says what was found and what was expected."""


def describe_fault(error: BaseException) -> str:
    """The traceback of an error that is no user's mistake, and what to do about it."""
    lines = "".join(traceback.format_exception(error))
    version = kafjax.__version__
    return (
        f"{lines}error: this is a fault of kafjax {version}: please report it with the lines above"
    )


def missing_extra(error: ModuleNotFoundError) -> str:
    """How to install a module of an extra that is not there; nothing for a module of ours."""
    extra = _EXTRAS.get(error.name or "")
    return f"{error.name} is missing; expected: pip install 'kafjax[{extra}]'" if extra else ""


def require_extra(extra: str) -> None:
    """Ends the program with one line if a module of an extra is not there."""
    for module in (name for name, of in _EXTRAS.items() if of == extra):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            print(f"error: {missing_extra(error) or error}", file=sys.stderr)
            sys.exit(MISTAKE)


def lost_process(error: BaseException) -> str:
    """What to do where another process of the run is gone, or the network to it; else nothing."""
    if type(error).__name__ != "JaxRuntimeError" or not any(word in str(error) for word in _LOST):
        return ""
    reason = " ".join(str(error).split())[:200]
    return f"another process of the run has ended; start all with the same command again ({reason})"


def out_of_memory(error: BaseException) -> str:
    """What helps where the memory of the machine or of a device does not suffice; else nothing."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"out of memory: a smaller batch or more config.num_microbatches need less ({reason})"
