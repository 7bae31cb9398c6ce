"""Damaged checkpoints, and checkpoints of something else."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kafjax.checkpoint.checkpointer import Checkpointer, check_resumable, load_variables
from kafjax.errors import UserError
from kafjax.workdir.preparation import read_preparation, write_preparation
from kafjax.workdir.workdir import Workdir
from tests.campaigns.campaign import Settings, Tally
from tests.campaigns.damage import DAMAGES, damage_file

USUAL = 200
STEPS = (1, 2, 3)
CONFIG = {"task": "pretrain", "model": {"filters": 4}, "num_steps": 10}
_KINDS = ("flip", "flip", "flip", "flip", "flip", "cut", "cut", "blank", "empty", "swap", "append")

State = dict[str, Any]


def make_state(step: int, *, filters: int = 4) -> State:
    """A state such as a step changes, other numbers at every step."""
    rng = np.random.default_rng(step)
    kernel = rng.standard_normal((3, 3, 64, 4 * filters)).astype(np.float32)
    return {
        "step": np.array(step, np.int32),
        "params": {"encoder": {"kernel": kernel, "bias": kernel[0, 0, 0] * 0}},
        "batch_stats": {"encoder": {"mean": kernel.mean((0, 1, 2))}},
        "opt_state": ({"trace": {"kernel": 2 * kernel}}, None),
    }


def open_checkpointer(workdir: Path, config: dict[str, Any] | None = None) -> Checkpointer:
    """The checkpoints of a run that keeps three and the best."""
    folder = Workdir(workdir)
    folder.check_config(config or CONFIG)
    folder.write_config(config or CONFIG)
    return Checkpointer(workdir, keep_newest=3, best_metric="loss")


def save_run(workdir: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """A workdir with these steps."""
    with open_checkpointer(workdir) as checkpointer:
        for step in steps:
            metrics = {"loss": 1.0 / step}
            checkpointer.save(step, make_state(step), metrics=metrics, data={"step": step})
    return workdir


def run(settings: Settings) -> Iterator[Tally]:
    """Damage first, then what was never a checkpoint of this run."""
    good = save_run(settings.folder("checkpoints/good"))
    rng = settings.generator("checkpoints")
    place = settings.scratch / "checkpoints/trial"
    yield _damaged(good, place, rng, settings.tries(USUAL))
    yield _another(good, place)
    yield _facts(settings.folder("checkpoints/facts"), rng, settings.tries(USUAL) // 2)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two trees are alike in structure, types, shapes and every bit."""
    leaves = [jax.tree.leaves(tree) for tree in (a, b)]
    return str(jax.tree.structure(a)) == str(jax.tree.structure(b)) and all(
        (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
        for x, y in zip(*leaves, strict=True)
    )


def _damaged(good: Path, place: Path, rng: np.random.Generator, count: int) -> Tally:
    """The newest step is damaged: it, or the one before, must be restored bit for bit."""
    tally = Tally("checkpoint files of the newest step: flips, cuts, blanks")
    newest = good / "checkpoints" / str(STEPS[-1])
    files = sorted(p.relative_to(good) for p in newest.rglob("*") if p.is_file())
    # By size, as disks err, yet none of the small ones too seldom.
    weights = np.array([(good / path).stat().st_size + 300.0 for path in files])
    for i in range(count):
        path = files[int(rng.choice(len(files), p=weights / weights.sum()))]
        kind = _KINDS[i % len(_KINDS)]
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        damage_file(place / path, DAMAGES[kind], rng)
        _judge(tally, place, f"{kind} of {path}, try {i}")
    return tally


def _judge(tally: Tally, workdir: Path, what: str) -> None:
    try:
        variables = load_variables(workdir)
        with open_checkpointer(workdir) as checkpointer:
            restored = checkpointer.restore_latest(make_state(0))
            steps = checkpointer.all_steps()
    except Exception as error:
        tally.add("unclear", f"{what}: {type(error).__name__}: {str(error)[:300]}")
        return
    if restored is None:
        tally.add("silent", f"{what}: would start from scratch")
        return
    state, data = restored
    step = data["step"]
    expected = make_state(step)
    # Where the optimiser's state alone is damaged, the newest step's parameters are good.
    newest = any(same_bits(variables["params"], make_state(s)["params"]) for s in STEPS[-2:])
    right = same_bits(state, expected) and newest
    if not right:
        tally.add("silent", f"{what}: not what was saved at step {step}")
    elif step == STEPS[-1]:
        tally.add("harmless")
    elif step == STEPS[-2] and steps == list(STEPS[:-1]) and (workdir / "damaged").exists():
        tally.add("caught")
    else:
        tally.add("unclear", f"{what}: went back to {step}, has {steps}")


# What is changed in a good workdir, or what is asked of it; and what the refusal must say.
Change = Callable[[Path], tuple[State, dict[str, Any]]]


def _wants(**changes: Any) -> Change:
    def change(workdir: Path) -> tuple[State, dict[str, Any]]:
        del workdir
        return {**make_state(0), **changes}, CONFIG

    return change


def _wants_config(config: dict[str, Any]) -> Change:
    return lambda workdir: (make_state(0), config)


def _finds(prepare: Callable[[Path], object]) -> Change:
    def change(workdir: Path) -> tuple[State, dict[str, Any]]:
        for step in STEPS:
            prepare(workdir / "checkpoints" / str(step))
        return make_state(0), CONFIG

    return change


def _foreign_orbax(step: Path) -> None:
    """A step that another program wrote with Orbax."""
    import orbax.checkpoint as ocp

    shutil.rmtree(step)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step.absolute(), make_state(0))


def _emptied(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def _file_in_place(step: Path) -> None:
    if step.parent.is_dir():
        shutil.rmtree(step.parent)
        step.parent.write_text("not a folder")


def _edited(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace("loss", "dice"))


def _no_config(step: Path) -> None:
    (step.parents[1] / "config.json").write_text("[]")


_SMALL = make_state(0)
_OTHER = make_state(0, filters=8)
_HALF = {"encoder": {k: v.astype(np.float16) for k, v in _SMALL["params"]["encoder"].items()}}
ANOTHER: dict[str, tuple[Change, tuple[str, ...]]] = {
    "another model": (
        _wants(params={"swin": _SMALL["params"]["encoder"]}),
        ("params/swin/kernel", "params/encoder/kernel", "params/encoder/bias"),
    ),
    "another shape": (_wants(**_OTHER), ("params/encoder/kernel", "opt_state", "batch_stats")),
    "another dtype": (_wants(params=_HALF), ("float16", "float32", "params/encoder/bias")),
    "another optimiser": (_wants(opt_state=({"mu": _SMALL["params"]}, None)), ("opt_state/0/mu",)),
    "another config": (
        _wants_config({**CONFIG, "task": "segment", "model": {"filters": 8}}),
        ("task: 'pretrain' there, 'segment' here", "model.filters: 4 there, 8 here"),
    ),
    "another program's Orbax steps": (_finds(_foreign_orbax), ("checkpoint",)),
    "folders with nothing in them": (_finds(_emptied), ("damaged",)),
    "steps without their description": (
        _finds(lambda step: shutil.rmtree(step / "meta")),
        ("damaged",),
    ),
    "steps without their arrays": (
        _finds(lambda step: shutil.rmtree(step / "state")),
        ("damaged",),
    ),
    "steps whose description was edited": (_finds(_edited), ("damaged",)),
    "a config that is none": (_finds(_no_config), ("config.json",)),
    "a file in place of the folder": (_finds(_file_in_place), ("checkpoints",)),
}


def _another(good: Path, place: Path) -> Tally:
    """Each is refused with every difference, never restarted, and nothing in it is changed."""
    tally = Tally("checkpoints of another model, shape, type, config, program; none to resume")
    for name, (change, words) in ANOTHER.items():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        template, config = change(place)
        before = _contents(place)
        try:
            with open_checkpointer(place, config) as checkpointer:
                restored = checkpointer.restore_latest(template)
        except (UserError, OSError) as error:
            absent = [word for word in words if word not in str(error)]
            tally.expect(not absent, f"{name}: no {', '.join(absent)} in: {error}")
        except Exception as error:
            tally.add("unclear", f"{name}: {type(error).__name__}: {error}")
        else:
            tally.add("silent", f"{name}: {'restarted' if restored is None else 'restored'}")
        if name != "another config" and "config" not in name and _contents(place) != before:
            tally.add("unclear", f"{name}: the refused workdir was changed")
    _expect_no_fresh_start(tally, place)
    return tally


def _expect_no_fresh_start(tally: Tally, place: Path) -> None:
    """Asked to resume where there is nothing, a run is refused."""
    shutil.rmtree(place)
    for name in ("no folder", "an empty folder"):
        try:
            check_resumable(place)
        except UserError as error:
            tally.expect(str(place) in str(error), f"{name}: {error}")
        else:
            tally.add("silent", f"{name}: would start from scratch")
        place.mkdir(exist_ok=True)


def _facts(folder: Path, rng: np.random.Generator, count: int) -> Tally:
    """The facts of a run that evaluation and prediction use: changes are refused, with the file."""
    tally = Tally("config.json and preparation.json of a run")
    config: dict[str, Any] = {
        "task": "segment",
        "data": {"max_keypoints": 32, "fold": 0},
        "model": {"num_classes": 2, "filters": 32},
    }
    facts: dict[str, Any] = {
        "kind": "chd",
        "classes": ["a", "b"],
        "max_keypoints": 32,
        "seed": 0,
        "spacing": 1.25,
        "keypoint_selection": "random",
    }
    for i in range(count):
        open_checkpointer(folder, config).close()
        write_preparation(folder, facts)
        path = folder / ("config.json", "preparation.json")[i % 2]
        kind = _KINDS[i % len(_KINDS)]
        damage_file(path, DAMAGES[kind], rng)
        try:
            found = (Workdir(folder).read_config(), read_preparation(folder))
            # Damage to the name of the checksum leaves a field too many, and every value as it was.
            same = all(a.items() <= b.items() for a, b in zip((config, facts), found, strict=True))
            tally.add("harmless" if same else "silent", f"{kind} of {path.name}, try {i}: {found}")
        except UserError as error:
            tally.expect(path.name in str(error), f"{kind} of {path.name}: {error}")
        path.unlink()
    return tally


def _contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
