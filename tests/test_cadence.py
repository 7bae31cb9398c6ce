"""At which steps a run logs, draws, validates and saves."""

from types import SimpleNamespace

import pytest

from kafjax.training.cadence import Cadence


def steps_where(name: str, *, has_validation: bool = True, **every: int) -> list[int]:
    """The steps of a run of 20, of three steps an epoch, at which something happens."""
    fields = {"log": 8, "picture": 9, "checkpoint": 7, "validation_epochs": 2, **every}
    cadence = Cadence(SimpleNamespace(**fields), 20, 3, has_validation)
    return [step for step in range(1, 21) if getattr(cadence, name)(step)]


@pytest.mark.parametrize(
    ("name", "every", "expected"),
    [
        ("logs", {}, [8, 16, 20]),
        ("draws", {}, [1, 9, 18]),
        ("draws", {"picture": 0}, []),
        ("validates", {}, [6, 12, 18, 20]),
        ("validates", {"validation_epochs": 0}, [20]),
        ("validates", {"has_validation": False}, []),
        ("saves", {}, [6, 7, 12, 14, 18, 20]),
        ("saves", {"has_validation": False}, [7, 14, 20]),
    ],
)
def test_steps(name: str, every: dict[str, int], expected: list[int]) -> None:
    assert steps_where(name, **every) == expected
