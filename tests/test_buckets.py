"""Buckets: alike here and there, whole or not at all, held by one owner, read by ranges."""

import logging
import pickle
import shutil
import sys
from collections.abc import Iterator
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
from kafjax.workdir import bucket as bucket_module
from kafjax.workdir.bucket import kept
from kafjax.workdir.lock import LockedError
from tests.buckets import BUCKET, Proxy, access, forget_connections, served


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with served() as port:
        yield port


@pytest.fixture
def proxy(server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the server, at which `s3://` is; with a cache of its own."""
    proxy = Proxy(server)
    for name, value in access(proxy.port, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "WAITS", (0.1, 0.1))
    forget_connections()
    yield proxy
    forget_connections()
    proxy.close()


@pytest.fixture
def url(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    """A folder of the bucket, for one test."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').rstrip(']')}"


def _write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _texts(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_text() for p in files}


def _move_to_another_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("KAFJAX_CACHE", str(cache))


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
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = fetch(url)
    assert not copy.exists()
    _write(copy, a="1", sub__b="2", **{".hidden": "3", "lock": "4"})
    send(copy)
    assert set(list_objects(url)) == {"a", "sub/b"}
    monkeypatch.setattr(store, "_request", None)  # nothing changed: no request
    send(copy)
    monkeypatch.undo()


def test_another_machine_has_what_was_sent(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = fetch(url)
    _write(copy, a="1", b="2", sub__c="3")
    send(copy)
    _move_to_another_machine(monkeypatch, tmp_path / "other")
    other = fetch(url)
    assert other != copy
    assert _texts(other) == {"a": "1", "b": "2", "sub/c": "3"}
    _write(other, a="changed there")
    send(other)
    store.delete_object(f"{url}/b")
    _move_to_another_machine(monkeypatch, tmp_path / "cache")
    _write(copy, unsent="kept")
    assert _texts(fetch(url)) == {"a": "changed there", "sub/c": "3", "unsent": "kept"}
    single = fetch(f"{url}/sub/c")
    assert single.read_text() == "3"


def test_a_checkpoint_without_its_marker_is_not_there(url: str) -> None:
    step = {"state": "x", "_CHECKPOINT_METADATA": "{}"}
    for name, text in step.items():
        store.write_object(f"{url}/run/checkpoints/1/{name}", text.encode())
    store.write_object(f"{url}/run/checkpoints/2/state", b"half")
    assert set(_texts(fetch(url))) == {f"run/checkpoints/1/{name}" for name in step}


def test_markers_go_last_and_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    write, delete = store.write_object, store.delete_object

    def note(word: str, place: str) -> None:
        done.append(f"{word} {place.removeprefix(url + '/')}")

    monkeypatch.setattr(store, "write_object", lambda u, c: (note("write", u), write(u, c)))
    monkeypatch.setattr(
        "kafjax.buckets.mirror.delete_object", lambda u: (note("delete", u), delete(u))
    )
    copy = fetch(url)
    _write(copy, dataset_info__json="", **{"d/dataset_info.json": "1", "d/a": "1", "d/z": "1"})
    shutil.rmtree(copy / "dataset_info")
    send(copy)
    assert done[-1] == "write d/dataset_info.json"
    done.clear()
    _write(copy, d__z="2")
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
    assert list_objects(url) == {}


def test_a_name_that_points_elsewhere_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {f"{BUCKET}/x/../../../outside": {"type": "file", "size": 1}}
    monkeypatch.setattr(store, "_find", lambda *_: found)
    with pytest.raises(UserError, match=r"x/\.\./\.\./\.\./outside: names with"):
        fetch(f"s3://{BUCKET}/x")
    assert not list(tmp_path.rglob("outside"))


def test_a_read_that_breaks_off_is_tried_again(url: str, proxy: Proxy) -> None:
    content = np.random.default_rng(0).bytes(1 << 20)
    store.write_object(f"{url}/a", content)
    proxy.cuts, proxy.after = 1, 100_000
    assert store.read_range(f"{url}/a", 1 << 19, 7) == content[7 : 7 + (1 << 19)]
    assert proxy.cuts == 0
    proxy.cuts = 1
    assert fetch(url).joinpath("a").read_bytes() == content


def test_a_read_that_always_breaks_off_leaves_nothing(url: str, proxy: Proxy) -> None:
    store.write_object(f"{url}/a", bytes(1 << 20))
    proxy.cuts, proxy.after = 10**6, 100_000
    with pytest.raises(BucketError) as told:
        fetch(url)
    assert str(told.value).startswith(f"{url}/a: ")
    assert "\n" not in str(told.value)
    assert list(copy_of(url).rglob("*")) == []


def test_a_send_that_breaks_off_changes_nothing_there(url: str, proxy: Proxy) -> None:
    copy = fetch(url)
    _write(copy, a="before")
    send(copy)
    (copy / "a").write_bytes(bytes(1 << 20))
    proxy.cuts, proxy.upwards, proxy.after = 10**6, True, 100_000
    with pytest.raises(BucketError, match=url):
        send(copy)
    proxy.cuts = 0
    assert store.read_object(f"{url}/a") == b"before"
    send(copy)
    assert store.read_object(f"{url}/a") == bytes(1 << 20)


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


def test_lists_have_urls_too(url: str, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    assert split_list(f"{url}/1,{tmp_path}/a,b,{url}/2,c") == [
        f"{url}/1",
        f"{tmp_path}/a,b",
        f"{url}/2",
        "c",
    ]


# Records.


@pytest.fixture
def data_url(url: str, phantom_dataset: Path) -> str:
    copy = copy_of(f"{url}/data")
    shutil.copytree(phantom_dataset.parents[1], copy)
    send(copy)
    shutil.rmtree(copy)
    shutil.rmtree(known_of(copy))
    return f"{url}/data"


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


def test_the_cache_of_records_has_a_limit(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write_object(f"{url}/a", np.random.default_rng(0).bytes(100_000))
    monkeypatch.setenv("KAFJAX_CACHE_GB", "0.0005")
    for i in range(1000):
        ranges.read_part(f"{url}/a", 1000, i * 99, version=0) if i % 10 == 0 else ranges._keep(
            tmp_path / "cache/records" / f"{i % 16:x}" / f"{i:032x}", bytes(1000)
        )
    total = sum(p.stat().st_size for p in (tmp_path / "cache/records").rglob("*") if p.is_file())
    assert 200_000 < total < 600_000
    monkeypatch.setenv("KAFJAX_CACHE_GB", "much")
    with pytest.raises(UserError, match="KAFJAX_CACHE_GB is 'much'"):
        ranges.cache_bytes()


# Runs.


def test_a_run_is_sent_at_its_end_and_at_new_checkpoints(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_LOOKS", 0.02)
    run = fetch(url)
    run.mkdir(parents=True)
    with kept(run, run / "checkpoints"):
        assert set(list_objects(url)) == {"lock.1"}
        _write(run, metrics="1", **{"checkpoints/1/_CHECKPOINT_METADATA": "{}"})
        for _ in range(300):
            if "checkpoints/1/_CHECKPOINT_METADATA" in list_objects(url):
                break
        assert "metrics" in list_objects(url)
        _write(run, metrics="1 2")
    assert set(list_objects(url)) == {"metrics", "checkpoints/1/_CHECKPOINT_METADATA"}
    assert store.read_object(f"{url}/metrics") == b"1 2"


def test_two_owners_are_refused_until_the_first_is_silent(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = fetch(url)
    run.mkdir(parents=True)
    first = kept(run, run / "checkpoints")
    first.__enter__()
    _write(run, a="of the first")
    _move_to_another_machine(monkeypatch, tmp_path / "other")
    other = fetch(url)
    with (
        pytest.raises(LockedError, match=rf"^{url}: in use by process \d+ on \S+ since "),
        kept(other, other / "checkpoints"),
    ):
        pass
    monkeypatch.setattr(bucket_module, "_EXPIRES", -2.0)
    with kept(other, other / "checkpoints"):
        assert set(list_objects(url)) == {"lock.2"}
        _write(other, a="of the second")
        _move_to_another_machine(monkeypatch, tmp_path / "cache")
        with pytest.raises(LockedError, match="taken over by process"):
            first.__exit__(None, None, None)
        _move_to_another_machine(monkeypatch, tmp_path / "other")
    assert store.read_object(f"{url}/a") == b"of the second"
    # What the first did meanwhile is not of the run.
    _move_to_another_machine(monkeypatch, tmp_path / "cache")
    _write(run, b="of the first")
    assert _texts(fetch(url)) == {"a": "of the second"}


def test_a_process_that_died_here_goes_on_with_what_it_had(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fetch(url)
    run.mkdir(parents=True)
    died = bucket_module._Lock(url, run)
    assert not died.acquire()
    _write(run, a="unsent")
    assert _texts(fetch(url)) == {"a": "unsent"}
    with kept(run, run / "checkpoints"):
        assert set(list_objects(url)) == {"lock.1"}
    assert set(list_objects(url)) == {"a"}


def test_a_run_that_cannot_be_sent_is_kept_and_sent_later(
    url: str, proxy: Proxy, tmp_path: Path
) -> None:
    run = fetch(url)
    run.mkdir(parents=True)
    holding = kept(run, run / "checkpoints")
    holding.__enter__()
    _write(run, a="1")
    (run / "b").write_bytes(bytes(1 << 20))
    proxy.cuts, proxy.upwards, proxy.after = 10**6, True, 100_000
    with pytest.raises(BucketError) as told:
        holding.__exit__(None, None, None)
    assert str(told.value).startswith(url)
    assert f"kept in the cache folder {tmp_path}" in str(told.value)
    assert "\n" not in str(told.value)
    proxy.cuts = 0
    fetch(url)
    with kept(run, run / "checkpoints"):
        pass
    assert set(list_objects(url)) == {"a", "b"}


# Commands.


def test_prepare_reads_and_writes_a_bucket(
    url: str, phantom_raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from data_prep.main import main

    raw = copy_of(f"{url}/raw")
    shutil.copytree(phantom_raw, raw)
    send(raw)
    shutil.rmtree(raw)
    words = ["--dataset", "chd", "--raw_dir", f"{url}/raw", "--data_dir", f"{url}/data"]
    words += ["--max_keypoints", "64", "--num_workers", "0"]
    assert main(words) == 0
    assert f"--config.data.dir={url}/data" in capsys.readouterr().out
    assert f"chd/1.0.0/{INDEX_NAME}" in list_objects(f"{url}/data")
    shutil.rmtree(copy_of(f"{url}/data"))  # another machine
    assert main(words) == 0
    assert f"Already prepared from these files: 4 volumes, 48 slices, in {url}/data" in (
        capsys.readouterr().out
    )
    assert main([*words, "--data_dir", "s3://nowhere/data"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: s3://nowhere/data/chd: no such bucket")
    assert "\n" not in error


logging.getLogger("botocore").setLevel("ERROR")
assert sys.version_info
