"""A dataset's earlier preparation: how it differs from the one asked for, and what can be kept.

Next to a dataset, DATA/<name>/.<version>.volumes.json records each volume's facts, its shard, and
the stamps of its source files: size, times and inode. A source whose stamps are unchanged is
neither read nor hashed again, and its shard is linked into the next dataset. The file belongs to
the dataset whose metadata it hashes; without it everything is read again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.builder import Options, Plan, WrittenShard
from data_prep.formats import digest, source_files
from data_prep.subjects import subjects_of
from data_prep.volumes import Facts, Reader, Source
from kafjax.data.records import FRAME_BYTES, load_index
from kafjax.files import CHECKSUM_FIELD, checksum, read_checked, replacing, write_text

# A file that changed so shortly before its stamp may change again within one tick of the clock.
_RECENT_SECONDS = 2.0
# Parameters that follow from all volumes together: facts do not depend on them.
_COMMON = ("reach", "image_dtype")

Stamps = dict[str, Any]


class Known(NamedTuple):
    """An unchanged volume of an earlier preparation."""

    facts: Facts
    shard: WrittenShard


def stamps_of(sources: Iterable[Source]) -> dict[str, Stamps]:
    """The stamps of each volume's files, by id; none of a volume with files that just changed."""
    newest = (time.time() - _RECENT_SECONDS) * 1e9
    found = {}
    for source in sources:
        with contextlib.suppress(OSError, ValueError):  # what is wrong is found in reading
            files = {
                name: [_stamp(file) for file in source_files(path)]
                for name, path in source.file_names.items()
            }
            changed = max(
                moment for stamps in files.values() for stamp in stamps for moment in stamp[2:4]
            )
            if changed <= newest:
                found[source.id] = {"frame": source.frame, "files": files}
    return found


def _stamp(file: Path) -> list[Any]:
    stat = file.stat()
    return [file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def read_known(
    final: Path, plan: Plan, stamps: Mapping[str, Stamps], sources: Iterable[Source]
) -> dict[str, Known]:
    """The unchanged volumes of the earlier preparation of a dataset, if it had the same options.

    Args:
      final: the dataset's folder.
      plan: what is asked for; its reach and type of images are not yet known, and do not count.
      stamps: of the volumes' files now.
      sources: the volumes.
    """
    try:
        fields = read_checked(_file(final))
        if final.exists() and fields["metadata"] != sha256_of(final / "metadata.json"):
            return {}
        parameters, volumes = fields["parameters"], fields["volumes"]
        if _own(parameters) != _own(json.loads(json.dumps(plan.parameters))):
            return {}
        return {
            source.id: Known(
                Facts(**{**volume["facts"], "size": tuple(volume["facts"]["size"])}),
                WrittenShard(**volume["shard"], parameters=parameters),
            )
            for source in sources
            if (volume := volumes.get(source.id))
            and stamps.get(source.id) == volume["stamps"] is not None
            and source.case == volume["shard"]["case"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _own(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in _COMMON}


def write_known(
    final: Path,
    plan: Plan,
    stamps: Mapping[str, Stamps],
    facts: Mapping[str, Facts],
    shards: Iterable[WrittenShard],
) -> None:
    """Records a finished dataset for `read_known`."""
    volumes = {}
    for shard in shards:
        fields = dataclasses.asdict(shard)
        del fields["parameters"]  # the plan's
        volumes[shard.volume_id] = {
            "stamps": stamps.get(shard.volume_id),
            "facts": dataclasses.asdict(facts[shard.volume_id]),
            "shard": fields,
        }
    metadata = sha256_of(final / "metadata.json")
    record = {"metadata": metadata, "parameters": plan.parameters, "volumes": volumes}
    write_text(_file(final), json.dumps({**record, CHECKSUM_FIELD: checksum(record)}))


def keep_shards(
    known: Mapping[str, Known], plan: Plan, final: Path, dataset: Path
) -> dict[str, WrittenShard]:
    """Links earlier shards whose records would be the same into an unfinished dataset, by id."""
    asked = json.loads(json.dumps(plan.parameters))
    return {
        id: volume.shard
        for id, volume in known.items()
        if volume.shard.parameters == asked and _keep_shard(volume.shard, final, dataset)
    }


def _keep_shard(shard: WrittenShard, final: Path, dataset: Path) -> bool:
    old, new = final / shard.file, dataset / shard.file
    if not old.exists():  # an interrupted run may have linked it, and removed the dataset
        return new.exists() and sha256_of(new) == shard.sha256
    if old.stat().st_size != shard.num_bytes + FRAME_BYTES * shard.num_slices:
        return False
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:  # a disk without hard links
        with replacing(new) as partial:
            shutil.copyfile(old, partial)
    return True


def _file(final: Path) -> Path:
    return final.with_name(f".{final.name}.volumes.json")


def sha256_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differences(
    final: Path,
    reader: Reader,
    sources: list[Source],
    options: Options,
    known: Mapping[str, Known],
) -> list[str]:
    """Differences between the existing dataset and the requested one, except library versions."""
    try:
        found = read_metadata(final)
        load_index(final)
    except (OSError, ValueError) as error:
        return [f"it is not a finished kafjax dataset ({error})"]
    asked: dict[str, Any] = {
        "kind": reader.kind,
        "radius": reader.radius,
        "classes": list(reader.classes),
        **reader.facts,
        **dataclasses.asdict(options),
    }
    if (subjects := subjects_of(sources)) or "subjects" in found:
        asked["subjects"] = subjects or None
    found_here = [
        f"{key}: {found.get(key)} there, {value} asked for"
        for key, value in asked.items()
        if found.get(key) != value
    ]
    volumes = found.get("volumes", {})
    found_here += [
        f"{source.id}: {'is' if source.test else 'is not'} in the test set now"
        for source in sources
        if source.id in volumes and volumes[source.id].get("test", False) != source.test
    ]
    there = {id: volume["sources"] for id, volume in volumes.items()}
    sha256 = functools.cache(digest)  # a cine's frames share their file
    here = {
        source.id: known[source.id].facts.sha256
        if source.id in known
        else {name: sha256(path) for name, path in source.file_names.items()}
        for source in sources
    }
    return found_here + [
        f"{id}: its files {_change(there.get(id), here.get(id))}"
        for id in sorted(there.keys() | here.keys())
        if there.get(id) != here.get(id)
    ]


def _change(there: dict[str, str] | None, here: dict[str, str] | None) -> str:
    if there is None:
        return "are new"
    return "are missing from the raw folder" if here is None else "have changed"


def read_metadata(final: Path) -> dict[str, Any]:
    """The metadata of a finished dataset; raises `OSError` or `ValueError` without one."""
    metadata: dict[str, Any] = json.loads((final / "metadata.json").read_bytes())
    return metadata
