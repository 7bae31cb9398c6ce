"""What does the optimal transport of keypoint matching cost, and are its gradients exact?

Time is that of the loss and its gradients by the scores, as a share of the pretraining step of as
many pairs; that step is measured for one pair and multiplied, for no CPU has memory for 32.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

from benchmarks.case import Case, inputs
from benchmarks.flags import integers, make_parser, network_flags, run, settings
from benchmarks.report import Result, Table, gigabytes, seconds
from benchmarks.workers import time_paired


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    flags = make_parser(__doc__)
    network_flags(flags, num_keypoints=512)
    flags.set_defaults(batch_size=32)
    flags.add_argument("--num_iterations", type=int, default=100)
    flags.add_argument("--memory_iterations", type=integers, default=(25, 400))
    flags.add_argument("--turns", type=int, default=3)
    return flags


def measure(arguments: argparse.Namespace) -> Result:
    """Time, memory and exactness."""
    batch_size, k = arguments.batch_size, arguments.num_keypoints
    compiled = compile_loss(batch_size, k, arguments.num_iterations)
    transport = time_paired(compiled, arguments.turns)
    pair = pair_seconds(arguments)
    share = transport / (batch_size * pair)
    time_rows = [
        [f"transport and its gradients, {batch_size} pairs", seconds(transport)],
        ["pretraining gradients, 1 pair", seconds(pair)],
        ["share", f"{share:.1%}"],
    ]
    memory = {n: temporaries(compile_loss(batch_size, k, n)) for n in arguments.memory_iterations}
    memory_rows = [[str(n), gigabytes(used)] for n, used in memory.items()]
    errors = gradient_errors(k, arguments.num_iterations)
    error_rows = [[name, f"{error:.1e}"] for name, error in errors.items()]
    tables = [
        Table(f"{arguments.num_iterations} iterations, K {k}", ["", "time"], time_rows),
        Table("Temporaries by iterations", ["iterations", "temporaries"], memory_rows),
        Table("Largest error of a gradient over its largest entry", ["", "error"], error_rows),
    ]
    numbers = {"seconds": transport, "pair_seconds": pair, "share": share}
    numbers |= {"temporaries": memory, "errors": errors}
    return Result("sinkhorn", "Optimal transport", tables, numbers, settings(arguments))


def _problem(batch_size: int, k: int) -> tuple[Any, ...]:
    """Scores, correspondences and masks; a tenth of the keypoints is padding."""
    import numpy as np

    rng = np.random.default_rng(0)
    scores = rng.standard_normal((batch_size, k, k), np.float32)
    correspondence = np.where(rng.random((batch_size, k)) < 0.5, rng.permutation(k), -1)
    masks = rng.random((2, batch_size, k)) < 0.9
    return scores, correspondence, *masks


def _loss(iterations: int, scores: Any, correspondence: Any, mask_1: Any, mask_2: Any) -> Any:
    import jax.numpy as jnp

    from kafjax.assignment import log_optimal_transport, matching_loss

    dustbin = jnp.ones((), scores.dtype)
    log_assignment = log_optimal_transport(
        scores, mask_1, mask_2, dustbin, num_iterations=iterations
    )
    return jnp.mean(matching_loss(log_assignment, correspondence, mask_1, mask_2))


def compile_loss(batch_size: int, k: int, iterations: int) -> functools.partial:
    """The loss and its gradients by the scores, compiled, with its arguments."""
    import jax

    arguments = jax.device_put(_problem(batch_size, k))
    gradient = jax.jit(jax.value_and_grad(functools.partial(_loss, iterations)))
    compiled = gradient.lower(*arguments).compile()
    return functools.partial(_wait_for, compiled, arguments)


def _wait_for(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import jax

    return jax.block_until_ready(compiled(*arguments))


def temporaries(call: functools.partial) -> int:
    """Bytes that a compiled call needs in addition to its arguments and results."""
    return int(call.args[0].memory_analysis().temp_size_in_bytes)


def pair_seconds(arguments: argparse.Namespace) -> float:
    """Seconds of the pretraining network's gradients for one pair of slices."""
    import jax
    import jax.numpy as jnp

    from benchmarks.ours import model_config
    from kafjax.models import build_model, example_inputs, init_variables

    case = Case(
        size=arguments.size,
        num_keypoints=arguments.num_keypoints,
        filters=arguments.filters,
        batch_size=2,
    )
    model = build_model(model_config(case, "pretraining"))
    variables = jax.device_put(init_variables(model, 0, *example_inputs("pretraining")))
    batch = inputs(case)
    pair = tuple(batch[name][None] for name in ("image", "keypoints", "keypoint_mask"))

    def loss(params: Any, statistics: Any, *pair: Any) -> Any:
        both = {"params": params, "batch_stats": statistics}
        output, updated = model.apply(both, *pair, train=True, mutable=["batch_stats"])
        matched = jnp.mean(output.log_assignment[:, :-1, -1])
        return sum(jnp.mean(jnp.square(x)) for x in output.cnn + output.kaf) - matched, updated

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = gradient.lower(variables["params"], variables["batch_stats"], *pair).compile()
    given = (variables["params"], variables["batch_stats"], *pair)
    return time_paired(functools.partial(_wait_for, compiled, given), turns=1)  # of half a minute


def gradient_errors(k: int, iterations: int) -> dict[str, float]:
    """Errors of the gradients of two pairs in float32, and of float64's against differences."""
    import jax
    import numpy as np

    problem = _problem(2, k)
    loss = functools.partial(_loss, iterations)
    single = np.asarray(jax.jit(jax.grad(loss))(*problem))
    with jax.enable_x64(True):
        scores, *rest = (np.asarray(problem[0], np.float64), *problem[1:])
        double = np.asarray(jax.jit(jax.grad(loss))(scores, *rest))
        direction = np.random.default_rng(1).standard_normal(scores.shape)
        evaluate, step = jax.jit(loss), 1e-5
        up, down = (float(evaluate(scores + s * direction, *rest)) for s in (step, -step))
    slope, expected = (up - down) / (2 * step), float(np.sum(double * direction))
    return {
        "float32 against float64": float(np.abs(single - double).max() / np.abs(double).max()),
        "float64 along a random direction against differences": abs(slope / expected - 1),
    }


if __name__ == "__main__":
    run(parser(), measure)
