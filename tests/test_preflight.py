"""The check of a run's needs: sound runs pass, and all faults are reported at once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from kafjax.checkpoint.checkpointer import Checkpointer, check_resumable
from kafjax.training import preflight
from kafjax.training.preflight import estimate_memory, look, open_run_dataset
from tests import runs


def tiny_config(dataset: Path, **overrides: Any) -> Any:
    """A config of the plain UNet, which is traced in a third of the time."""
    return runs.tiny_config(dataset, **{**runs.PLAIN, **overrides})


def test_a_sound_run_passes_and_nothing_is_written(phantom_dataset: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    findings = look(tiny_config(phantom_dataset), workdir)
    assert [str(finding) for finding in findings if finding.wrong] == []
    text = "\n".join(map(str, findings))
    assert "4 volumes, 4 shards" in text
    assert "6 steps an epoch, 120 in all" in text
    assert f"{workdir}: starts from scratch" in text
    assert not workdir.exists()


def test_all_that_is_wrong_is_found_at_once(
    phantom_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 3)
    monkeypatch.setattr(preflight, "device_memory", lambda: 1000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    shard = next(phantom_dataset.glob("*.tfrecord*"))
    content = shard.read_bytes()
    damaged = bytearray(content)
    damaged[20] ^= 1  # in the first record's data
    (tmp_path / "config.json").write_text('{"seed": 5}')
    try:
        shard.write_bytes(damaged)
        findings = {
            finding.name: finding for finding in look(tiny_config(phantom_dataset), tmp_path)
        }
    finally:
        shard.write_bytes(content)
    wrong = {name: finding.text for name, finding in findings.items() if finding.wrong}
    assert list(wrong) == ["volumes", "memory", "devices", "workdir", "disk"]
    assert f"{shard.name}, record 0: damaged" in wrong["volumes"]
    assert "config.batch_size is 8, expected a multiple of the 3 devices" in wrong["devices"]
    assert "seed: 5 there, 0 here" in wrong["workdir"]


def test_a_folder_that_the_system_refuses_is_told_by_its_field(phantom_dataset: Path) -> None:
    config = tiny_config(phantom_dataset, **{"data.dir": "x" * 300})
    with pytest.raises(
        ValueError, match=r"config\.data\.dir is 'xxx.*expected the folder .*too long"
    ):
        open_run_dataset(config)


def test_a_wrong_config_hides_the_rest_and_a_missing_dataset_names_its_command(
    phantom_dataset: Path, tmp_path: Path
) -> None:
    (finding,) = look(tiny_config(phantom_dataset, batch_size=0, seed=-1), tmp_path)
    assert finding.wrong
    assert len(finding.text.splitlines()) == 2
    config = tiny_config(phantom_dataset, **{"data.dir": str(tmp_path)})
    wrong = [finding for finding in look(config, tmp_path) if finding.wrong]
    assert [finding.name for finding in wrong] == ["dataset"]
    assert "kafjax prepare --dataset phantom" in wrong[0].text


def test_memory_grows_with_the_batch_and_not_with_microbatches(phantom_dataset: Path) -> None:
    dataset = open_run_dataset(tiny_config(phantom_dataset))
    small, large, parted = (
        estimate_memory(tiny_config(phantom_dataset, batch_size=b, num_microbatches=n), dataset)
        for b, n in ((4, 1), (8, 1), (8, 2))
    )
    images = 4 * 2 * 32 * 32 * 4  # bytes of four pairs, float32
    assert large - small > 10 * images
    assert parted == small


def test_resuming_needs_a_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
            check_resumable(folder)
    with Checkpointer(tmp_path, keep_newest=1, best_metric=None) as checkpointer:
        checkpointer.save(3, {"w": np.zeros(2)}, metrics={}, data={})
    check_resumable(tmp_path)
