"""Generated configs and command lines: accepted and fit to run, or refused with the field's name.

Half of the tries change fields of a config, half are command lines. `python -m
tests.campaigns.configs SEED COUNT` parses the latter, each in a fork of a process that has imported
the command: it prints a JSON list of [arguments, exit status, error output].
"""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from kafjax.configs import phantom_pretrain, phantom_scratch
from kafjax.errors import UserError
from kafjax.training.config_checks import check_fields
from tests.campaigns import tiny
from tests.campaigns.campaign import Settings, Tally

USUAL = 1000
USUAL_STEPS = 10  # accepted configs that run a step
_FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 0.3, 1.0, 7.5, 1e30)
_INTEGERS = (-1, 0, 1, 2, 3, 4, 8, 16, 100, 10**12)
_OTHERS: tuple[Any, ...] = (
    *(None, True, False, "", "adam", "unet", "kaf_unet", "gcl", "bfloat16", "phantom", "x" * 300),
    *((), (16,), (16, 32), (32, 32), (17, 32), (0.5, 2.0), (2.0, 0.5), ("a", "b"), (1, 2, 3)),
    *([], {}, {"name": 1}, np.float64(0.5), np.int64(3), 3j, b"bytes", print),
)
_TEXTS = (
    *("", " ", "abc", "None", "True", "-1", "0", "1", "2", "8", "16", "0.3", "1e400", "nan", "inf"),
    *("(16,16)", "(16, 32)", "(1,2,3)", "[", "{}", "{'a': 1}", "unet", "adam", "=", "--", "1_0"),
    *("'", '"', "\\", "%s", "{0}", "\n", "é", "0x10", "1 2", "__import__('os')", "x" * 300),
)
_CONFIGS = ("configs/phantom_pretrain.py", "configs/chd_finetune.py", "configs/acdc_scratch.py")
# What a refusal may look like: fields by name, what was found, what was expected.
_LINE = re.compile(r"config\.[\w.]+:? .*(expected|nearest|not a field)", re.DOTALL)
# What a check may find: that, where config and dataset differ, or how to prepare one.
_FINDING = re.compile(r"expected|the dataset has .*, the config says|this command prepares it")


def run(settings: Settings) -> Iterator[Tally]:
    """Configs, command lines, the check of the accepted that are small, and steps of a few."""
    half = max(1, settings.tries(USUAL) // 2)
    rng = settings.generator("configs")
    raw = tiny.make_phantoms(settings.folder("configs/raw"), 5)
    dataset = tiny.make_dataset(raw, settings.folder("configs/data"))
    accepted: list[ml_collections.ConfigDict] = []
    yield _configs(dataset, rng, half, accepted)
    yield _command_lines(settings.seed, half)
    small = [config for config in accepted if _is_small(config)]
    yield _checks(small, settings.scratch / "configs/none")
    yield _steps(small, settings, min(USUAL_STEPS, settings.tries(USUAL_STEPS)))


def small_config(dataset: Path, task: int) -> ml_collections.ConfigDict:
    """A config that fits the dataset and a test's time."""
    if task:
        return tiny.segmentation_config(dataset, **{"data.num_folds": 5})
    return tiny.pretraining_config(dataset)


def change_fields(config: ml_collections.ConfigDict, rng: np.random.Generator) -> list[str]:
    """Gives one to three fields other values, or takes or adds one; what was done."""
    flat = list(_paths(config))
    done = []
    with config.unlocked():
        for _ in range(int(rng.integers(1, 4))):
            path, action = str(rng.choice(flat)), rng.random()
            parent, name = _parent(config, path)
            if parent is None:
                continue
            pools: tuple[Any, ...] = (_INTEGERS, _FLOATS, _OTHERS)
            kind = type(parent.get(name))
            if action < 0.5:  # of the field's own type, or the checks of ranges are never reached
                pools = (_FLOATS,) if kind is float else (_INTEGERS,) if kind is int else (_OTHERS,)
            pool = pools[int(rng.integers(len(pools)))]
            value = pool[int(rng.integers(len(pool)))]
            if action > 0.95:
                name, value = f"{name}s", 1
            elif action > 0.9:
                del parent[name]
                done.append(f"del {path}")
                continue
            with parent.ignore_type():
                parent[name] = value
            done.append(f"{path}={value!r}")
    return done


def _configs(
    dataset: Path, rng: np.random.Generator, count: int, accepted: list[ml_collections.ConfigDict]
) -> Tally:
    tally = Tally("generated configs: fit to run, or refused by name")
    for i in range(count):
        config = small_config(dataset, i % 2)
        done = change_fields(config, rng)
        try:
            check_fields(config)
        except UserError as error:
            unclear = [line for line in str(error).splitlines() if not _LINE.match(line)]
            tally.expect(not unclear, f"{done}: {unclear}")
            continue
        except Exception as error:
            tally.add("unclear", f"{done}: {type(error).__name__}: {error}")
            continue
        problem = _build(config)
        tally.expect(not problem, f"{done}: {problem}")
        if not problem:
            accepted.append(config)
    return tally


def _build(config: ml_collections.ConfigDict) -> str:
    """Makes the parts of a run, as training does; what is not a clear refusal."""
    from kafjax.tasks.registry import TASKS
    from kafjax.training.preflight import check_devices, open_run_dataset, split_run
    from kafjax.training.step import learning_rates, make_optimizer

    try:
        check_devices(config)
        split_run(config, open_run_dataset(config))
    except UserError:
        pass  # of what the machine and the dataset have
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        TASKS[config.task](config)
        make_optimizer(config.optimizer)
        learning_rates(config.optimizer, 10)
        json.dumps(config.to_dict())
    except UserError as error:
        return "" if str(error).startswith("config.") else f"UserError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _checks(accepted: list[ml_collections.ConfigDict], workdir: Path) -> Tally:
    """The check traces a step with its gradients: that it fails on no shape or type."""
    from kafjax.training.preflight import look

    tally = Tally("the check of accepted configs traces a step, or reports why not")
    for config in accepted:
        try:
            wrong = [finding.text for finding in look(config, workdir) if finding.wrong]
        except Exception as error:
            tally.add("unclear", f"{type(error).__name__}: {error}: {config.to_json()}")
        else:
            tally.expect(all(map(_FINDING.search, wrong)), f"{wrong}: {config.to_json()}")
    return tally


def _steps(accepted: list[ml_collections.ConfigDict], settings: Settings, count: int) -> Tally:
    """Some of the accepted configs run a step."""
    from kafjax.training.loop import train
    from kafjax.training.preflight import look

    tally = Tally("accepted configs run a step, or the check reports why not")
    for i, config in enumerate(accepted[:count]):
        config.num_steps = 1
        workdir = settings.folder(f"configs/run_{i}")
        wrong = [finding for finding in look(config, workdir) if finding.wrong]
        try:
            with redirect_stdout(io.StringIO()):
                train(config, workdir)
        except UserError as error:
            tally.expect(bool(wrong), f"refused though the check found nothing wrong: {error}")
        except Exception as error:
            tally.add("unclear", f"{type(error).__name__}: {error}")
        else:
            tally.expect(not wrong, f"ran though the check found: {wrong}", otherwise="unclear")
    return tally


def _is_small(config: ml_collections.ConfigDict) -> bool:
    model = config.model
    sizes = (model.filters, model.num_attention_layers, *config.data.patch_size, config.batch_size)
    return max(sizes) <= 64 and model.get("embedding", 1) <= 64 and model.dtype != "float64"


def _command_lines(seed: int, count: int) -> Tally:
    tally = Tally("generated command lines: accepted, or refused in a line")
    command = [sys.executable, "-m", "tests.campaigns.configs", str(seed), str(count)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        tally.add("unclear", child.stderr[-500:])
        return tally
    for arguments, status, errors in json.loads(child.stdout):
        said = [line for line in errors.splitlines() if line]
        clear = bool(said) and said[0].startswith("error: ") and "Traceback" not in errors
        fine = status == 0 or (status == 2 and clear)
        tally.expect(fine, f"{arguments}: {status} {errors[-300:]}")
    return tally


def make_arguments(rng: np.random.Generator) -> list[str]:
    """A command line of the training command, seldom without any mistake."""
    path = str(rng.choice(_CONFIGS))
    configs = (phantom_pretrain.get_config(), phantom_scratch.get_config())
    fields = [path for config in configs for path in _paths(config)]
    arguments = [f"--config={path}"]
    for _ in range(int(rng.integers(1, 4))):
        field, text = str(rng.choice(fields)), str(rng.choice(_TEXTS))
        choice = rng.random()
        if choice < 0.8:
            arguments.append(f"--config.{field}={text}")
        elif choice < 0.85:
            arguments.append(f"--config.{field}x={text}")
        elif choice < 0.9:
            arguments.append(f"--{text}")
        elif choice < 0.95:
            arguments[0] = f"--config={text}"
        else:
            name = str(rng.choice(["workdir", "check", "describe", "num_processes", "process_id"]))
            arguments.append(f"--{name}={text}")
    return arguments


def _paths(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    for name in config:
        value = config.get(name)
        if isinstance(value, ml_collections.ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")
        yield f"{prefix}{name}"


def _parent(
    config: ml_collections.ConfigDict, path: str
) -> tuple[ml_collections.ConfigDict | None, str]:
    *parents, name = path.split(".")
    for parent in parents:
        value = config.get(parent)
        if not isinstance(value, ml_collections.ConfigDict):
            return None, name  # an earlier change took it away
        config = value
    return (config, name) if name in config else (None, name)


def _parse_in_fork(arguments: list[str]) -> tuple[int, str]:
    """Exit status and error output of parsing and checking, as the command does."""
    from absl import flags

    import kafjax.main  # noqa: F401 - whose flags they are
    from kafjax.commands import parse_flags, run_command

    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading, errors="replace") as stream:
            errors = stream.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), errors
    os.dup2(writing, 2)
    status = 1
    try:
        sys.argv = ["main", *arguments]  # where config flags look for the fields
        parse_flags(sys.argv)
        run_command(check_fields, flags.FLAGS.config)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _main() -> None:
    rng = np.random.default_rng([int(sys.argv[1]), 1])
    results = []
    for _ in range(int(sys.argv[2])):
        arguments = make_arguments(rng)
        results.append([arguments, *_parse_in_fork(arguments)])
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
