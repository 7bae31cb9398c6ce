"""Whether a pretraining run sits where all its embeddings are alike, and what helps.

Near that point the contrastive loss hardly has a gradient, and where slices' positions cannot be
told from what the network sees, it is the best there is: a run can stay for its whole length while
its other losses fall.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kafjax.losses import collapsed_loss

PLATEAU_STEPS = 200  # before anything is said; runs that learn have left it by then
_TOLERANCE = 0.01  # of the loss
_HEADS = ("cnn", "kaf")


def steps_on_plateau(
    rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]
) -> dict[str, int]:
    """Counts, for each global head, the last logged steps through which its embeddings were alike.

    Args:
      rows: a run's logged metrics in order of steps, as `metrics.jsonl` has them.
      config: fields of the run's config.

    Returns:
      Steps by head, for those whose mean loss has been within 1 % of `collapsed_loss` in every row
      of at least `PLATEAU_STEPS`; empty for other tasks than pretraining.
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
        f"within 1 % of {level:.3f}, where all embeddings are alike: {heads}. Likely remedies: "
        "a config.data.patch_size that shows where in its volume a slice is, best of the whole "
        "slice; for a short run Adam, at 1e-4 rather than 1e-3; more steps"
    )


class Plateau:
    """Follows a run's log, to speak once when the run has come to sit on the plateau.

    Args:
      config: fields of the run's config.
      rows: what the run logged before it was resumed.
    """

    def __init__(self, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()):
        self._config = config
        self._rows = list(rows)
        self._there = describe_plateau(self._rows, config) is not None

    def see(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Takes a logged row; a line where the run has not been on the plateau until it."""
        self._rows.append({"step": step, **metrics})
        told = describe_plateau(self._rows, self._config)
        came, self._there = told is not None and not self._there, told is not None
        return f"step {step}: {told}" if came else None
