"""Full, read-only and forbidden disks, in the middle of a save and of a preparation.

Each try is a process of its own on a small disk in memory, which it mounts for itself alone; that
needs root or user namespaces. `python -m tests.campaigns.disks ACTION FAULT FOLDER SEED` is such a
try: it prints what was wrong, or nothing.
"""

import contextlib
import hashlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kafjax.errors import UserError
from tests.campaigns.campaign import Settings, Tally
from tests.campaigns.checkpoints import make_state, open_checkpointer, same_bits

USUAL = 3  # of each action and fault
FAULTS = ("full", "read-only", "forbidden", "limit")
ACTIONS = ("save", "preparation")
_SECONDS = 10.0  # within which an error must come
_DISK = 16 * 2**20
# Less than either needs: three shards of about 50 kB, and a checkpoint of 75 kB.
_ROOM = {"save": 40_000, "preparation": 100_000}
_WITHOUT = "-dac_override,-dac_read_search"  # or root may write anywhere


def run(settings: Settings) -> Iterator[Tally]:
    """Every action under every fault."""
    count = settings.tries(USUAL)
    for action in ACTIONS:
        for fault in FAULTS:
            tally = Tally(f"disk {fault} in a {action}")
            for i in range(count):
                folder = settings.folder(f"disks/{action}_{fault}_{i}")
                child = _start(action, fault, folder, settings.seed + i)
                if child.returncode and not child.stdout:
                    child.stdout = f"ended with {child.returncode}: {child.stderr[-400:]}"
                tally.expect(not child.stdout, child.stdout.strip())
            yield tally


def _start(action: str, fault: str, folder: Path, seed: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.campaigns.disks", action, fault, str(folder), str(seed)]
    if fault == "forbidden" and os.geteuid() == 0:
        command = ["setpriv", "--bounding-set", _WITHOUT, "--inh-caps", _WITHOUT, *command]
    if fault in ("full", "read-only"):
        script = f'mount -t tmpfs -o size={_DISK} faults {folder} && exec "$@"'
        command = [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "-",
            *command,
        ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@contextlib.contextmanager
def fault_on(fault: str, folder: Path, room: int) -> Iterator[None]:
    """Lets a disk have the fault; a full or limited one takes `room` bytes more."""
    filler = folder / "filler"
    if fault == "full":
        free = os.statvfs(folder)
        with filler.open("wb") as stream:
            stream.write(bytes(max(0, free.f_bavail * free.f_frsize - room)))
    elif fault == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    elif fault == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(1, room // 8), resource.RLIM_INFINITY))
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if path.is_dir()}
    if fault == "forbidden":
        for path in modes:
            path.chmod(0o555)
    try:
        yield
    finally:
        if fault == "full":
            filler.unlink()
        elif fault == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        elif fault == "limit":
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)


def try_save(fault: str, folder: Path, rng: np.random.Generator) -> str:
    """A save fails, the one before is whole, and the next one succeeds. What was wrong."""
    workdir = folder / "run"
    _save(workdir, 1)
    begin = time.monotonic()
    with fault_on(fault, folder, int(rng.integers(_ROOM["save"]))):
        problem = _expect_error(lambda: _save(workdir, 2), str(workdir))
    if problem:
        return problem
    if (seconds := time.monotonic() - begin) > _SECONDS:
        return f"the error came after {seconds:.0f} s"
    with open_checkpointer(workdir) as checkpointer:
        restored = checkpointer.restore_latest(make_state(0))
        if restored is None or not same_bits(restored[0], make_state(1)):
            return "the earlier checkpoint is not what it was"
    _save(workdir, 2)
    with open_checkpointer(workdir) as checkpointer:
        restored = checkpointer.restore_latest(make_state(0))
        right = restored is not None and same_bits(restored[0], make_state(2))
    return "" if right else "the checkpoint saved afterwards is not what was saved"


def _save(workdir: Path, step: int) -> None:
    with open_checkpointer(workdir) as checkpointer:
        checkpointer.save(step, make_state(step), metrics={}, data={"step": step})


def _expect_error(action: Callable[[], object], *words: str) -> str:
    """What was wrong with the error of an action that must fail."""
    try:
        action()
    except (OSError, UserError) as error:
        absent = [word for word in words if word not in str(error)]
        return f"no {', '.join(absent)} in: {error}" if absent else ""
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "no error was raised"


def try_preparation(fault: str, folder: Path, rng: np.random.Generator) -> str:
    """A preparation fails with one line and no dataset, and is finished when there is room."""
    from data_prep.main import main as prepare
    from tests.campaigns import tiny

    raw = tiny.make_phantoms(folder / "raw")
    expected = _contents(tiny.make_dataset(raw, folder / "good"))
    data = folder / "data"
    data.mkdir()
    arguments = [
        *("--dataset", "chd", "--name", "phantom", "--raw_dir", raw, "--data_dir", data),
        *("--max_keypoints", 32, "--num_workers", 0),
    ]
    begin = time.monotonic()
    with fault_on(fault, folder, int(rng.integers(_ROOM["preparation"]))):
        status, errors = tiny.call_command(prepare, *arguments)
    if status != 1 or str(data) not in errors or "Traceback" in errors:
        return f"status {status}: {errors}"
    if (seconds := time.monotonic() - begin) > _SECONDS:
        return f"the error came after {seconds:.0f} s"
    if (data / "phantom" / "1.0.0").exists():
        return "an unfinished dataset is in its place"
    status, errors = tiny.call_command(prepare, *arguments)
    if status:
        return f"with room again: status {status}: {errors}"
    return (
        "" if _contents(data / "phantom" / "1.0.0") == expected else "other bytes than undisturbed"
    )


def _contents(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def _main() -> None:
    action, fault, folder, seed = sys.argv[1:]
    tries = {"save": try_save, "preparation": try_preparation}
    print(tries[action](fault, Path(folder), np.random.default_rng(int(seed))), end="")


if __name__ == "__main__":
    _main()
