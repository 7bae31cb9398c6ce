"""Synthetic chest CT volumes with a labelled heart, written as NIfTI in the CHD layout.

They replace clinical data where none is available: the demo, the tests, a first try. Each
subject has a trunk, lungs with vessel trees, spine and ribs, and the seven structures of the CHD
data set; its shape, pose, contrast, texture and noise are unique. All blood has the same
brightness, so a chamber is identified by its position, not by its intensity.

The files hold [x, y, z] as NIfTI does: x to the left, y to the back, z to the head of the patient.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.phantom.anatomy import sample_subject
from data_prep.phantom.drawing import Canvas, Texture, draw_slice
from kafjax.errors import UserError
from kafjax.files import replacing, write_text

MAX_SIZE = (512, 512, 200)
MIN_SIZE = (32, 32, 4)
FIRST_NUMBER = 1001
_KINDS = ("image", "label")
# Field of view in mm: everything except the flanks, from the liver's dome to the aortic arch.
FIELD_OF_VIEW = 264.0
HEIGHTS = (-72.0, 84.0)


def write_subjects(
    out_dir: Path,
    num_subjects: int,
    *,
    size: tuple[int, int, int] = (256, 256, 40),
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Path]:
    """Writes `ct_1001_image.nii.gz`, `ct_1001_label.nii.gz`, ... and returns the image files.

    `size` counts voxels along x, y and z; `progress` is called with each finished subject's name.
    A subject depends only on `size`, `seed` and its number. Subjects finished by an earlier call
    with the same arguments are kept. Raises `ValueError` for a size outside `MIN_SIZE` to
    `MAX_SIZE`, fewer than one subject, or a folder that holds other volumes: `overwrite` replaces
    phantoms and nothing else.
    """
    _check_arguments(num_subjects, size)
    out_dir.mkdir(parents=True, exist_ok=True)
    _claim(out_dir, {"num_subjects": num_subjects, "size": list(size), "seed": seed}, overwrite)
    images = []
    for number in range(FIRST_NUMBER, FIRST_NUMBER + num_subjects):
        name = f"ct_{number}"
        image_path, label_path = (out_dir / f"{name}_{kind}.nii.gz" for kind in _KINDS)
        if not (image_path.exists() and label_path.exists()):
            image, label = render(size, seed=seed, number=number)
            _write_nifti(image_path, image, _affine(size))
            _write_nifti(label_path, label, _affine(size))
        images.append(image_path)
        progress(name)
    return images


def _check_arguments(num_subjects: int, size: tuple[int, int, int]) -> None:
    if num_subjects < 1:
        raise UserError(f"num_subjects is {num_subjects}; it must be at least 1")
    if not all(low <= n <= high for low, n, high in zip(MIN_SIZE, size, MAX_SIZE, strict=True)):
        raise UserError(f"size is {size}; it must lie between {MIN_SIZE} and {MAX_SIZE}")


def _claim(out_dir: Path, recipe: dict[str, object], overwrite: bool) -> None:
    """Records the phantoms' recipe in the folder after checking that it may be used."""
    note, volumes = out_dir / "phantom.json", sorted(out_dir.glob("*.nii*"))
    if note.exists():
        try:
            found = json.loads(note.read_bytes())
        except ValueError as error:
            raise UserError(f"{note}: damaged ({error}); choose another folder") from None
        if found == recipe:
            return
        if not overwrite:
            raise UserError(
                f"{out_dir} holds phantoms of {found}, not {recipe}; "
                "choose another folder or pass --overwrite"
            )
    elif volumes:
        raise UserError(
            f"{out_dir} holds volumes that are not phantoms, such as "
            f"{volumes[0].name}; choose another folder"
        )
    for path in volumes:
        path.unlink()
    write_text(note, json.dumps(recipe))


def render(
    size: tuple[int, int, int], *, seed: int = 0, number: int = FIRST_NUMBER
) -> tuple[np.ndarray, np.ndarray]:
    """One subject's image, int16 HU, and label, uint8, both [x, y, z] of shape `size`."""
    rng = np.random.default_rng([seed, number])
    subject = sample_subject(rng)
    pixel, slice_spacing = _spacing(size)
    canvas = Canvas.of(size, pixel=pixel, slice_spacing=slice_spacing, bottom=HEIGHTS[0])
    texture = Texture(rng, canvas)
    image, label = np.empty(size, np.int16), np.empty(size, np.uint8)
    for k in range(size[2]):
        tissue, label_slice = draw_slice(subject, canvas, canvas.z[k])
        tissue += texture.next_slice(tissue, subject.noise)
        image[:, :, k] = np.clip(np.rint(tissue), -1024, 3071).T
        label[:, :, k] = label_slice.T
    return image, label


def _spacing(size: tuple[int, int, int]) -> tuple[float, float]:
    """Pixel edge and slice spacing in mm, to a thousandth as scanners state them."""
    return (
        round(FIELD_OF_VIEW / max(size[:2]), 3),
        round((HEIGHTS[1] - HEIGHTS[0]) / size[2], 3),
    )


def _affine(size: tuple[int, int, int]) -> np.ndarray:
    """Voxel index to NIfTI's mm (x right to left is negative there), [4, 4]."""
    pixel, slice_spacing = _spacing(size)
    affine = np.diag([-pixel, -pixel, slice_spacing, 1.0])
    affine[:3, 3] = [
        pixel * (size[0] - 1) / 2,
        pixel * (size[1] - 1) / 2,
        HEIGHTS[0] + slice_spacing / 2,
    ]
    return affine


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    with replacing(path) as partial:
        partial.write_bytes(gzip.compress(image.to_bytes(), 1, mtime=0))
