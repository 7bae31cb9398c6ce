"""When a run is said to sit where all embeddings are alike."""

from typing import Any

import pytest

from configs import acdc_pretrain, chd_scratch
from kafjax.training.plateau import PLATEAU_STEPS, describe_plateau, steps_on_plateau

LEVEL = 4.906  # of 16 pairs at T = 0.1


def config(**changes: Any) -> Any:
    found = acdc_pretrain.get_config()
    found.batch_size = 16
    found.update_from_flattened_dict(changes)
    return found


def rows(cnn: list[float], kaf: list[float] | None = None) -> list[dict[str, float]]:
    """Logged metrics of every 100th step."""
    kaf = [4.0] * len(cnn) if kaf is None else kaf
    return [
        {"step": 100 * i, "loss": a + b, "loss_cnn": a, "loss_kaf": b, "loss_matching": 2.0}
        for i, (a, b) in enumerate(zip(cnn, kaf, strict=True), start=1)
    ]


@pytest.mark.parametrize(
    ("cnn", "steps"),
    [
        ([LEVEL, LEVEL], 200),
        ([5.9, LEVEL, 1.009 * LEVEL, 0.991 * LEVEL], 300),
        ([LEVEL, LEVEL, LEVEL, 0.985 * LEVEL], None),  # has left
        ([LEVEL, LEVEL, 0.985 * LEVEL, LEVEL], None),  # came back 100 steps ago
        ([LEVEL], None),
        ([], None),
    ],
)
def test_the_last_steps_on_the_plateau_are_counted(cnn: list[float], steps: int | None) -> None:
    assert PLATEAU_STEPS == 200
    expected = {} if steps is None else {"cnn": steps}
    assert steps_on_plateau(rows(cnn), config()) == expected


def test_heads_are_counted_by_themselves() -> None:
    logged = rows([LEVEL] * 4, [5.5, LEVEL, LEVEL, LEVEL])
    assert steps_on_plateau(logged, config()) == {"cnn": 400, "kaf": 300}
    told = describe_plateau(logged, config())
    assert told is not None
    assert "loss_cnn (400 steps)" in told
    assert "loss_kaf (300 steps)" in told
    assert "4.906" in told
    assert "data.patch_size" in told


def test_validations_lines_between_do_not_count() -> None:
    logged = [*rows([LEVEL, LEVEL]), {"step": 200, "validation_dice": 0.5}]
    assert steps_on_plateau(logged, config().to_dict()) == {"cnn": 200}


def test_the_level_is_that_of_the_runs_batch_and_temperature() -> None:
    logged = rows([LEVEL, LEVEL])
    assert steps_on_plateau(logged, config(batch_size=32)) == {}
    assert steps_on_plateau(logged, config(**{"loss.temperature": 0.2})) == {}


def test_other_tasks_have_no_plateau() -> None:
    assert describe_plateau(rows([LEVEL] * 5), chd_scratch.get_config()) is None
