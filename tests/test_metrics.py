"""Means, the metrics file and a real TensorBoard file."""

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

from kafjax.workdir.metrics import MetricMeans, MetricWriter, read_metrics


def test_means_are_of_the_steps_since_the_last_and_survive_json() -> None:
    means = MetricMeans()
    means.add({"loss": 0.1, "keypoints": 3})
    resumed = MetricMeans(json.loads(json.dumps(means.state())))
    resumed.add({"loss": 0.7, "keypoints": 4})
    assert resumed.take() == {"loss": (0.1 + 0.7) / 2, "keypoints": 3.5}
    resumed.add({"loss": 2.0})
    assert resumed.take() == {"loss": 2.0}


def write(workdir: Path, steps: range, start_step: int) -> None:
    with MetricWriter(workdir, start_step=start_step, num_steps=10) as writer:
        for step in steps:
            writer.advance()
            writer.write(step, {"loss": 1 / step}, {"seconds_per_step": 0.5})
        writer.picture(steps[-1], "pair", np.full((4, 6, 3), 200, np.uint8))


def test_resumed_run_drops_lines_that_its_checkpoint_has_not_reached(tmp_path: Path) -> None:
    write(tmp_path, range(1, 5), 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    write(tmp_path, range(3, 7), 2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert read_metrics(tmp_path)[2] == {
        "step": 3,
        "loss": 1 / 3,
        "time": {"seconds_per_step": 0.5},
    }


def test_damaged_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"step 2'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not metrics"):
        read_metrics(tmp_path)


def test_tensorboard_file_holds_scalars_and_the_picture(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 0)
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = {}
    for record in tf.data.TFRecordDataset([str(path)]).as_numpy_iterator():
        event = Event.FromString(record)
        values |= {(value.tag, event.step): value for value in event.summary.value}
    assert np.float32(values["loss", 3].simple_value) == np.float32(1 / 3)
    assert values["time/seconds_per_step", 1].simple_value == 0.5
    picture = tf.io.decode_png(values["pair", 3].image.encoded_image_string).numpy()
    np.testing.assert_array_equal(picture, np.full((4, 6, 3), 200))


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, start_step=0, num_steps=1, enabled=False) as writer:
        writer.advance()
        writer.write(1, {"loss": 1.0}, {})
        writer.picture(1, "pair", np.zeros((2, 2, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_lines_without_a_terminal_tell_rate_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, range(1, 3), 0)
    assert "step 2/10: loss 0.5, 0.5 s/step, 00:04 left" in capsys.readouterr().out
