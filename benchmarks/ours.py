"""Our side: the product's own training step and prediction of a case."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.case import Case, inputs
from benchmarks.profiles import profile_jax
from benchmarks.workers import Side
from kafjax.tasks.segmentation import Segmentation
from kafjax.training import step


class Fields(SimpleNamespace):
    """A config without ml_collections, which not every machine has."""

    def get(self, name: str, default: Any = None) -> Any:
        """A field that may be absent."""
        return getattr(self, name, default)


def model_config(case: Case, head: str = "segmentation") -> Any:
    """`config.model` of a case."""
    fields = {
        "name": case.network,
        "head": head,
        "filters": case.filters,
        "num_attention_layers": case.num_attention_layers,
        "num_classes": case.num_classes,
        "embedding": 512,
        "num_matcher_layers": 4,
        "num_sinkhorn_iterations": 100,
        "dtype": case.dtype,
        "remat": case.remat,
    }
    return Fields(**fields)


def run_config(case: Case) -> Any:
    """The config of a fine-tuning run without augmentation."""
    return Fields(
        task="segment",
        seed=0,
        data=Fields(),
        augment=None,
        loss=Fields(weights={"cross_entropy": 1.0, "dice": 0.0}, class_weights=None),
        sync_batch_norm=True,
        num_microbatches=case.num_microbatches,
        model=model_config(case),
        optimizer=Fields(name="adam", weight_decay=1e-5),
    )


class TrainingStep:
    """The product's training step, compiled for a case. Its state is on the device.

    Attributes:
      facts: seconds of `init` and of `compile`; `temporaries`, bytes that the compiled step needs
        in addition to its arguments and results.
    """

    def __init__(self, case: Case):
        config = run_config(case)
        task = Segmentation(config, axis_name=step.AXIS_NAME)
        optimizer = step.make_optimizer(config.optimizer)
        with stopwatch() as init_seconds:
            state = step.init_state(task, optimizer)
        self._state = step.replicate(state)
        self._rest = step.step_inputs(inputs(case), 5e-5)
        self._task = task
        self._update = step.make_update(task, optimizer)
        with stopwatch() as compile_seconds:
            compiled = self._update.lower(self._state, *self._rest).compile()
        self.facts = {
            "init": init_seconds(),
            "compile": compile_seconds(),
            "temporaries": float(compiled.memory_analysis().temp_size_in_bytes),
        }

    def __call__(self) -> float:
        """Takes one step and waits for it; its loss."""
        self._state, metrics = self._update(self._state, *self._rest)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def prediction(self) -> Callable[[], Any]:
        """Prediction by the state's running statistics, compiled."""
        batch = self._rest[0]

        mapped = step.map_devices(self._task.predict, in_axes=(None, 0), out_axes=0)

        def call() -> None:
            jax.block_until_ready(mapped(self._state.variables, batch))

        mapped.lower(self._state.variables, batch).compile()
        step.return_freed_memory()
        return call


def make_side(case: Case) -> Side:
    """Our side of a comparison of `step` and `forward`."""
    train = TrainingStep(case)
    with stopwatch() as seconds:
        predict = train.prediction()
    facts = {**train.facts, "compile_forward": seconds()}
    return Side({"step": train, "forward": predict, "device_peak": device_peak}, facts)


def make_step_side(case: Case) -> Side:
    """Our side of a comparison of `step` alone."""
    train = TrainingStep(case)
    return Side({"step": train, "device_peak": device_peak}, train.facts)


def make_profiled_side(case: Case) -> Side:
    """Our side of a comparison of `step` on a GPU, with its kernels."""
    side = make_step_side(case)
    side.calls["profile"] = lambda: profile_jax(side.calls["step"])
    return side


def device_peak() -> float:
    """Peak bytes of device memory, or NaN if the device does not report it."""
    statistics = jax.local_devices()[0].memory_stats()
    return float((statistics or {}).get("peak_bytes_in_use", jnp.nan))


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds from entering to leaving."""
    begin = time.perf_counter()
    end: list[float] = []
    yield lambda: end[0]
    end.append(time.perf_counter() - begin)
