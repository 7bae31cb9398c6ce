"""A small sample of each campaign of faults: damage is caught, and what is sound passes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.entries import list_entries
from kafjax.training.config_checks import check_fields
from tests.campaigns import (
    checkpoints,
    datasets,
    degenerate,
    disks,
    folders,
    formats,
    hostile,
    paths,
    runs,
    shards,
    volumes,
)
from tests.campaigns.campaign import Settings, Tally, as_json, as_markdown
from tests.campaigns.configs import _LINE, change_fields
from tests.campaigns.damage import DAMAGES
from tests.campaigns.forks import Fork
from tests.campaigns.main import CAMPAIGNS, main
from tests.runs import tiny_config


def settings(folder: Path, count: int) -> Settings:
    return Settings(seed=7, count=count, scratch=folder)


def assert_held(tallies: list[Tally]) -> None:
    assert [what for tally in tallies for what in tally.wrong] == []
    assert all(tally.tries for tally in tallies)


@pytest.mark.parametrize(
    "campaign",
    [
        volumes.run_preparation,
        formats.run_nrrd,
        formats.run_metaimage,
        formats.run_dicom,
        folders.run_entries,
        folders.run_texts,
        folders.run_headers,
        shards.run,
        datasets.run,
        checkpoints.run,
        hostile.run,
    ],
)
def test_a_sample_of_the_campaign_holds(campaign, tmp_path):
    assert_held(list(campaign(settings(tmp_path, 12))))


@pytest.mark.slow
def test_a_study_in_a_folder_of_all_odd_characters_holds(tmp_path):
    """Preparation, training, evaluation, resuming, prediction and report; and what is refused."""
    assert_held(list(paths.run(settings(tmp_path, 1))))


@pytest.mark.slow
def test_a_run_and_a_preparation_that_are_killed_hold(tmp_path):
    assert_held(list(runs.run_kills(settings(tmp_path, 2))))


@pytest.mark.parametrize("action", [disks.try_save, disks.try_preparation])
def test_a_file_that_may_not_grow_stops_a_save_and_a_preparation(action, tmp_path):
    assert action("limit", tmp_path, np.random.default_rng(0)) == ""


def test_what_is_believed_though_it_is_false_is_silent(tmp_path, monkeypatch):
    """The campaigns detect readers that accept anything."""
    # A frame is 12 bytes of length, the record, and 4 of checksum.
    monkeypatch.setattr("kafjax.data.records._check_record", lambda frame, *_: frame[12:-4])
    monkeypatch.setattr("kafjax.data.records._check_prepared", lambda *_: None)
    (damaged, *_) = shards.run(settings(tmp_path, 6))
    assert damaged.silent + damaged.unclear > 0


def test_readers_that_pass_entries_over_are_found_out(tmp_path, monkeypatch):
    for module in ("chd", "acdc", "nnunet"):
        monkeypatch.setattr(
            f"data_prep.{module}.list_entries",
            lambda *args, **kwargs: dataclasses.replace(list_entries(*args, **kwargs), faults=()),
        )
    (tally,) = folders.run_entries(settings(tmp_path, 12))
    assert tally.silent > 0


def test_headers_that_are_mended_in_silence_are_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.nifti.header_problem", lambda *_: None)
    (tally,) = folders.run_headers(settings(tmp_path, 60))
    assert tally.silent > 0


def test_a_checkpoint_without_hashes_would_be_believed(tmp_path, monkeypatch):
    monkeypatch.setattr("kafjax.checkpoint.files._hash", lambda leaf: "")
    (damaged, *_) = checkpoints.run(settings(tmp_path, 12))
    assert damaged.silent > 0


def test_sound_volumes_are_not_accused(tmp_path):
    (_, clean) = datasets.run(settings(tmp_path, 20))
    assert (clean.caught, clean.tries) == (20, 20)


def test_changed_configs_are_accepted_or_refused_by_the_field(tmp_path):
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        config = tiny_config(tmp_path / "a/b/c")
        done = change_fields(config, rng)
        try:
            check_fields(config)
        except ValueError as error:
            refused += 1
            assert all(_LINE.match(line) for line in str(error).splitlines()), (done, str(error))
    assert 30 < refused < 100


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_the_same_for_a_seed_and_changes_the_content(kind):
    content = np.random.default_rng(1).bytes(500)
    first, again = (DAMAGES[kind](content, np.random.default_rng(3)) for _ in range(2))
    assert first == again != content


def test_every_degenerate_batch_is_what_its_name_says(tmp_path):
    rng = np.random.default_rng(0)
    for spoil in degenerate.KINDS.values():
        batch = degenerate.random_batch(4, 16)
        before = {field: values.copy() for field, values in batch.items()}
        spoil(batch, rng)
        assert any(not np.array_equal(batch[field], before[field]) for field in batch)


def test_what_is_skipped_and_not_counted_is_found():
    batch = degenerate.random_batch(4, 16)
    degenerate.KINDS["no keypoint"](batch, np.random.default_rng(0))
    degenerate.KINDS["no positive pair"](batch, np.random.default_rng(0))
    counted = {
        "slices_without_keypoints": np.array(1.0),
        "pairs_without_correspondence": np.array(0.0),
        "samples_without_positive": np.array(0.5),
    }
    found = degenerate.uncounted(batch, counted, 0.1)
    assert found == "samples_without_positive is 0.500 of at least 1.000"


def test_a_fork_tells_how_it_ended(tmp_path):
    for function, expected in ((lambda: 3, 3), (lambda: 1 // 0, 1)):
        with Fork(function, tmp_path / "log") as fork:
            assert fork.wait() == expected
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()


def test_the_table_counts_and_lists_what_was_wrong():
    tally = Tally("flips", seconds=2.4)
    for outcome in ("caught", "caught", "harmless", "silent"):
        tally.add(outcome, "record 3")
    text = as_markdown([tally])
    assert "| flips | 4 | 2 | 1 | 1 | 0 | 2 |" in text
    assert text.endswith("- flips: silent: record 3")
    assert as_json([tally])[0]["tries"] == 4


def test_the_command_runs_campaigns_at_a_time_and_prints_them_in_order(tmp_path, capsys):
    arguments = ["--only", "datasets,volumes", "--count", "3", "--jobs", "2"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "faults.md").read_text()
    faults = [row["fault"] for row in json.loads((tmp_path / "faults.json").read_text())]
    assert faults[0].endswith("bad volumes, in one pass")
    assert faults[-1] == "damaged .nii.gz in preparation"
    assert table.index(faults[0]) < table.index(faults[-1])


def test_the_command_refuses_unknown_campaigns(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--only", "volumes,nothing"])
    assert end.value.code == 2
    assert f"nothing; expected of {', '.join(CAMPAIGNS)}" in capsys.readouterr().err
