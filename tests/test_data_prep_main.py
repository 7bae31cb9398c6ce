"""The command line: what it prints, its exit status, and a disk that takes no more."""

import errno
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.main import main
from kafjax.data.dataset import open_dataset
from tests.raw_layouts import write_acdc

ROOT = Path(__file__).parent.parent


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "data_prep.main", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        **options,
    )


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def test_phantoms_are_written_and_prepared_by_one_command(tmp_path, capsys):
    arguments = "--dataset phantom --num_subjects 2 --size 48x40x6 --num_workers 0 --data_dir"
    arguments = [*arguments.split(), str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"Prepared 2 volumes, 12 slices, in {tmp_path / 'phantom' / '1.0.0'}" in out
    assert re.search(r"keypoints per slice: min \d+, median \d+, max \d+; 0\.0% of", out)
    assert "kafjax train --config phantom_pretrain" in out
    assert len(list((tmp_path / "raw" / "phantom").glob("*.nii.gz"))) == 4

    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("Already prepared from these files: 2 volumes")

    assert main([*arguments, "--max_keypoints", "5"]) == 2
    assert any("max_keypoints: 512 there, 5 asked for" in line for line in lines_of(capsys))
    assert main([*arguments, "--max_keypoints", "5", "--overwrite"]) == 0
    assert "100.0% of the slices had more than 5" in capsys.readouterr().out


def test_chd_is_prepared_in_a_process_of_its_own(phantom_raw, tmp_path):
    done = run("--dataset", "chd", "--raw_dir", phantom_raw, "--data_dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "chd" / "1.0.0" / "dataset_info.json").exists()
    assert "--config chd_pretrain" in done.stdout


def test_acdc_with_its_cine_stands_beside_acdc(tmp_path, capsys):
    raw_dir = write_acdc(tmp_path / "raw", 1)
    arguments = ["--dataset", "acdc", "--raw_dir", str(raw_dir), "--data_dir", str(tmp_path)]
    arguments += ["--num_workers", "0", "--max_keypoints", "64"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"Prepared 2 volumes, 12 slices, in {tmp_path / 'acdc' / '1.0.0'}" in out
    assert out.endswith(f"Next: kafjax train --config acdc_pretrain --config.data.dir={tmp_path}\n")
    assert main([*arguments, "--cine"]) == 0
    out = capsys.readouterr().out
    assert f"Prepared 5 volumes, 30 slices, in {tmp_path / 'acdc_cine' / '1.0.0'}" in out
    assert "--config acdc_pretrain --config.data.name=acdc_cine" in out


def test_neither_jax_nor_tensorflow_is_imported(phantom_raw, tmp_path):
    script = (
        "import sys; from data_prep.main import main; status = main(sys.argv[1:]);"
        "assert not {'jax', 'tensorflow'} & set(sys.modules); sys.exit(status)"
    )
    arguments = ["--dataset", "chd", "--raw_dir", phantom_raw, "--data_dir", tmp_path]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, "--num_workers", "0"], cwd=ROOT, check=False
    )
    assert done.returncode == 0


def test_every_fault_is_one_line_and_the_status_is_two(phantom_raw, tmp_path, capsys):
    raw_dir = tmp_path / "raw"
    shutil.copytree(phantom_raw, raw_dir)
    (raw_dir / "ct_1002_label.nii.gz").unlink()
    (raw_dir / "ct_1003_image.nii.gz").write_bytes(b"")
    arguments = ["--dataset", "chd", "--raw_dir", raw_dir, "--data_dir", tmp_path / "data"]
    assert main([*map(str, arguments), "--num_workers", "0"]) == 2
    first, second = lines_of(capsys)
    assert first.startswith(f"error: {raw_dir / 'ct_1002_image.nii.gz'}: has no label next to it; ")
    assert second.startswith(f"error: {raw_dir / 'ct_1003_image.nii.gz'}: is empty; ")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "name", ["a [b] *?", "c, 'd' \"e\" $f", "本 é", "l" * 240, os.fsdecode(b"\xff\xfe"), "-g"]
)
def test_any_path_that_the_system_allows_works(name, phantom_raw, tmp_path, capsys):
    place = tmp_path / name
    shutil.copytree(phantom_raw, place / "raw")
    arguments = [
        "--dataset",
        "chd",
        "--name",
        "mine",
        "--max_keypoints",
        "16",
        "--num_workers",
        "0",
    ]
    arguments += ["--raw_dir", str(place / "raw")]
    assert main([*arguments, "--data_dir", str(place / "data")]) == 0
    command = capsys.readouterr().out.rpartition("Next: ")[2]
    if name.isprintable():
        assert f"--config.data.dir={place / 'data'}" in shlex.split(command)
    assert len(open_dataset(place / "data", "mine").read(0).mask) == 16
    assert main([*arguments, "--check", "--json", str(place / "found.json")]) == 0
    assert json.loads((place / "found.json").read_bytes())["faults"] == []


def test_a_tilde_is_the_home_folder(phantom_raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "raw").symlink_to(phantom_raw)
    arguments = ["--dataset=chd", "--raw_dir=~/raw", "--data_dir=~/data", "--max_keypoints=16"]
    assert main([*arguments, "--num_workers=0"]) == 0
    assert f"in {tmp_path / 'data' / 'chd'}" in capsys.readouterr().out
    assert open_dataset("~/data", "chd").directory == tmp_path / "data" / "chd" / "1.0.0"


def test_a_missing_dataset_is_named_with_a_command_that_a_shell_takes(tmp_path):
    with pytest.raises(ValueError, match="no prepared dataset here") as error:
        open_dataset(tmp_path / "my data [1]", "chd")
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[-2:] == ["--data_dir", str(tmp_path / "my data [1]")]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("--dataset chd", "--raw_dir is missing"),
        ("--dataset chd --raw_dir /nowhere", "/nowhere: is not a folder"),
        ("--dataset chd --raw_dir . --num_workers -1", "num_workers is -1"),
        ("--dataset chd --raw_dir . --max_keypoints 0", "max_keypoints is 0"),
        ("--dataset acdc --raw_dir /nowhere", "/nowhere: is not a folder"),
        ("--dataset nnunet --raw_dir /nowhere", "/nowhere: is not a folder"),
        ("--dataset nnunet --raw_dir . --radius 0", "radius is 0"),
        ("--dataset chd --raw_dir . --name My-data", "name is 'My-data'"),
        (f"--dataset chd --raw_dir . --name {'a' * 61}", "name has 61 letters"),
        ("--dataset chd --raw_dir . --cine", "--cine is for --dataset acdc, not chd"),
        ("--dataset acdc --raw_dir . --pixel_spacing 0", "pixel_spacing is 0; expected 0.1 to 10"),
        (
            "--dataset acdc --raw_dir . --radius 9",
            "--radius is for --dataset folder or nnunet, not acdc",
        ),
        ("--dataset chd --raw_dir . --size 64x64x8", "--size is for --dataset phantom, not chd"),
        ("--dataset phantom --num_subjects 0", "num_subjects is 0"),
        ("--dataset phantom --size 600x600x10", "size is (600, 600, 10)"),
    ],
)
def test_a_mistake_is_one_line_and_the_status_is_two(arguments, found, tmp_path, capsys):
    assert main([*arguments.split(), "--data_dir", str(tmp_path / "data")]) == 2
    (line,) = lines_of(capsys)
    assert line.startswith("error: ")
    assert found in line


@pytest.mark.parametrize(
    "arguments", ["", "--dataset mri", "--dataset chd --size 1x2", "--dataset chd --size axbxc"]
)
def test_argparse_refuses_with_status_two(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2


def test_help_shows_layouts_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("ct_1001_image.nii.gz", "Info.cfg", "dataset.json", "--max_keypoints K"):
        assert part in text
    for part in ("(default: 512)", "examples:", "acdc:", "nnunet:", "phantom:"):
        assert part in text


def test_a_disk_that_takes_no_more_is_one_line_and_can_be_continued(phantom_raw, tmp_path):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    arguments = ("--dataset", "chd", "--raw_dir", phantom_raw, "--data_dir", tmp_path)
    stopped = run(*arguments, "--num_workers", "1", preexec_fn=limit_file_size)
    assert stopped.returncode == 1
    (line,) = stopped.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}")
    assert "File too large" in line
    assert not (tmp_path / "chd" / "1.0.0").exists()
    assert list((tmp_path / "chd" / ".1.0.0.preparing" / "dataset").iterdir()) == []
    assert run(*arguments).returncode == 0


def test_a_full_disk_is_named_though_the_write_that_failed_names_nothing(
    phantom_raw, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_prep.prepare.write_text", full)
    arguments = ["--dataset", "chd", "--raw_dir", phantom_raw, "--data_dir", tmp_path]
    assert main([*map(str, arguments), "--num_workers", "0"]) == 1
    (line,) = lines_of(capsys)
    assert line.startswith(f"error: {tmp_path}: No space left on device; volumes already finished")


def test_a_data_folder_that_cannot_be_made_is_one_line(phantom_raw, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    arguments = ["--dataset", "chd", "--raw_dir", phantom_raw, "--data_dir", tmp_path / "file"]
    assert main([*map(str, arguments), "--num_workers", "0"]) == 1
    (line,) = lines_of(capsys)
    assert "file" in line
    assert "Not a directory" in line


@pytest.fixture
def interruptible():
    """Lets processes started here feel Ctrl-C even if the test run itself ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_one_line_and_can_be_continued(phantom_raw, tmp_path):
    arguments = ("--dataset", "chd", "--raw_dir", phantom_raw, "--data_dir", tmp_path)
    command = [sys.executable, "-m", "data_prep.main", *map(str, arguments), "--num_workers", "1"]
    stopped = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    notes = tmp_path / "chd" / ".1.0.0.preparing" / "volumes"
    while not notes.exists():
        assert stopped.poll() is None
        time.sleep(0.001)
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does: to the workers too
    assert stopped.communicate()[1] == "error: stopped; rerun the command to resume\n"
    assert stopped.returncode == 130
    assert not (tmp_path / "chd" / "1.0.0").exists()
    assert run(*arguments).returncode == 0
