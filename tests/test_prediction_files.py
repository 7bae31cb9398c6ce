"""Which files are scans, where their results go, and that these appear whole or not at all."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from kafjax.inference.label_files import write_like
from kafjax.inference.prediction_files import Request, list_requests


def names(requests: list[Request]) -> list[tuple[str, str, str]]:
    return [(j.source.image.name, j.source.id, j.labels.name) for j in requests]


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_scans_of_a_folder_are_known_by_their_names_and_the_rest_is_named(tmp_path: Path) -> None:
    files = {
        "chd": (
            *("ct_1001_image.nii.gz", "ct_1001_label.nii.gz", "ct_1002_label.nii.gz"),
            *("other.nii", ".hidden.nii", "._other.nii", ".DS_Store", "other.json", "a.txt"),
        ),
        "acdc": (
            *("patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz", "patient001_4d.nii"),
            *("patient002_4d.nii.gz", "patient003_frame01_gt.nii.gz", "Info.cfg"),
        ),
        "nnunet": ("a-b_0000.nii.gz", "a-b_0001.nii.gz", "plain.nii.gz", "amos_0002.nii.gz"),
    }
    found, left_out = {}, {}
    for kind, listed in files.items():
        make(tmp_path / kind, *listed)
        facts = {"kind": kind, "channel": 0}
        listing = list_requests(tmp_path / kind, tmp_path / "out", facts)
        found[kind] = names(listing.requests)
        left_out[kind] = {fault.path.name for fault in listing.left_out}
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
    assert left_out == {
        "chd": {"ct_1002_label.nii.gz", ".hidden.nii", "a.txt"},
        "acdc": {"patient002_4d.nii.gz", "patient003_frame01_gt.nii.gz"},
        "nnunet": {"amos_0002.nii.gz"},
    }


def test_four_digits_are_a_channel_and_how_to_say_otherwise(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "amos_0001.nii.gz")
    requests, (fault,) = list_requests(folder, tmp_path / "out", {"kind": "nnunet", "channel": 0})
    assert requests == []
    assert fault.found == "belongs to channel 1 by its name, the runs use channel 0"
    assert "amos_0001_0000.nii.gz" in fault.remedy


def test_links_folders_and_capitals_are_named_and_stop_no_other(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.nii.gz", "b.NII.GZ", "c.mgz")
    (folder / "d.nii.gz").symlink_to("nowhere")
    (folder / "e.nii.gz").mkdir()
    make(folder / "more", "f.nii.gz")
    make(folder / "out" / "labels")
    requests, left_out = list_requests(folder, folder / "out" / "labels", {"kind": "chd"})
    assert names(requests) == [("a.nii.gz", "a", "a.nii.gz")]
    assert {fault.path.name: fault.found for fault in left_out} == {
        "b.NII.GZ": "its ending has capitals",
        "c.mgz": "is an image of another format",
        "d.nii.gz": "is a link to nowhere, which does not exist",
        "e.nii.gz": "is a folder with the name of a scan",
        "more": "is a folder that is not used, with 1 scans",
    }


def test_what_an_earlier_prediction_wrote_is_no_scan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def save(name: str, array: np.ndarray) -> None:
        nib.save(nib.Nifti1Image(array, np.diag([-1.5, -1.5, 4, 1])), tmp_path / name)

    def listed() -> tuple[list[str], list[str]]:
        facts = {"kind": "nnunet", "channel": 0, "classes": ["background", "liver"]}
        requests, left_out = list_requests(tmp_path, tmp_path, facts, probabilities=True)
        return [request.source.image.name for request in requests], [
            fault.path.name for fault in left_out
        ]

    save("a_0000.nii.gz", rng.integers(0, 99, (5, 6, 4)).astype(np.int16))
    before = listed()
    save("a.nii.gz", rng.integers(0, 2, (5, 6, 4)).astype(np.uint8))
    save("a_probabilities.nii.gz", rng.random((5, 6, 4, 2)).astype(np.float32))
    assert before == listed() == (["a_0000.nii.gz"], [])
    # A scan in that place is never taken for labels.
    for other in (rng.integers(0, 9, (5, 6, 4)), rng.integers(0, 2, (5, 6, 3))):
        save("a.nii.gz", other.astype(np.uint8))
        assert listed() == ([], ["a.nii.gz", "a_0000.nii.gz"])


def test_places_that_would_lose_files_are_refused(tmp_path: Path) -> None:
    def listed(source: Path, target: Path, **facts: Any) -> Any:
        return list_requests(source, target, {"kind": "chd", **facts})

    def wrong(source: Path, target: Path, **facts: Any) -> list[str]:
        requests, left_out = listed(source, target, **facts)
        assert not requests
        return [f"{fault.path.name}: {fault.found}" for fault in left_out]

    one = tmp_path / "in" / "a_0000.nii.gz"
    one.parent.mkdir()
    with pytest.raises(ValueError, match="holds no scan"):
        listed(one.parent, tmp_path / "out")
    with pytest.raises(ValueError, match="no such file"):
        listed(one, tmp_path / "out")
    two = one.with_name("a.nii.gz")
    for path in (one, two):
        path.touch()
    assert wrong(one.parent, one.parent) == [
        f"{path.name}: its result, {path}, would overwrite a scan" for path in (two, one)
    ]
    assert wrong(one, one) == [f"a_0000.nii.gz: its result, {one}, would overwrite a scan"]
    place = tmp_path / "out" / "a.nii.gz"
    assert wrong(one.parent, tmp_path / "out", kind="nnunet", channel=0) == [
        f"{path.name}: its result, {place}, is also another scan's" for path in (two, one)
    ]
    (fault,) = listed(one, tmp_path / "out", kind="nnunet", channel=1).left_out
    assert "belongs to channel 0 by its name, the runs use channel 1" in fault.found
    assert listed(one, tmp_path / "x" / "y.nii").requests[0].labels == tmp_path / "x" / "y.nii"


@pytest.mark.parametrize("name", ["l.mgz", "l.nhdr", "l.NII.GZ", "l.nii.bz2", "l.png", "l.json"])
def test_an_output_of_another_format_is_never_a_folder(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "a.nii.gz")
    for source in (folder, folder / "a.nii.gz"):
        with pytest.raises(ValueError, match=r"output is .*; expected "):
            list_requests(source, tmp_path / name, {"kind": "chd"})
    with pytest.raises(ValueError, match="expected a folder, as the input is one"):
        list_requests(folder, tmp_path / "out.nii.gz", {"kind": "chd"})
    (tmp_path / name).mkdir()  # whoever has such a folder may use it
    (request,), _ = list_requests(folder, tmp_path / name, {"kind": "chd"})
    assert request.labels == tmp_path / name / "a.nii.gz"


def test_a_name_that_the_disk_would_not_take_is_refused_first(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", f"{'a' * 240}.nii.gz", "b.nii.gz")
    requests, (fault,) = list_requests(folder, tmp_path / "out", {"kind": "chd"})
    assert [request.source.id for request in requests] == ["b"]
    assert "is too long" in fault.found


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
