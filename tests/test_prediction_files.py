"""Which files are scans, where their results go, and that these appear whole or not at all."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from kafjax.inference.prediction_files import Job, list_jobs, write_like


def names(jobs: list[Job]) -> list[tuple[str, str, str]]:
    return [(j.source.image.name, j.source.id, j.labels.name) for j in jobs]


def test_scans_of_a_folder_are_known_by_their_names(tmp_path: Path) -> None:
    files = {
        "chd": [
            "ct_1001_image.nii.gz",
            "ct_1001_label.nii.gz",
            "other.nii",
            ".hidden.nii",
            "a.txt",
        ],
        "acdc": ["patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz", "patient001_4d.nii"],
        "nnunet": ["a-b_0000.nii.gz", "a-b_0001.nii.gz", "plain.nii.gz"],
    }
    found = {}
    for kind, listed in files.items():
        (tmp_path / kind).mkdir()
        for name in listed:
            (tmp_path / kind / name).touch()
        facts = {"kind": kind, "channel": 0}
        found[kind] = names(list_jobs(tmp_path / kind, tmp_path / "out", facts))
    assert found == {
        "chd": [
            ("ct_1001_image.nii.gz", "ct_1001", "ct_1001_image.nii.gz"),
            ("other.nii", "other", "other.nii"),
        ],
        "acdc": [("patient001_frame01.nii.gz", "patient001_frame01", "patient001_frame01.nii.gz")],
        "nnunet": [
            ("a-b_0000.nii.gz", "a_x2d_b", "a-b.nii.gz"),
            ("plain.nii.gz", "plain", "plain.nii.gz"),
        ],
    }


def test_places_that_would_lose_files_are_refused(tmp_path: Path) -> None:
    def listed(source: Path, target: Path, **facts: Any) -> Any:
        return list_jobs(source, target, {"kind": "chd", **facts})

    one = tmp_path / "in" / "a_0000.nii.gz"
    one.parent.mkdir()
    with pytest.raises(ValueError, match="holds no scan"):
        listed(one.parent, tmp_path / "out")
    with pytest.raises(ValueError, match="no such file"):
        listed(one, tmp_path / "out")
    for path in (one, one.with_name("a.nii.gz")):
        path.touch()
    with pytest.raises(ValueError, match=r"a.nii.gz: is one of the scans\n.*a_0000.nii.gz: is one"):
        listed(one.parent, one.parent)
    with pytest.raises(ValueError, match="is one of the scans"):
        listed(one, one)
    with pytest.raises(ValueError, match="place of 2 results"):
        listed(one.parent, tmp_path / "out", kind="nnunet", channel=0)
    with pytest.raises(ValueError, match="expected a folder"):
        listed(one.parent, tmp_path / "out.nii.gz")
    with pytest.raises(ValueError, match="not that of a scan in the nnunet layout"):
        listed(one, tmp_path / "out", kind="nnunet", channel=1)
    assert listed(one, tmp_path / "x" / "y.nii")[0].labels == tmp_path / "x" / "y.nii"


@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_header_is_the_sources_but_for_type_and_scaling(
    tmp_path: Path, endianness: str, kind: Any
) -> None:
    rng = np.random.default_rng(0)
    header = kind.header_class(endianness=endianness)
    image = kind(rng.integers(-900, 900, (7, 9, 4)).astype(np.int16), None, header)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a scan"
    image.set_sform(np.diag([-1.5, -1.7, 2.0, 1.0]), 1)
    image.set_qform(np.diag([-1.5, -1.7, 2.0, 1.0]), 2)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"kept"))
    image.header.set_slope_inter(2, -1000)
    nib.save(image, tmp_path / "scan.nii")
    before: Any = nib.load(tmp_path / "scan.nii")
    results: dict[str, np.ndarray] = {
        "labels.nii.gz": rng.integers(0, 8, (7, 9, 4)).astype(np.uint8),
        "probabilities.nii": rng.random((7, 9, 4, 8)).astype(np.float32),
    }
    for name, array in results.items():
        write_like(tmp_path / name, array, before)
        found: Any = nib.load(tmp_path / name)
        assert type(found) is kind
        assert found.header.endianness == endianness
        assert found.get_data_dtype().newbyteorder("=") == array.dtype
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), array)
        assert (found.dataobj.slope, found.dataobj.inter) == (1, 0)
        np.testing.assert_array_equal(found.affine, before.affine)
        changed = {
            field
            for field in before.header
            if not np.array_equal(found.header[field], before.header[field])
        }
        # Scaling, which headers forget when they are read, is above.
        assert changed <= {"datatype", "bitpix", "dim", "scl_slope", "scl_inter"}
        assert [e.get_content() for e in found.header.extensions] == [b"kept"]


def test_stopped_while_writing_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = nib.Nifti1Image(np.zeros((7, 9, 4), np.int16), np.eye(4))

    def stop(image: Any, stream: Any) -> None:
        stream.write(b"half")
        assert len(list((tmp_path / "out").iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(nib.Nifti1Image, "to_stream", stop)
    with pytest.raises(KeyboardInterrupt):
        write_like(tmp_path / "out" / "labels.nii.gz", np.zeros((7, 9, 4)), image)
    assert list((tmp_path / "out").iterdir()) == []
