"""Buckets: alike here and there, whole or not at all, held by one owner, read by ranges."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kafjax.buckets import BucketError, copy_of, fetch, ranges, send, show, store, url_of
from kafjax.buckets.places import known_of
from kafjax.buckets.store import list_objects
from kafjax.data.dataset import SliceDataset, open_dataset
from kafjax.data.records import INDEX_NAME, RecordError
from kafjax.errors import UserError
from kafjax.paths import expand, split_list
from tests.buckets import BUCKET, Proxy, forget_connections, move_to_machine, texts, write_files
from tests.runs import free_address


def test_a_url_has_a_place_here_and_messages_name_the_url(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KAFJAX_CACHE", str(tmp_path))
    copy = copy_of("gcs://b/runs/x/")
    assert copy == tmp_path / "buckets/gs/b/runs/x"
    assert url_of(copy) == "gs://b/runs/x"
    assert url_of("/etc/hosts") is None
    assert show(f"{copy}/split.json: damaged") == "gs://b/runs/x/split.json: damaged"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("s3://b/../../etc", "empty part, . or .."),
        ("s3://b//x", "empty part, . or .."),
        ("https://host/scan.nii", "not a bucket's"),
        ("s3://", "not a bucket's"),
        ("nosuchthing://b/x", "unknown kind of URL"),
    ],
)
def test_what_is_no_bucket_is_refused_in_a_line(place: str, reason: str) -> None:
    with pytest.raises(UserError) as told:
        expand(place)
    assert str(told.value).startswith(place)
    assert reason in str(told.value)
    assert "\n" not in str(told.value)


def test_only_changes_travel_and_the_bucket_decides(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = fetch(bucket_url)
    assert not copy.exists()
    write_files(copy, a="1", sub__b="2", **{".hidden": "3", "lock": "4"})
    send(copy)
    assert set(list_objects(bucket_url)) == {"a", "sub/b"}
    monkeypatch.setattr(store, "_request", None)  # nothing changed: no request
    send(copy)
    monkeypatch.undo()


def test_another_machine_has_what_was_sent(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = fetch(bucket_url)
    write_files(copy, a="1", b="2", sub__c="3")
    send(copy)
    move_to_machine(monkeypatch, tmp_path / "other")
    other = fetch(bucket_url)
    assert other != copy
    assert texts(other) == {"a": "1", "b": "2", "sub/c": "3"}
    write_files(other, a="changed there")
    send(other)
    store.delete_object(f"{bucket_url}/b")
    move_to_machine(monkeypatch, tmp_path / "cache")
    write_files(copy, unsent="kept")
    assert texts(fetch(bucket_url)) == {"a": "changed there", "sub/c": "3", "unsent": "kept"}
    store.delete_object(f"{bucket_url}/sub/c")
    assert not (fetch(bucket_url) / "sub").exists()
    write_files(copy, sub__c="3")
    send(copy)
    single = fetch(f"{bucket_url}/sub/c")
    assert single.read_text() == "3"


def test_a_checkpoint_without_its_marker_is_not_there(bucket_url: str) -> None:
    step = {"state": "x", "_CHECKPOINT_METADATA": "{}"}
    for name, text in step.items():
        store.write_object(f"{bucket_url}/run/checkpoints/1/{name}", text.encode())
    store.write_object(f"{bucket_url}/run/checkpoints/2/state", b"half")
    assert set(texts(fetch(bucket_url))) == {f"run/checkpoints/1/{name}" for name in step}


def test_markers_go_last_and_first(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    write, delete = store.write_object, store.delete_object

    def note(word: str, place: str) -> None:
        done.append(f"{word} {place.removeprefix(bucket_url + '/')}")

    monkeypatch.setattr(store, "write_object", lambda u, c: (note("write", u), write(u, c)))
    monkeypatch.setattr(
        "kafjax.buckets.mirror.delete_object", lambda u: (note("delete", u), delete(u))
    )
    copy = fetch(bucket_url)
    write_files(copy, dataset_info__json="", **{"d/dataset_info.json": "1", "d/a": "1", "d/z": "1"})
    shutil.rmtree(copy / "dataset_info")
    send(copy)
    assert done[-1] == "write d/dataset_info.json"
    done.clear()
    write_files(copy, d__z="2")
    (copy / "d/a").unlink()
    send(copy)
    assert done == [
        "delete d/dataset_info.json",
        "write d/z",
        "write d/dataset_info.json",
        "delete d/a",
    ]
    done.clear()
    shutil.rmtree(copy / "d")
    send(copy)
    assert done[0] == "delete d/dataset_info.json"
    assert list_objects(bucket_url) == {}


def test_a_name_that_points_elsewhere_is_refused(
    bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {f"{BUCKET}/x/../../../outside": {"type": "file", "size": 1}}
    monkeypatch.setattr(store, "_find", lambda *_: found)
    with pytest.raises(UserError, match=r"x/\.\./\.\./\.\./outside: names with"):
        fetch(f"s3://{BUCKET}/x")
    assert not list(tmp_path.rglob("outside"))


def test_a_read_that_breaks_off_is_tried_again(bucket_url: str, proxy: Proxy) -> None:
    content = np.random.default_rng(0).bytes(1 << 20)
    store.write_object(f"{bucket_url}/a", content)
    proxy.cuts, proxy.after = 1, 100_000
    assert store.read_range(f"{bucket_url}/a", 1 << 19, 7) == content[7 : 7 + (1 << 19)]
    assert proxy.cuts == 0
    proxy.cuts = 1
    assert fetch(bucket_url).joinpath("a").read_bytes() == content


def test_a_read_that_always_breaks_off_leaves_nothing(bucket_url: str, proxy: Proxy) -> None:
    store.write_object(f"{bucket_url}/a", bytes(1 << 20))
    proxy.cuts, proxy.after = 10**6, 100_000
    with pytest.raises(BucketError) as told:
        fetch(bucket_url)
    assert str(told.value).startswith(f"{bucket_url}/a: ")
    assert "\n" not in str(told.value)
    assert list(copy_of(bucket_url).rglob("*")) == []


def test_a_send_that_breaks_off_changes_nothing_there(bucket_url: str, proxy: Proxy) -> None:
    copy = fetch(bucket_url)
    write_files(copy, a="before")
    send(copy)
    (copy / "a").write_bytes(bytes(1 << 20))
    proxy.cuts, proxy.upwards, proxy.after = 10**6, True, 100_000
    with pytest.raises(BucketError, match=bucket_url):
        send(copy)
    proxy.cuts = 0
    assert store.read_object(f"{bucket_url}/a") == b"before"
    send(copy)
    assert store.read_object(f"{bucket_url}/a") == bytes(1 << 20)


def test_a_missing_bucket_and_missing_credentials_are_named(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^s3://nowhere/x: no such bucket \(.*\)$"):
        expand("s3://nowhere/x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    forget_connections()
    with pytest.raises(UserError, match=rf"^s3://{BUCKET}/x: no credentials .*docs/recipes.md"):
        expand(f"s3://{BUCKET}/x")


def test_a_missing_library_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def fail(_: str) -> None:
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(UserError, match=r"gs://b/x: gcsfs is missing; .* 'kafjax\[gcs\]'"):
        expand("gs://b/x")


def test_lists_have_urls_too(bucket_url: str, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    assert split_list(f"{bucket_url}/1,{tmp_path}/a,b,{bucket_url}/2,c") == [
        f"{bucket_url}/1",
        f"{tmp_path}/a,b",
        f"{bucket_url}/2",
        "c",
    ]


# Records.


@pytest.fixture
def data_url(bucket_url: str, phantom_dataset: Path) -> str:
    copy = copy_of(f"{bucket_url}/data")
    shutil.copytree(phantom_dataset.parents[1], copy)
    send(copy)
    shutil.rmtree(copy)
    shutil.rmtree(known_of(copy))
    return f"{bucket_url}/data"


def _stop(*_: Any, **__: Any) -> bytes:
    raise AssertionError("read again")


def test_records_are_those_of_the_disk_and_kept_here(
    data_url: str, phantom_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = open_dataset(data_url, "phantom"), SliceDataset(phantom_dataset)
    assert there.contents() == here.contents()
    assert there.metadata == here.metadata
    name = here.volumes.keys() and next(iter(here.volumes))
    for one, other in zip(there.read_volume(name), here.read_volume(name), strict=True):
        np.testing.assert_array_equal(one.image, other.image)
    reader = pickle.loads(pickle.dumps(there.reader))
    assert [reader[i] for i in range(len(reader))] == [
        here.reader[i] for i in range(len(here.reader))
    ]
    monkeypatch.setattr(ranges, "read_range", _stop)
    assert reader[3] == here.reader[3]
    assert not list(there.directory.glob("*.tfrecord*"))


def test_a_damaged_part_here_is_read_again_and_one_there_is_named(
    data_url: str, phantom_dataset: Path, tmp_path: Path
) -> None:
    reader = open_dataset(data_url, "phantom").reader
    good = reader[0]
    (part,) = [p for p in (tmp_path / "cache/records").rglob("*") if p.is_file()]
    part.write_bytes(bytes(part.stat().st_size))
    assert reader[0] == good
    assert part.read_bytes() != bytes(part.stat().st_size)
    shard = f"{data_url}/phantom/1.0.0/{sorted(phantom_dataset.glob('*.tfrecord*'))[0].name}"
    content = bytearray(store.read_object(shard))
    content[200] ^= 1
    store.write_object(shard, bytes(content))
    part.unlink()
    with pytest.raises(RecordError, match="record 0: damaged"):
        reader[0]
    store.delete_object(shard)
    part.unlink()
    with pytest.raises(RecordError, match="this shard is missing"):
        reader[0]
    with pytest.raises(RecordError, match="this shard is missing"):
        open_dataset(data_url, "phantom")


def test_a_missing_index_is_made_from_the_bucket(data_url: str, phantom_dataset: Path) -> None:
    store.delete_object(f"{data_url}/phantom/1.0.0/{INDEX_NAME}")
    there = open_dataset(data_url, "phantom")
    assert there.contents() == SliceDataset(phantom_dataset).contents()
    made = (there.directory / INDEX_NAME).read_bytes()
    assert made == (phantom_dataset / INDEX_NAME).read_bytes()


def test_the_cache_of_records_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFJAX_CACHE", str(tmp_path))
    monkeypatch.setenv("KAFJAX_CACHE_GB", "0.0003")
    monkeypatch.setattr(ranges, "read_range", lambda url, size, offset: bytes(size))
    for i in range(1000):
        ranges.read_part("s3://b/x", 1000, i, version=0)
    total = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert 200_000 < total < 330_000
    monkeypatch.setenv("KAFJAX_CACHE_GB", "much")
    with pytest.raises(UserError, match="KAFJAX_CACHE_GB is 'much'"):
        ranges.cache_bytes()


# Google's, against an emulator that has no conditions and so no locks.


def test_google_buckets_are_fetched_sent_and_read_by_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcsfs = pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    host, _, port = free_address().partition(":")
    server = emulator.create_server(host, int(port), in_memory=True, default_bucket=BUCKET)
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
    monkeypatch.setenv("KAFJAX_CACHE", str(tmp_path / "cache"))
    gcsfs.GCSFileSystem.clear_instance_cache()
    try:
        copy = fetch(f"gs://{BUCKET}/x")
        write_files(copy, a="0123456789", sub__b="2")
        send(copy)
        move_to_machine(monkeypatch, tmp_path / "other")
        assert texts(fetch(f"gs://{BUCKET}/x")) == {"a": "0123456789", "sub/b": "2"}
        assert store.read_range(f"gs://{BUCKET}/x/a", 4, 8) == b"89"
        assert store.read_range(f"gs://{BUCKET}/x/a", 4, 80) == b""
        with pytest.raises(UserError, match="gs://nowhere/x: no such bucket"):
            fetch("gs://nowhere/x")
    finally:
        server.stop()
        gcsfs.GCSFileSystem.clear_instance_cache()
