"""Checks a NIfTI header against the standard before nibabel repairs it silently.

nibabel reads a spacing of 0 as 1 mm and an unknown form code as 0, and warns of both without the
file's name; here they are faults. Repairs that change neither the grid nor the values (a negative
spacing, the sign in pixdim[0], bitpix) are accepted. Source: the NIfTI-1 and NIfTI-2 standards.
"""

import contextlib
import io
import logging
import struct
import warnings
from collections.abc import Iterator

import nibabel as nib
import numpy as np
from nibabel import imageglobals

_KINDS = {348: nib.Nifti1Image, 540: nib.Nifti2Image}
_FORM_CODES = range(6)
_CORRECT = "correct the header"


def header_kind(content: bytes) -> type[nib.Nifti1Image] | None:
    """NIfTI-1 or NIfTI-2, by the header's size in its first four bytes; None if it is neither."""
    sizes = [struct.unpack(order + "i", content[:4])[0] for order in "<>" if len(content) >= 4]
    return next((_KINDS[size] for size in sizes if size in _KINDS), None)


def header_problem(kind: type[nib.Nifti1Image], content: bytes) -> tuple[str, str] | None:
    """The fault of a header and its remedy, or None.

    Raises whatever nibabel raises for a header that cannot be parsed.
    """
    header = kind.header_class.from_fileobj(io.BytesIO(content), check=False)
    magic = header["magic"].item()
    if not magic.startswith(b"n+"):
        what = "the header of a pair of files" if magic.startswith(b"ni") else "not NIfTI"
        return f"is {what} (its magic is {magic!r})", "save it as NIfTI in a single file"
    return _form_problem(header) or _scaling_problem(header)


@contextlib.contextmanager
def without_remarks() -> Iterator[None]:
    """Silences nibabel's log and warnings, which do not name the file."""
    level = imageglobals.logger.level
    imageglobals.logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        imageglobals.logger.setLevel(level)


def _form_problem(header: nib.Nifti1Header) -> tuple[str, str] | None:
    """Codes select the transformation; two of the three take the spacing from pixdim."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    for name, code in (("sform_code", sform), ("qform_code", qform)):
        if code not in _FORM_CODES:
            return f"its {name} is {code}", f"{_CORRECT}: expected 0 to {max(_FORM_CODES)}"
    spacing = header["pixdim"][1:4]
    if sform == 0 and not (np.isfinite(spacing) & (spacing != 0)).all():
        numbers = ", ".join(f"{mm:g}" for mm in spacing)
        return f"has no spacing (pixdim {numbers}, and no sform)", f"{_CORRECT}: give it in mm"
    return None


def _scaling_problem(header: nib.Nifti1Header) -> tuple[str, str] | None:
    """A slope of 0, or NaN as some tools write, means that values are not scaled."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isinf(slope):
        return f"its slope (scl_slope) is {slope}", f"{_CORRECT}: 0 if values are as stored"
    if slope != 0 and not np.isnan(slope) and not np.isfinite(intercept):
        found = f"its intercept (scl_inter) is {intercept}, though its slope is {slope:g}"
        return found, f"{_CORRECT}: an intercept of 0 if values are as stored"
    return None
