"""When a run logs, draws, validates and saves. Steps are counted from 1."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cadence:
    """The actions after each step of a run.

    Attributes:
      every: `config.every`.
      num_steps: the last step.
      steps_per_epoch: steps in which every slice is trained on once.
      has_validation: whether there are volumes to validate on.
    """

    every: Any
    num_steps: int
    steps_per_epoch: int
    has_validation: bool

    def logs(self, step: int) -> bool:
        """Whether the means since the last log are written."""
        return step % self.every.log == 0 or step == self.num_steps

    def draws(self, step: int) -> bool:
        """Whether the batch is drawn: the first, then each `every.picture`; never if that is 0."""
        every = self.every.picture
        return bool(every) and (step == 1 or step % every == 0)

    def validates(self, step: int) -> bool:
        """Whether validation follows: after every `every.validation_epochs`, and at the end."""
        if not self.has_validation:
            return False
        interval = self._validation_interval
        return step == self.num_steps or (interval > 0 and step % interval == 0)

    def draws_validation(self, step: int) -> bool:
        """Whether a validation draws slices: first, last, and once per `every.picture` steps."""
        every, interval = self.every.picture, self._validation_interval
        is_end = step <= interval or step == self.num_steps
        return bool(every) and (is_end or step // every > (step - interval) // every)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows: every `every.checkpoint` steps, and after validation."""
        due = step % self.every.checkpoint == 0 or step == self.num_steps
        return due or self.validates(step)

    @property
    def _validation_interval(self) -> int:
        """Steps between two validations; 0 for only the last."""
        interval: int = self.every.validation_epochs * self.steps_per_epoch
        return interval
