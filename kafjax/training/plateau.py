"""Detects pretraining runs whose embeddings are all equal, and suggests remedies.

Near that point the contrastive loss has almost no gradient, and if the patch does not reveal a
slice's position, it is the optimum: a run can stay there throughout while its other losses fall.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kafjax.losses import collapsed_loss

PLATEAU_STEPS = 200  # before a warning; runs that learn have left it by then
_TOLERANCE = 0.01  # fraction of the loss
_HEADS = ("cnn", "kaf")


def steps_on_plateau(
    rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> dict[str, int]:
    """Counts, for each global head, the last logged steps with equal embeddings.

    Args:
      rows: a run's logged metrics in order of steps, as in `metrics.jsonl`.
      config: fields of the run's config.

    Returns:
      Steps by head, for heads whose mean loss was within 1 % of `collapsed_loss` in every row for
      at least `PLATEAU_STEPS`; empty for tasks other than pretraining.
    """
    if config.get("task") != "pretrain" or not rows:
        return {}
    level = collapsed_loss(config["batch_size"], config["loss"]["temperature"])
    found = {}
    for head in _HEADS:
        logged = [row for row in rows if f"loss_{head}" in row]
        start = 0  # the last step before the plateau
        for row in logged:
            if abs(row[f"loss_{head}"] / level - 1) > _TOLERANCE:
                start = row["step"]
        steps = logged[-1]["step"] - start if logged else 0
        if steps >= PLATEAU_STEPS:
            found[head] = steps
    return found


def describe_plateau(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str | None:
    """A line that names the heads on the plateau and the likely remedies, or None."""
    found = steps_on_plateau(rows, config)
    if not found:
        return None
    level = collapsed_loss(config["batch_size"], config["loss"]["temperature"])
    heads = ", ".join(f"loss_{head} ({steps} steps)" for head, steps in found.items())
    return (
        f"within 1 % of {level:.3f}, where all embeddings are equal: {heads}. Likely remedies: "
        "a config.data.patch_size that reveals a slice's position in its volume, best the whole "
        "slice; for a short run Adam, at 1e-4 rather than 1e-3; more steps"
    )


class Plateau:
    """Follows a run's log, and warns once when the run reaches the plateau.

    Args:
      config: fields of the run's config.
      rows: the run's log before it was resumed.
    """

    def __init__(self, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()):
        self._config = config
        self._rows = list(rows)
        self._there = describe_plateau(self._rows, config) is not None

    def see(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Adds a logged row; returns a line if the run has just reached the plateau."""
        self._rows.append({"step": step, **metrics})
        told = describe_plateau(self._rows, self._config)
        came, self._there = told is not None and not self._there, told is not None
        return f"step {step}: {told}" if came else None
