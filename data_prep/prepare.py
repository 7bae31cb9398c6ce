"""A whole raw dataset -> DATA/<name>/<version>: check, prepare in parallel, publish at once.

Everything is written to the hidden folder `.<version>.preparing` next to the final folder. Each
finished shard has a JSON file that records its inputs, so an interrupted run resumes: only missing
or stale shards are made again. The finished dataset is then moved to its place in one step, because
tfds takes any existing version folder for a prepared one. `data_prep.earlier` keeps what did not
change since an earlier preparation.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from data_prep import builder
from data_prep.builder import Options, Plan, WrittenShard
from data_prep.earlier import (
    Known,
    differences,
    keep_shards,
    read_known,
    read_metadata,
    sha256_of,
    stamps_of,
    write_known,
)
from data_prep.faults import DatasetError, Fault, refuse, sort_faults
from data_prep.findings import findings_of, recorded_findings
from data_prep.subjects import with_subjects
from data_prep.volumes import Facts, Reader, Source, inspect
from data_prep.workers import WorkerDied, map_in_processes
from kafjax.errors import UserError
from kafjax.files import sync, sync_tree, write_text

T = TypeVar("T")
MapJobs = Callable[
    [Callable[[Any], Any], Mapping[str, Any]], Generator[tuple[str, Any], None, None]
]


class PreparationError(UserError):
    """Volumes with sound files that could not be prepared; the others are kept."""


@dataclass(frozen=True)
class Summary:
    """The prepared dataset on disk."""

    directory: Path
    already_prepared: bool
    num_volumes: int
    num_labelled: int
    num_slices: int
    keypoints_found: tuple[int, ...]  # by slice, before the choice of K; empty if already prepared
    findings: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class _Place:
    """The final folder, and the hidden folder next to it where the dataset is built."""

    final: Path

    @property
    def preparing(self) -> Path:
        return self.final.with_name(f".{self.final.name}.preparing")

    @property
    def dataset(self) -> Path:
        return self.preparing / "dataset"

    def note(self, volume_id: str) -> Path:
        return self.preparing / "volumes" / f"{volume_id}.json"


def prepare_dataset(
    reader: Reader,
    raw_dir: Path,
    data_dir: Path,
    *,
    name: str,
    options: Options,
    num_workers: int,
    client: Any = None,
    overwrite: bool = False,
    strict: bool = False,
    subjects: Mapping[str, str] | None = None,
) -> Summary:
    """Prepares the raw volumes of `raw_dir` as DATA/<name>/<version>, unless already prepared.

    The same sources and options give the same bytes for any `num_workers` (0: in this process), on
    the workers of a `client` of `kafjax.cluster`, and after any interruption. With `strict`
    findings are faults. `subjects` is a table by the volumes' names (`data_prep.subjects`). Raises
    `DatasetError` with every fault and finding of the raw files if at least one is a fault;
    `ValueError` if another dataset is in its place and `overwrite` is false, or another process is
    preparing it; `PreparationError` if workers died; `OSError` if writing fails.
    """
    place = _Place(data_dir / name / builder.VERSION)
    sources, faults = reader.find(raw_dir)
    sources, unknown = with_subjects(sources, subjects or {}, raw_dir)
    faults = sort_faults([*faults, *unknown, *_long_names(name, sources)], strict=strict)
    stopped = any(fault.stops for fault in faults)
    stamps = stamps_of(sources)
    known = read_known(place.final, Plan(name, reader, options, 0, ""), stamps, sources)
    if not stopped and place.final.exists() and any(place.final.iterdir()):
        found = differences(place.final, reader, sources, options, known)
        if not found:
            shutil.rmtree(place.preparing, ignore_errors=True)
            metadata = read_metadata(place.final)
            faults += recorded_findings(reader, sources, metadata)
            findings = refuse(sort_faults(faults, strict=strict))
            volumes = metadata["volumes"].values()
            num_slices = sum(volume["num_slices"] for volume in volumes)
            num_labelled = sum(volume["labelled"] for volume in volumes)
            return Summary(place.final, True, len(volumes), num_labelled, num_slices, (), findings)
        if not overwrite:
            raise UserError(
                f"{place.final} holds another dataset; move it away or pass --overwrite:\n"
                + "\n".join(f"  {line}" for line in found)
            )
    map_jobs = functools.partial(map_in_processes, num_workers=num_workers, client=client)
    facts, findings = _check(reader, sources, known, faults, map_jobs, strict=strict)
    with _lock(place.preparing):
        plan = _plan(name, reader, options, facts)
        shards = _prepare_volumes(plan, sources, facts, known, place, map_jobs)
        _publish(plan, shards, sources, facts, place)
        write_known(place.final, plan, stamps, facts, shards)
    return Summary(
        directory=place.final,
        already_prepared=False,
        num_volumes=len(shards),
        num_labelled=sum(shard.labelled for shard in shards),
        num_slices=sum(shard.num_slices for shard in shards),
        keypoints_found=tuple(found for shard in shards for found in shard.keypoints_found),
        findings=findings,
    )


def _long_names(name: str, sources: list[Source]) -> list[Fault]:
    """Faults of volumes whose shards' names would be too long for the disk."""
    longest = 230  # of the system's 255; a file being written has a longer name
    return [
        Fault(source.image, "its name is too long", "rename it: it is part of file names")
        for source in sources
        if len(os.fsencode(builder.shard_name(name, source.id))) > longest
    ]


def _check(
    reader: Reader,
    sources: list[Source],
    known: Mapping[str, Known],
    faults: list[Fault],
    map_jobs: MapJobs,
    *,
    strict: bool,
) -> tuple[dict[str, Facts], tuple[Fault, ...]]:
    """Reads every volume that is not known; all facts and findings. Raises `DatasetError`."""
    inspect_volume = functools.partial(inspect, reader)
    unread = [source for source in sources if source.id not in known]
    facts, more = read_through(inspect_volume, unread, map_jobs)
    facts |= {id: volume.facts for id, volume in known.items()}
    found = [*faults, *more, *findings_of(reader, sources, facts)]
    return facts, refuse(sort_faults(found, strict=strict))


def read_through(
    function: Callable[[Source], T], sources: Iterable[Source], map_jobs: MapJobs
) -> tuple[dict[str, T], list[Fault]]:
    """Applies a function to every volume; returns results by id, and faults of the others.

    `map_jobs` is `map_in_processes` with all but its function and jobs.
    The function raises `DatasetError` for faults. Raises `PreparationError` if workers died, and
    any other error unchanged.
    """
    found: dict[str, T] = {}
    faults: list[Fault] = []
    jobs = {source.id: source for source in sources}
    results = map_jobs(function, jobs)
    with (
        contextlib.closing(results),
        tqdm(total=len(jobs), desc="checking", unit="volume", disable=None) as progress,
    ):
        for id, result in results:
            progress.update()
            if isinstance(result, DatasetError):
                faults += result.faults
            elif isinstance(result, Exception):
                raise _failure({jobs[id].image: result}) from result
            else:
                found[id] = result
    return found, faults


def _plan(name: str, reader: Reader, options: Options, facts: dict[str, Facts]) -> Plan:
    return Plan(
        name=name,
        reader=reader,
        options=options,
        reach=max(reader.reach(fact.num_slices) for fact in facts.values()),
        dtype=_common_dtype(fact.dtype for fact in facts.values()),
    )


def _common_dtype(dtypes: Iterable[str]) -> str:
    """The narrowest image type that holds all volumes: a tfds dataset has only one."""
    common = np.result_type(*map(np.dtype, dtypes))
    return "float32" if common.kind == "f" else common.name


def _prepare_volumes(
    plan: Plan,
    sources: list[Source],
    facts: dict[str, Facts],
    known: Mapping[str, Known],
    place: _Place,
    map_jobs: MapJobs,
) -> list[WrittenShard]:
    """Writes missing and stale shards; returns all shards in the order of the sources."""
    place.dataset.mkdir(parents=True, exist_ok=True)
    place.note("").parent.mkdir(exist_ok=True)
    kept = keep_shards(known, plan, place.final, place.dataset)
    shards = {
        source.id: kept.get(source.id) or _finished(plan, facts[source.id], place)
        for source in sources
    }
    jobs = {
        source.id: (source, facts[source.id].sha256)
        for source in sources
        if shards[source.id] is None
    }
    done = sum(fact.num_slices for id, fact in facts.items() if id not in jobs)
    total = sum(fact.num_slices for fact in facts.values())
    results = map_jobs(functools.partial(_prepare_volume, plan, place), jobs)
    failures: dict[str, Exception] = {}
    with (
        contextlib.closing(results),
        tqdm(total=total, initial=done, desc="preparing", unit="slice", disable=None) as progress,
    ):
        for id, result in results:
            if isinstance(result, OSError):
                raise result  # a full or read-only disk stops every other volume too
            if isinstance(result, Exception):
                failures[id] = result
            else:
                _check_libraries(plan, result)
                shards[id] = result
                progress.update(result.num_slices)
    _raise_failures(failures, {id: source for id, (source, _) in jobs.items()})
    return [shard for shard in shards.values() if shard is not None]


def _check_libraries(plan: Plan, shard: WrittenShard) -> None:
    """Raises `ValueError` for a shard of a cluster's worker with other libraries than here."""
    here, there = plan.parameters["libraries"], shard.parameters["libraries"]
    if here != there:
        raise UserError(
            f"--cluster: a worker has {there}, expected what is installed here, {here}: the "
            "records would differ"
        )


def _prepare_volume(plan: Plan, place: _Place, job: tuple[Source, dict[str, str]]) -> WrittenShard:
    source, sha256 = job
    shard = builder.write_shard(plan, source, sha256, place.dataset)
    write_text(
        place.note(source.id), json.dumps(dataclasses.asdict(shard), indent=1, sort_keys=True)
    )
    return shard


def _finished(plan: Plan, fact: Facts, place: _Place) -> WrittenShard | None:
    """The volume's shard if an earlier run finished it and its inputs have not changed."""
    try:
        shard = WrittenShard(**json.loads(place.note(fact.id).read_bytes()))
        intact = sha256_of(place.dataset / shard.file) == shard.sha256
    except (OSError, ValueError, TypeError):
        return None
    same = shard.parameters == plan.parameters and shard.sources == fact.sha256
    named = shard.file == builder.shard_name(plan.name, fact.id)
    return shard if intact and same and named else None


def _raise_failures(failures: dict[str, Exception], sources: dict[str, Source]) -> None:
    if failures and all(isinstance(error, DatasetError) for error in failures.values()):
        raise DatasetError([f for e in failures.values() for f in getattr(e, "faults", ())])
    if failures:
        raise _failure({sources[id].image: error for id, error in sorted(failures.items())})


def _failure(failures: Mapping[Path, Exception]) -> Exception:
    """The error to raise for volumes with sound files: our own faults unchanged, with the file."""
    for path, error in failures.items():
        if not isinstance(error, WorkerDied | MemoryError | OSError):
            error.add_note(f"while {path} was prepared")
            return error
    return PreparationError("\n".join(f"{path}: {error}" for path, error in failures.items()))


def _publish(
    plan: Plan,
    shards: list[WrittenShard],
    sources: list[Source],
    facts: dict[str, Facts],
    place: _Place,
) -> None:
    """Completes the folder of shards and moves it to its final place."""
    wanted = {shard.file for shard in shards}
    for leftover in [path for path in place.dataset.iterdir() if path.name not in wanted]:
        leftover.unlink()
    builder.write_dataset_files(place.dataset, plan, shards, sources, facts)
    sync_tree(place.dataset)
    if place.final.exists():
        shutil.rmtree(place.final)
    place.dataset.rename(place.final)
    sync(place.final.parent)
    shutil.rmtree(place.preparing)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Locks the folder for this process; the system releases the lock when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is preparing this dataset") from error
        yield
