"""Runs in buckets: sent, held by one owner, resumed bit for bit; and commands on buckets."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kafjax.buckets import BucketError, copy_of, fetch, send, store
from kafjax.buckets.store import list_objects
from kafjax.checkpoint.checkpointer import load_variables, saved_steps
from kafjax.data.records import INDEX_NAME
from kafjax.workdir import bucket as bucket_module
from kafjax.workdir.bucket import kept
from kafjax.workdir.lock import LockedError
from tests.buckets import Proxy, move_to_machine, texts, write_files
from tests.campaigns.tiny import make_run
from tests.runs import PLAIN, ROOT, run_command, start_command, without_time


def test_a_run_is_sent_at_its_end_and_at_new_checkpoints(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_LOOKS", 0.02)
    run = fetch(bucket_url)
    run.mkdir(parents=True)
    with kept(run, run / "checkpoints"):
        assert set(list_objects(bucket_url)) == {"lock.1"}
        write_files(run, metrics="1", **{"checkpoints/1/_CHECKPOINT_METADATA": "{}"})
        for _ in range(300):
            if "checkpoints/1/_CHECKPOINT_METADATA" in list_objects(bucket_url):
                break
        assert "metrics" in list_objects(bucket_url)
        write_files(run, metrics="1 2")
    assert set(list_objects(bucket_url)) == {"metrics", "checkpoints/1/_CHECKPOINT_METADATA"}
    assert store.read_object(f"{bucket_url}/metrics") == b"1 2"


def test_two_owners_are_refused_until_the_first_is_silent(
    bucket_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = fetch(bucket_url)
    run.mkdir(parents=True)
    first = kept(run, run / "checkpoints")
    first.__enter__()
    write_files(run, a="of the first")
    move_to_machine(monkeypatch, tmp_path / "other")
    other = fetch(bucket_url)
    with (
        pytest.raises(LockedError, match=rf"^{bucket_url}: in use by process \d+ on \S+ since "),
        kept(other, other / "checkpoints"),
    ):
        pass
    monkeypatch.setattr(bucket_module, "_EXPIRES", -2.0)
    with kept(other, other / "checkpoints"):
        assert set(list_objects(bucket_url)) == {"lock.2"}
        write_files(other, a="of the second")
        move_to_machine(monkeypatch, tmp_path / "cache")
        with pytest.raises(LockedError, match="taken over by process"):
            first.__exit__(None, None, None)
        move_to_machine(monkeypatch, tmp_path / "other")
    # What the first did meanwhile is not of the run.
    move_to_machine(monkeypatch, tmp_path / "cache")
    write_files(run, b="of the first")
    send(run)  # as its command does when it ends
    assert store.read_object(f"{bucket_url}/a") == b"of the second"
    assert texts(fetch(bucket_url)) == {"a": "of the second"}
    write_files(run, c="later")
    send(run)
    assert set(list_objects(bucket_url)) == {"a", "c"}


def test_a_process_that_died_here_goes_on_with_what_it_had(
    bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fetch(bucket_url)
    run.mkdir(parents=True)
    died = bucket_module._Lock(bucket_url, run)
    assert not died.acquire()
    write_files(run, a="unsent")
    assert texts(fetch(bucket_url)) == {"a": "unsent"}
    with kept(run, run / "checkpoints"):
        assert set(list_objects(bucket_url)) == {"lock.1"}
    assert set(list_objects(bucket_url)) == {"a"}


def test_a_run_that_cannot_be_sent_is_kept_and_sent_later(
    bucket_url: str, proxy: Proxy, tmp_path: Path
) -> None:
    run = fetch(bucket_url)
    run.mkdir(parents=True)
    holding = kept(run, run / "checkpoints")
    holding.__enter__()
    write_files(run, a="1")
    (run / "b").write_bytes(bytes(1 << 20))
    proxy.cuts, proxy.upwards, proxy.after = 10**6, True, 100_000
    with pytest.raises(BucketError) as told:
        holding.__exit__(None, None, None)
    assert str(told.value).startswith(bucket_url)
    assert f"kept in the cache folder {tmp_path}" in str(told.value)
    assert "\n" not in str(told.value)
    proxy.cuts = 0
    fetch(bucket_url)
    with kept(run, run / "checkpoints"):
        pass
    assert set(list_objects(bucket_url)) == {"a", "b"}


# Commands.


def test_prepare_reads_and_writes_a_bucket(
    bucket_url: str, phantom_raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from data_prep.main import main

    raw = copy_of(f"{bucket_url}/raw")
    shutil.copytree(phantom_raw, raw)
    send(raw)
    shutil.rmtree(raw)
    words = ["--dataset", "chd", "--max_keypoints", "64", "--num_workers", "0"]
    words += ["--raw_dir", f"{bucket_url}/raw", "--data_dir", f"{bucket_url}/data"]
    assert main(words) == 0
    assert f"--config.data.dir={bucket_url}/data" in capsys.readouterr().out
    assert f"chd/1.0.0/{INDEX_NAME}" in list_objects(f"{bucket_url}/data")
    shutil.rmtree(copy_of(f"{bucket_url}/data"))  # another machine
    assert main(words) == 0
    assert f"Already prepared from these files: 4 volumes, 48 slices, in {bucket_url}/data" in (
        capsys.readouterr().out
    )
    assert main([*words, "--data_dir", "s3://nowhere/data"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: s3://nowhere/data/chd: no such bucket")
    assert "\n" not in error


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_resumes_bit_for_bit(
    bucket_url: str, phantom_dataset: Path, tmp_path: Path
) -> None:
    data, run = copy_of(f"{bucket_url}/data"), f"{bucket_url}/run"
    shutil.copytree(phantom_dataset.parents[1], data)
    send(data)
    shutil.rmtree(data)
    words = (
        *(f"--config.{name}={value}" for name, value in PLAIN.items()),
        *("--config.num_steps=9", "--config.every.checkpoint=2"),
    )
    there = (f"--config.data.dir={bucket_url}/data", *words)
    status, output = run_command(phantom_dataset, tmp_path / "here", *words)
    assert status == 0, output
    process = start_command(phantom_dataset, run, *there)
    while not any("checkpoints/4/_CHECK" in name for name in list_objects(run)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert "lock.1" in list_objects(run)
    # Another machine has to wait; this one continues.
    other = {"KAFJAX_CACHE": str(tmp_path / "other")}
    status, output = run_command(phantom_dataset, run, *there, **other)
    assert (status, output.count("error:")) == (2, 1)
    assert f"error: {run}: in use by process {process.pid} on " in output
    status, output = run_command(phantom_dataset, run, *there)
    assert status == 0, output
    assert f"Resuming {run} from step" in output
    assert without_time(fetch(run)) == without_time(tmp_path / "here")
    _same_bits(fetch(run), tmp_path / "here")
    # The next steps elsewhere.
    longer = "--config.num_steps=11"
    status, output = run_command(phantom_dataset, run, *there, longer, **other)
    assert status == 0, output
    assert f"Resuming {run} from step 9" in output
    assert run_command(phantom_dataset, tmp_path / "here", *words, longer)[0] == 0
    _same_bits(fetch(run), tmp_path / "here")
    status, output = run_command(phantom_dataset, "s3://nowhere/run", *there)
    assert (status, output.count("error:")) == (2, 1)
    assert "error: s3://nowhere/run: no such bucket" in output


def _same_bits(one: Path, other: Path) -> None:
    assert saved_steps(one) == saved_steps(other)
    variables = [jax.tree.leaves(load_variables(workdir)) for workdir in (one, other)]
    for a, b in zip(*variables, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_predict_and_evaluate_read_and_write_a_bucket(
    bucket_url: str, phantom_raw: Path, phantom_dataset: Path
) -> None:
    there = copy_of(bucket_url)
    config = {"data.max_keypoints": 64, "data.num_folds": 4}
    make_run(there / "run", phantom_dataset, **config)
    shutil.copytree(phantom_dataset.parents[1], there / "data")
    shutil.copytree(phantom_raw, there / "scans", ignore=shutil.ignore_patterns("*_label*"))
    send(there)
    shutil.rmtree(there)
    commands = (
        "predict --workdir URL/run --input URL/scans --output URL/labels --format .nii.gz",
        "evaluate --workdir URL/run --data_dir URL/data",
        "pack URL/run URL/model.kafjax",
        "report --workdir URL/run --data_dir URL/data --output URL/report.html",
        "figures keypoints --data_dir URL/data --volume ct_1001 --slice 4 --output URL/pairs.png",
    )
    for command in commands:
        words = command.replace("URL", bucket_url).split()
        done = subprocess.run(
            [sys.executable, "-m", "kafjax", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    objects = set(list_objects(bucket_url))
    assert {"model.kafjax", "report.html", "pairs.png", "run/evaluation.json"} <= objects
    assert sum(name.startswith("labels/") for name in objects) == 4
