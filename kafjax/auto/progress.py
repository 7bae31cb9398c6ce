"""One line about the whole of `kafjax auto`: the stage, its share, and the time that is left."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from kafjax.training.timing import format_seconds

_QUIET_SECONDS = 30.0  # between lines where the output is no terminal


class Progress:
    """Reports stages whose expected seconds are known.

    Args:
      expected: seconds of each stage, in order.
      stream: where the line goes; by default the standard output.
    """

    def __init__(self, expected: Mapping[str, float], stream: TextIO | None = None):
        self._expected = dict(expected)
        self._stream = sys.stdout if stream is None else stream
        self._stage = ""
        self._begin = self._shown = 0.0
        self._first = 0.0  # share that was done when the stage began
        self._width = 0

    def start(self, stage: str) -> None:
        """Starts a stage; after a stop, part of it may be done."""
        self._end_line()
        self._stage, self._begin, self._first = stage, time.perf_counter(), 0.0
        self._show(0.0)

    def update(self, share: float) -> None:
        """Notes how much of the stage is done, from 0 to 1."""
        if not self._first:
            self._first, self._begin = max(share, 1e-9), time.perf_counter()
        pause = 0.5 if self._stream.isatty() else _QUIET_SECONDS
        if time.perf_counter() - self._shown >= pause:
            self._show(share)

    def finish(self) -> None:
        """Ends the line of the last stage."""
        self._end_line()

    def seconds_left(self, share: float) -> float:
        """Seconds to the end of the whole, by the pace of this stage and what others need."""
        names = list(self._expected)
        after = sum(self._expected[name] for name in names[names.index(self._stage) + 1 :])
        spent = time.perf_counter() - self._begin
        done = share - self._first
        if done > 0.02:
            return after + spent * (1 - share) / done
        return after + max(self._expected[self._stage] * (1 - share) - spent, 0.0)

    def _show(self, share: float) -> None:
        self._shown = time.perf_counter()
        names = list(self._expected)
        number = f"[{names.index(self._stage) + 1}/{len(names)}]"
        text = (
            f"{number} {self._stage}: {share:.0%}, {format_seconds(self.seconds_left(share))} left"
        )
        if self._stream.isatty():
            text = f"\r{text:<{self._width}}"
            self._width = len(text) - 1
            print(text, end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)

    def _end_line(self) -> None:
        if self._width:
            print(file=self._stream, flush=True)
        self._width = 0
