"""Nothing in a folder is skipped silently: each entry is used, harmless, or named with a reason."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.acdc import AcdcReader
from data_prep.chd import ChdReader
from data_prep.entries import list_entries
from data_prep.faults import Fault, finding, findings_text, refuse, sort_faults
from data_prep.nnunet import open_nnunet
from kafjax.inference.prediction_files import list_requests

_JSON = (
    '{"channel_names": {"0": "CT", "1": "T2"}, "labels": {"background": 0, "liver": 1}, '
    '"file_ending": ".nii.gz"}'
)


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def write_nnunet(raw: Path) -> list[Path]:
    """A sound folder of empty files, and the folders in which odd entries are tried."""
    touch(raw / "imagesTr", *(f"c{n}_000{channel}.nii.gz" for n in (1, 2) for channel in (0, 1)))
    touch(raw / "labelsTr", "c1.nii.gz")
    (raw / "dataset.json").write_text(_JSON)
    return [raw, raw / "imagesTr", raw / "labelsTr", raw / "imagesTs"]


def write_acdc(raw: Path) -> list[Path]:
    stem = "patient001_frame0"
    touch(raw / "patient001", *(f"{stem}{n}{end}.nii.gz" for n in (1, 4) for end in ("", "_gt")))
    touch(raw / "patient001", "patient001_4d.nii.gz")
    (raw / "patient001" / "Info.cfg").write_text("ED: 1\nES: 4\n")
    return [raw, raw / "patient001", raw / "training"]


def write_chd(raw: Path) -> list[Path]:
    touch(raw, "ct_1001_image.nii.gz", "ct_1001_label.nii.gz")
    return [raw]


LAYOUTS = {
    "nnunet": (write_nnunet, open_nnunet),
    "acdc": (write_acdc, lambda raw: AcdcReader()),
    "chd": (write_chd, lambda raw: ChdReader()),
}
# Of the layouts themselves; channels and cines belong to volumes.
_PARTS = {
    *("dataset.json", "imagesTr", "labelsTr", "imagesTs", "training", "testing"),
    *("patient001", "Info.cfg", "patient001_4d.nii.gz", "c1_0001.nii.gz", "c2_0001.nii.gz"),
}

stems = st.one_of(
    st.sampled_from(
        ["c1", "c1_0000", "c1_0001", "c3_0000", "c3_0002", "amos_0001", "C1_0000", "c 4_0000"]
    ),
    st.sampled_from(["ct_1001_image", "ct_01001_label", "ct_7_image", "CT_1001_image", "scan"]),
    st.sampled_from(["patient001_frame01", "patient002_frame01", "Patient001", "patient_1"]),
    st.sampled_from(["imagestr", "LabelsTr", "info", "Training", "dataset", "README", ".hidden"]),
    st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8),
)
endings = st.sampled_from(
    [".nii.gz", ".nii", ".NII.GZ", ".nii.gz.part", ".mha", ".json", ".txt", ".cfg", "", ".gz"]
)
_SYSTEMS = [".DS_Store", "Thumbs.db", "desktop.ini"]
of_systems = st.sampled_from([*_SYSTEMS, "._c1_0000.nii.gz"])
names = st.one_of(st.builds("{}{}".format, stems, endings), of_systems).filter(
    lambda name: name not in (".", "..") and len(os.fsencode(name)) < 200
)
kinds = st.sampled_from(["file", "folder", "full folder", "link to nothing", "fifo"])
entries = st.lists(st.tuples(names, kinds, st.integers(0, 3)), min_size=1, max_size=5)


def add(path: Path, kind: str) -> None:
    """An entry of a kind, unless the name is taken."""
    if os.path.lexists(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.touch()
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
        if kind == "full folder":
            (path / "c9_0000.nii.gz").touch()


def is_harmless(path: Path) -> bool:
    """By the test's own rule."""
    beside = {other.name.lower() for other in path.parent.iterdir()}
    stem = path.name.removesuffix(".json")
    side_car = path.is_file() and stem != path.name
    side_car &= bool({f"{stem}.nii".lower(), f"{stem}.nii.gz".lower()} & beside)
    return side_car or path.name in _SYSTEMS or path.name.startswith("._")


def passed_over(folder: Path, used: set[Path], faults: list[Fault]) -> list[str]:
    """The entries at any depth that are neither used nor reported."""
    named = {fault.path for fault in faults}
    found = []
    for path in sorted(folder.iterdir()):
        if path in used or path in named or is_harmless(path):
            continue
        if path.name in _PARTS and path.is_dir():
            found += passed_over(path, used, faults)
        elif path.name not in _PARTS:
            found.append(str(path))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(odd=entries)
def test_each_entry_of_a_raw_folder_is_used_or_named(layout: str, odd: list) -> None:
    write, reader_of = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        places = write(raw)
        sound = {path for source in reader_of(raw).find(raw)[0] for path in source.files}
        for name, kind, place in odd:
            add(places[place % len(places)] / name, kind)
        sources, faults = reader_of(raw).find(raw)
        used = {path for source in sources for path in source.files}
        assert passed_over(raw, used, faults) == []
        assert all(path.is_file() for path in used)
        assert all(str(fault.path).startswith(str(raw)) and fault.remedy for fault in faults)
        assert used >= sound or any(fault.stops for fault in faults)  # none is lost quietly


@pytest.mark.parametrize("kind", LAYOUTS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(odd=entries)
def test_each_entry_of_a_folder_to_predict_is_used_or_named(kind: str, odd: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scans = Path(folder) / "scans"
        touch(scans, "c1_0000.nii.gz", "ct_1001_image.nii.gz", "ct_1001_label.nii.gz")
        for name, entry, _ in odd:
            add(scans / name, entry)
        jobs, left_out = list_requests(scans, Path(folder) / "out", {"kind": kind, "channel": 0})
        used = {job.source.image for job in jobs}
        belonging = {
            "chd": {scans / "ct_1001_label.nii.gz"},
            "acdc": {scans / "patient001_4d.nii.gz"},
            "nnunet": {scans / "c1_0001.nii.gz", scans / "c1_0001.nii"},
        }[kind]
        assert set(passed_over(scans, used, left_out)) <= set(map(str, belonging))
        assert scans / "c1_0000.nii.gz" in used or any(
            fault.path == scans / "c1_0000.nii.gz" for fault in left_out
        )


def test_an_unreadable_folder_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_listing(_: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_prep.entries.os.listdir", refuse_listing)
    (fault,) = list_entries(tmp_path).faults
    assert (fault.path, fault.found) == (tmp_path, "cannot be read (Permission denied)")


def test_a_finding_stops_nothing_unless_it_is_strict(tmp_path: Path) -> None:
    note, fault = finding(tmp_path, "is odd", "look"), Fault(tmp_path, "is bad", "mend it")
    assert refuse(sort_faults([note])) == (note,)
    for faults in (sort_faults([note], strict=True), [note, fault]):
        with pytest.raises(ValueError, match="is odd"):
            refuse(faults)


def test_findings_of_one_name_are_one_line() -> None:
    found = [finding(Path(f"p{n}/README.md"), "is not used", "look") for n in range(3)]
    found.append(finding(Path("p0/notes"), "is not used", "look"))
    assert list(findings_text(found)) == [
        "p0/README.md, and 2 others of that name: is not used; look",
        "p0/notes: is not used; look",
    ]
