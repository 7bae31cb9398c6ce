"""JSON files that carry a checksum of themselves, so that a changed value is not believed.

Its field is `checksum`. A file without that field, written by hand, is taken as it is.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kafjax.files import write_text

FIELD = "checksum"


def checksum(fields: Mapping[str, Any]) -> str:
    """A digest of what JSON keeps of the fields, whatever their order."""
    text = json.dumps(json.loads(json.dumps(fields)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_checked(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Writes fields and their checksum, whole or not at all."""
    write_text(path, json.dumps({**fields, FIELD: checksum(fields)}, indent=2) + "\n")


def read_checked(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a file, without their checksum.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: its content is not JSON, not fields, or not what was written. The message does not
        name the file.
    """
    fields = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError("no fields")
    if FIELD in fields and fields.pop(FIELD) != checksum(fields):
        raise ValueError(
            f"changed since it was written: wrong {FIELD}; without that field it is taken as it is"
        )
    return fields
