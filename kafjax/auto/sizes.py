"""Chooses the network, and its number of steps, that a device can train in the given time.

The largest network is chosen whose training has steps enough in that time; each is timed by the
probe before it is accepted. Where there are scans without labels, training on them too comes before
a larger network. Fewer steps are planned only for the smallest network.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from kafjax.auto.probe import Probe
from kafjax.errors import UserError
from kafjax.training.preflight import device_memory
from kafjax.training.timing import FORWARD_SHARE, Timing, format_seconds


class Network(NamedTuple):
    """A network, its pretraining heads, and limits of its patches and batches.

    Attributes:
      filters: of the first level.
      attention_layers: of each KAF layer; 0: a plain UNet, pretrained with PCL alone.
      embedding: size of the embeddings that are contrasted.
      matcher_layers: of the matching head, if there are KAF layers.
      edge: the longest of its patches, pixels.
      batch: the largest, in pairs or slices.
    """

    filters: int
    attention_layers: int
    embedding: int
    matcher_layers: int
    edge: int
    batch: int

    def work(self, edge: int, places: int) -> float:
        """Time of a step, roughly, relative to other networks: which one is worth timing next.

        The ratio of convolutions to keypoints fits steps on CPU from 8 filters and 64 px to the
        paper's size (docs/performance.md).

        Args:
          edge: pixels of the longest slice.
          places: K on that grid; a smaller patch has fewer keypoints.
        """
        patch = min(edge, self.edge)
        work = self.filters**1.5 * patch**2
        if self.attention_layers:
            layers = 1 + (self.attention_layers + self.matcher_layers) / 8
            work += 125 * self.filters**2 * layers * places * (patch / edge) ** 2
        return work * self.batch


# The paper's first. On CPU the plain UNet compiles in half the time of the smallest KAF-UNet, and a
# step takes an eighth: it is for minutes.
NETWORKS = (
    Network(32, 16, 512, 4, edge=512, batch=16),
    Network(32, 4, 256, 4, edge=384, batch=16),
    Network(16, 4, 128, 4, edge=256, batch=16),
    Network(16, 2, 64, 2, edge=192, batch=8),
    Network(8, 1, 32, 2, edge=128, batch=8),
    Network(16, 0, 64, 0, edge=128, batch=8),
    Network(8, 0, 32, 0, edge=128, batch=6),
)
# Steps: the useful maximum, the minimum of a larger network, and the minimum to train at all.
PRETRAINING_STEPS = (20_000, 1000, 100)
FINE_TUNING_STEPS = (5000, 1000, 300)  # the recipe's rates hold from 300 steps on
# The minimum with unlabelled scans: the fewest with which it was measured (docs/results.md).
SEMI_SUPERVISED_STEPS = 600
# Time of a fine-tuning step on unlabelled scans too, relative to one without: measured on CPU.
_SEMI_SUPERVISED_WORK = 2.7
# Of the time left for training. PCL gained a plain UNet nothing on phantoms (docs/results.md).
_SHARE_OF_PRETRAINING = {"kaf": 0.5, "plain": 0.2}
_SHARE_OF_MEMORY = 0.8
_SHARE_OF_TIME = 0.9  # of what training may take: other work on the machine may slow it down
_COMPILING = 2.5  # times that of the smallest network
_LEAST_BATCH = 4


class Work(NamedTuple):
    """What has to be done apart from the steps of training.

    Attributes:
      seconds: available for the whole, from now on.
      edge: pixels of the longest slice.
      places: K.
      fixed: seconds of preparation and report.
      predicted: slices that the runs segment in all.
      keypoint_seconds: of a slice's keypoints, for those of them that are raw scans.
      fine_tunings: how many runs fine-tune: one, and one for each fold of an estimate; 0: none.
      unlabelled: whether there are scans without labels, to fine-tune on too.
    """

    seconds: float
    edge: int
    places: int
    fixed: float
    predicted: int
    keypoint_seconds: float
    fine_tunings: int
    unlabelled: bool = False


class Choice(NamedTuple):
    """A network with its batches, timings and numbers of steps; fine-tuning's may be None."""

    network: Network
    unlabelled: bool  # whether it fine-tunes on scans without labels too
    configs: tuple[Any, Any | None]
    timings: tuple[Timing, Timing | None]
    memory: int  # bytes on each device
    steps: tuple[int, int]
    predicting: float  # seconds
    overhead: float  # seconds of all but the steps


# (network, whether to fine-tune on unlabelled scans too, limit of batches) -> configs of
# pretraining and, with labels, of fine-tuning.
MakeConfigs = Callable[[Network, bool, int], tuple[Any, Any | None]]


def choose(
    probe: Probe, make: MakeConfigs, seconds_left: Callable[[], float], work: Work
) -> Choice:
    """The largest network that can be trained well; `UserError` where not even the least can.

    Args:
      probe: to time steps.
      make: the configs of a network.
      seconds_left: available; timing reduces them.
      work: what else has to be done.
    """

    def look(network: Network, unlabelled: bool) -> Choice | None:
        fitting = _within_memory(probe, partial(make, network, unlabelled))
        if fitting is None:
            return None
        (first, second), memory = fitting
        timings = (probe.time(first), None if second is None else probe.time(second))
        found = Choice(network, unlabelled, (first, second), timings, memory, (0, 0), 0.0, 0.0)
        return _share_out(found, work, seconds_left())

    smallest = NETWORKS[-1]
    least = look(smallest, False)
    if least is None:
        raise UserError(
            f"a step of the smallest network needs more than the {device_memory() / 2**30:.1f} GiB "
            "of the device"
        )
    for network, unlabelled in _candidates(work):
        ratio = network.work(work.edge, work.places) / smallest.work(work.edge, work.places)
        compiling = _COMPILING * sum(t.compilation for t in least.timings if t)
        expected = least._replace(network=network, unlabelled=unlabelled)
        if not _well_trained(_slower(expected, ratio, work, seconds_left() - compiling)):
            continue
        found = look(network, unlabelled)
        if found is not None and _well_trained(found):
            return found
    found = _share_out(least, work, seconds_left())
    _refuse_too_short(found, work, seconds_left())
    return found


def _candidates(work: Work) -> list[tuple[Network, bool]]:
    """All but the last resort, which is the smallest network trained on labelled scans alone."""
    alone = [(network, False) for network in NETWORKS[:-1]]
    return [(network, True) for network in NETWORKS] * work.unlabelled + alone


def _within_memory(
    probe: Probe, make: Callable[[int], tuple[Any, Any | None]]
) -> tuple[tuple[Any, Any | None], int] | None:
    """The configs with the largest batches that fit into memory, and its bytes, if any do."""
    limit = 10**6
    while True:
        configs = make(limit)
        needed = max(probe.memory(config) for config in configs if config is not None)
        if needed <= _SHARE_OF_MEMORY * device_memory():
            return configs, needed
        limit = max(config.batch_size for config in configs if config is not None) // 2
        if limit < max(_LEAST_BATCH, jax.device_count()):
            return None


def _share_out(choice: Choice, work: Work, seconds: float) -> Choice:
    """The choice with numbers of steps that fit into the seconds, which may be too few."""
    first, second = choice.timings
    fine_tuning = choice.configs[1]
    # A run starts, loads its program from the cache, and saves.
    starting = sum(5 + 0.3 * t.compilation for t in (first, second) if t)
    starting += max(work.fine_tunings - 1, 0) * (5 + 0.3 * (second.compilation if second else 0))
    predicting = work.predicted * work.keypoint_seconds
    if second is not None and fine_tuning is not None:
        predicting += work.predicted * FORWARD_SHARE * second.step / fine_tuning.batch_size
        predicting += 0.3 * second.compilation
    overhead = work.fixed + starting + predicting
    left = _SHARE_OF_TIME * (seconds - overhead)
    share = _SHARE_OF_PRETRAINING["kaf" if choice.network.attention_layers else "plain"]
    steps = _steps(choice.timings, work.fine_tunings, left, share)
    return choice._replace(steps=steps, predicting=predicting, overhead=overhead)


def _steps(
    timings: tuple[Timing, Timing | None], fine_tunings: int, seconds: float, share: float
) -> tuple[int, int]:
    """Steps of both stages in so many seconds: the least of each, then by shares; or none."""
    first, second = timings
    pace = (first.step, second.step * fine_tunings if second else 0.0)
    limits = (PRETRAINING_STEPS, FINE_TUNING_STEPS if second else (0, 0, 0))
    left = seconds - _least_seconds(timings, fine_tunings)
    if left < 0:
        return 0, 0
    steps = [limit[2] for limit in limits]
    shares = (share, 1.0, 1.0) if second else (1.0,)
    # Fine-tuning takes what pretraining leaves, and the other way round.
    for part, i in zip(shares, (0, 1, 0), strict=False):
        more = min(int(part * left / pace[i]), limits[i][0] - steps[i])
        steps[i] += more
        left -= more * pace[i]
    return steps[0], steps[1]


def _least_seconds(timings: tuple[Timing, Timing | None], fine_tunings: int) -> float:
    first, second = timings
    fine_tuning = FINE_TUNING_STEPS[2] * second.step * fine_tunings if second else 0.0
    return PRETRAINING_STEPS[2] * first.step + fine_tuning


def _slower(choice: Choice, ratio: float, work: Work, seconds: float) -> Choice:
    """What would become of a network that takes so many times as long."""
    first, second = choice.timings
    first = first._replace(step=first.step * ratio)
    if second is not None:
        ratio *= _SEMI_SUPERVISED_WORK if choice.unlabelled else 1
        second = second._replace(step=second.step * ratio)
    return _share_out(choice._replace(timings=(first, second)), work, seconds)


def _well_trained(choice: Choice) -> bool:
    smallest = choice.network == NETWORKS[-1]
    fine_tuning = SEMI_SUPERVISED_STEPS if smallest else FINE_TUNING_STEPS[1]
    return _has(
        choice, (PRETRAINING_STEPS[1 if choice.network.attention_layers else 2], fine_tuning)
    )


def _has(choice: Choice, needed: tuple[int, int]) -> bool:
    pretraining, fine_tuning = choice.steps
    return pretraining >= needed[0] and (not choice.configs[1] or fine_tuning >= needed[1])


def _refuse_too_short(choice: Choice, work: Work, seconds: float) -> None:
    if _has(choice, (PRETRAINING_STEPS[2], FINE_TUNING_STEPS[2])):
        return
    training = _least_seconds(choice.timings, work.fine_tunings)
    needed = work.seconds - seconds + choice.overhead + training / _SHARE_OF_TIME
    raise UserError(
        f"--minutes {work.seconds / 60:g} are too short for the smallest network on this device, "
        f"whose shortest training takes {format_seconds(training)}; expected at least "
        f"--minutes {math.ceil(1.1 * needed / 60)}"
    )
