"""Reading records: equal to TensorFlow's reader, any damage noticed, the index rebuilt at need."""

import errno
import json
import pickle
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from kafjax.data.records import (
    INDEX_NAME,
    RecordError,
    RecordReader,
    find_dataset,
    load_decoder,
    load_index,
    masked_crc32c,
    write_index,
)


@pytest.fixture
def dataset(phantom_dataset: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(phantom_dataset, tmp_path / "phantom" / "1.0.0"))


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.tfrecord-*"))


def frames(shard: Path) -> list[tuple[int, int]]:
    """(offset, data length) of each record, by walking the file."""
    content, offset, found = shard.read_bytes(), 0, []
    while offset < len(content):
        (length,) = struct.unpack_from("<Q", content, offset)
        found.append((offset, length))
        offset += 12 + length + 4
    return found


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 16
    path.write_bytes(content)


def test_every_record_is_what_tensorflow_reads(phantom_dataset):
    reader = RecordReader(phantom_dataset)
    expected = [
        record.numpy()
        for shard in shards(phantom_dataset)
        for record in tf.data.TFRecordDataset(str(shard))
    ]
    assert len(reader) == len(expected)
    assert [reader[i] for i in range(len(reader))] == expected


def test_splits_number_the_records_through_the_dataset(phantom_dataset):
    reader = RecordReader(phantom_dataset)
    builder = tfds.builder_from_directory(str(phantom_dataset))
    assert list(reader.splits) == sorted(builder.info.splits)
    start = 0
    for name, records in reader.splits.items():
        assert records == range(start, start + builder.info.splits[name].num_examples)
        assert reader.record_number(name, 1) == start + 1
        start = records.stop
    with pytest.raises(IndexError, match=f"record {start}: .* holds {start} records"):
        reader[start]
    with pytest.raises(IndexError):
        reader[-1]


def test_decodes_as_tfds_does_with_tensorflow(phantom_dataset):
    reader, decode = RecordReader(phantom_dataset), load_decoder(phantom_dataset)
    builder = tfds.builder_from_directory(str(phantom_dataset))
    name = next(iter(reader.splits))
    for i, expected in enumerate(tfds.as_numpy(builder.as_dataset(split=name))):
        found = decode(reader[i])
        assert found.keys() == expected.keys()
        for field, value in expected.items():
            np.testing.assert_array_equal(found[field], value)
            if isinstance(found[field], np.ndarray):
                assert found[field].dtype == value.dtype


def test_a_decoder_can_leave_features_out(phantom_dataset):
    data = RecordReader(phantom_dataset)[0]
    fields = load_decoder(phantom_dataset)(data).keys()
    assert load_decoder(phantom_dataset, without=("label",))(data).keys() == fields - {"label"}


def test_masked_crc_is_of_the_published_check_value():
    # CRC32C of "123456789" is 0xE3069283 (RFC 3720, B.4 uses the same polynomial).
    assert google_crc32c.value(b"123456789") == 0xE3069283
    rotated = (0xE3069283 >> 15 | 0xE3069283 << 17) & 0xFFFFFFFF
    assert masked_crc32c(b"123456789") == (rotated + 0xA282EAD8) % 2**32


def test_index_holds_offsets_and_lengths_and_is_the_same_each_time(dataset):
    path = write_index(dataset)
    first = path.read_bytes()
    assert write_index(dataset).read_bytes() == first
    for shard in load_index(dataset):
        expected = frames(dataset / shard.file)
        assert list(zip(shard.offsets, shard.lengths, strict=True)) == expected
    assert sorted(f.name for f in dataset.glob(f"{INDEX_NAME}*")) == [INDEX_NAME]


def test_a_good_index_is_used_without_a_scan(dataset, monkeypatch):
    write_index(dataset)
    monkeypatch.setattr("kafjax.data.records._scan_dataset", None)
    assert len(RecordReader(dataset)) > 0


@pytest.mark.parametrize("fault", ["missing", "not_json", "wrong_length", "other_format", "list"])
def test_a_missing_or_damaged_index_is_rebuilt(dataset, fault):
    path = write_index(dataset)
    good = path.read_bytes()
    document = json.loads(good)
    if fault == "wrong_length":
        document["shards"][0]["lengths"][0] += 1
    elif fault == "other_format":
        document["format"] = "kafjax record index 0"
    path.write_text({"not_json": "{", "list": "[]"}.get(fault, json.dumps(document)))
    if fault == "missing":
        path.unlink()
    reader = RecordReader(dataset)
    assert path.read_bytes() == good
    assert len(reader[0]) == reader._shards[0].lengths[0]


def rewrite(shard: Path, change) -> list[bytes]:
    """Writes a shard's records anew, each changed, with right checksums."""
    data = [change(record.numpy()) for record in tf.data.TFRecordDataset(str(shard))]
    with tf.io.TFRecordWriter(str(shard)) as writer:
        for record in data:
            writer.write(record)
    return data


def forget_records(dataset: Path) -> None:
    """Makes metadata.json that of a dataset that was prepared before it named its records."""
    metadata = json.loads((dataset / "metadata.json").read_text())
    for volume in metadata["volumes"].values():
        del volume["records"]
    (dataset / "metadata.json").write_text(json.dumps(metadata))


def test_shards_of_another_preparation_are_refused(dataset):
    shard = shards(dataset)[1]
    rewrite(shard, lambda record: record + b"more")
    for _ in range(2):
        with pytest.raises(RecordError, match=f"(?s)not hold the records.*{shard.name}"):
            RecordReader(dataset)
        (dataset / INDEX_NAME).unlink(missing_ok=True)


def test_an_index_of_other_shards_is_rebuilt(dataset):
    forget_records(dataset)
    path = write_index(dataset)
    data = rewrite(shards(dataset)[1], lambda record: record + b"more")
    stale = path.read_bytes()
    reader = RecordReader(dataset)
    assert path.read_bytes() != stale
    assert [reader[len(data) + i] for i in range(len(data))] == data


def test_a_sound_record_of_the_same_length_is_not_taken_for_another(dataset):
    shard = shards(dataset)[1]
    number = len(frames(shards(dataset)[0])) + 2
    reader = RecordReader(dataset)
    rewrite(shard, lambda record: record[:-1] + bytes([record[-1] ^ 1]))
    with pytest.raises(
        RecordError, match=f"{shard.name}, record 2: is not the record of its index"
    ):
        reader[number]


@pytest.mark.parametrize("name", ["metadata.json", "features.json"])
def test_descriptions_that_changed_since_the_index_are_refused(dataset, name):
    (dataset / name).write_text((dataset / name).read_text() + " ")
    with pytest.raises(RecordError, match=f"1.0.0: {name} changed since {INDEX_NAME} was written"):
        RecordReader(dataset)
    (dataset / INDEX_NAME).unlink()
    assert len(RecordReader(dataset)) > 0


def test_features_of_a_foreign_module_are_refused_before_it_is_imported(dataset):
    content = (dataset / "features.json").read_text()
    (dataset / "features.json").write_text(content.replace("core.features.scalar", "public_api", 1))
    with pytest.raises(RecordError, match=r"features.json names tensorflow_datasets.public_api"):
        load_decoder(dataset)


def test_an_index_of_a_renamed_dataset_is_rebuilt(dataset):
    write_index(dataset)
    info = json.loads((dataset / "dataset_info.json").read_text())
    old, new = info["splits"][0]["name"], "another"
    info["splits"][0]["name"] = new
    (dataset / "dataset_info.json").write_text(json.dumps(info))
    shard = shards(dataset)[0]
    shard.rename(dataset / shard.name.replace(old, new))
    assert new in RecordReader(dataset).splits


def test_a_read_only_dataset_is_read_without_an_index(dataset, monkeypatch):
    (dataset / INDEX_NAME).unlink(missing_ok=True)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("kafjax.data.records.write_text", refuse)
    assert len(RecordReader(dataset)[0]) > 0
    assert not list(dataset.glob(f"{INDEX_NAME}*"))
    with pytest.raises(OSError, match="Read-only"):
        write_index(dataset)


@pytest.mark.parametrize("where", ["length", "length_crc", "data_start", "data_end", "data_crc"])
def test_any_damaged_part_of_a_record_is_noticed(dataset, where):
    reader = RecordReader(dataset)
    shard = shards(dataset)[1]
    offset, length = frames(shard)[3]
    number = len(frames(shards(dataset)[0])) + 3
    places = {"length": 1, "length_crc": 9, "data_start": 12, "data_end": 11 + length}
    flip(shard, offset + places.get(where, 12 + length + 3))
    with pytest.raises(RecordError, match=f"{shard.name}, record 3: damaged"):
        reader[number]
    assert len(reader[number - 1]) == frames(shards(dataset)[1])[2][1]


def test_an_index_that_points_elsewhere_is_not_believed(dataset):
    reader = RecordReader(dataset)
    shard = shards(dataset)[0]
    data = [record.numpy() for record in tf.data.TFRecordDataset(str(shard))]
    with tf.io.TFRecordWriter(str(shard)) as writer:
        for record in [data[0] + b"x", *data[1:]]:
            writer.write(record)
    with pytest.raises(RecordError, match=r"record 0: has \d+ bytes, its index says \d+"):
        reader[0]


def test_a_truncated_shard_is_named_when_scanned_and_when_read(dataset):
    reader = RecordReader(dataset)
    shard = shards(dataset)[0]
    last = len(frames(shard)) - 1
    whole = shard.read_bytes()
    offset, _ = frames(shard)[-1]
    for size in (len(whole) - 1, offset + 5, offset + 12):
        shard.write_bytes(whole[:size])
        expected = f"{shard.name}, record {last}: the file ends inside this record"
        with pytest.raises(RecordError, match=expected):
            reader[last]
        with pytest.raises(RecordError, match=expected):
            RecordReader(dataset)
    shard.write_bytes(whole[:offset])
    with pytest.raises(
        RecordError, match=f"{shard.name}: ends after record {last - 1}; .*{last + 1}"
    ):
        write_index(dataset)


def test_a_damaged_length_stops_the_scan(dataset):
    flip(shards(dataset)[2], frames(shards(dataset)[2])[1][0])
    with pytest.raises(RecordError, match=f"{shards(dataset)[2].name}, record 1: damaged"):
        write_index(dataset)


def test_a_missing_shard_is_named(dataset):
    reader = RecordReader(dataset)
    shard = shards(dataset)[0]
    shard.unlink()
    for call in (lambda: reader[0], lambda: RecordReader(dataset), lambda: write_index(dataset)):
        with pytest.raises(RecordError, match=f"{shard.name}: this shard is missing"):
            call()


def test_a_directory_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(RecordError, match="no prepared dataset here"):
        RecordReader(tmp_path)


def test_threads_and_pickled_copies_read_the_same(phantom_dataset):
    reader = RecordReader(phantom_dataset)
    expected = [reader[i] for i in range(len(reader))]
    copy = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(copy.__getitem__, range(len(reader)))) == expected


def test_the_newest_prepared_version_is_found(tmp_path):
    for version, prepared in {"1.9.0": True, "1.10.0": True, "2.0.0": False, "tmp": True}.items():
        folder = tmp_path / "chd" / version
        folder.mkdir(parents=True)
        if prepared:
            (folder / "dataset_info.json").touch()
    assert find_dataset(tmp_path, "chd") == tmp_path / "chd" / "1.10.0"
    command = f"kafjax prepare --dataset acdc --raw_dir RAW --data_dir {tmp_path}"
    with pytest.raises(ValueError, match=command):
        find_dataset(tmp_path, "acdc")
    with pytest.raises(ValueError, match=f"--dataset phantom --data_dir {tmp_path}"):
        find_dataset(tmp_path, "phantom")
