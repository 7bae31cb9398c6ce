"""Mean teacher and copy-paste against NumPy: batches, mixed slices, targets and losses."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy import ndimage

from kafjax.configs import own_finetune, phantom_finetune
from kafjax.data.batches import BatchOptions, semi_supervised_batches
from kafjax.data.dataset import open_dataset
from kafjax.mixing import draw_box
from kafjax.models import MODELS, example_inputs, variable_shapes
from kafjax.tasks.registry import make_task
from kafjax.tasks.semi_supervised import ramp_up
from kafjax.training.config_checks import check_fields
from kafjax.training.loop import train
from kafjax.training.preflight import look, open_run_dataset, split_run
from kafjax.workdir.metrics import read_metrics
from tests import runs
from tests.test_segmentation import NUM_CLASSES, TINY, random_batch


def tiny_task(method: str, *, axis_name: str | None = None, **overrides: Any) -> Any:
    config = phantom_finetune.get_config()
    config.semi = {"method": method, **own_finetune.SEMI[method]}
    config.data.update({"unlabelled_share": 0.5, "include_test": False})
    config.optimizer.average_decay = 0.9
    config.update_from_flattened_dict({**TINY, "loss.weights.dice": 1.0, **overrides})
    task = make_task(config, axis_name=axis_name)
    check_fields(config)
    return task


def semi_batch(batch_size: int = 4, *, progress: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Labelled slices at even places, unlabelled ones at odd places."""
    batch = random_batch(batch_size, seed=seed)
    labelled = np.arange(batch_size) % 2 == 0
    batch["label"] = np.where(labelled[:, None, None], batch["label"], -1).astype(np.int32)
    return {**batch, "labelled": labelled, "progress": np.full(batch_size, progress, np.float32)}


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def loss_by_loops(logits: np.ndarray, label: np.ndarray) -> float:
    """Cross-entropy plus Dice over the pixels whose label is not negative."""
    known = label >= 0
    p, t = softmax(logits)[known], label[known]
    entropy = -np.mean(np.log(p[np.arange(len(t)), t])) if len(t) else 0.0
    dice = [
        (2 * p[t == i, i].sum() + 2) / (p[:, i].sum() + (t == i).sum() + 2)
        for i in range(1, NUM_CLASSES)
    ]
    return float(entropy + 1 - np.mean(dice))


def largest(classes: np.ndarray) -> np.ndarray:
    kept = np.zeros_like(classes)
    for i in range(1, NUM_CLASSES):
        components, count = ndimage.label(classes == i)
        if count:
            kept[components == 1 + np.bincount(components.ravel())[1:].argmax()] = i
    return kept


def both(variables: Any) -> tuple[Any, Any]:
    return variables["params"], variables["batch_stats"]


def logits_in_training(task: Any, variables: Any, batch: Any) -> np.ndarray:
    def apply(*inputs: jax.Array) -> jax.Array:
        return task._model.apply(variables, *inputs, train=True, mutable=["batch_stats"])[0]

    inputs = (batch[field] for field in ("image", "keypoints", "keypoint_mask"))
    return np.asarray(jax.jit(apply)(*inputs))


def boxes_of(batch: Any, share: float) -> np.ndarray:
    """The box of each pair, by the key of its first slice."""

    def one(seed: int, sample: int) -> np.ndarray:
        key = jax.random.fold_in(jax.random.key(seed), sample)
        return np.asarray(draw_box(jax.random.fold_in(key, 101), (32, 32), share=share))

    return np.stack([one(*of) for of in zip(batch["seed"][::2], batch["sample"][::2], strict=True)])


def mix_by_numpy(first: np.ndarray, second: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """For each pair the second with the first in the box, and the reverse, in turn."""
    mixed = []
    for a, b, box in zip(first, second, boxes, strict=True):
        for inner, outer in ((a, b), (b, a)):
            picture = outer.copy()
            picture[box] = inner[box]
            mixed.append(picture)
    return np.stack(mixed)


def test_mixed_slices_are_numpys() -> None:
    task, batch = tiny_task("copy_paste"), semi_batch(6)
    batch["labelled"][3], batch["label"][3] = True, 1  # a pair of labelled slices
    classes = np.random.default_rng(0).integers(0, NUM_CLASSES, (3, 32, 32)).astype(np.int32)
    mixed, pseudo = jax.tree.map(np.asarray, jax.jit(task.mix)(batch, classes))
    boxes = boxes_of(batch, 2 / 3)
    for name in ("image", "label"):
        expected = mix_by_numpy(batch[name][::2], batch[name][1::2], boxes)
        np.testing.assert_array_equal(mixed[name], expected)
    target = np.where(batch["labelled"][1::2, None, None], -1, classes)
    expected = mix_by_numpy(np.full_like(target, -1), target, boxes)
    np.testing.assert_array_equal(pseudo, expected)
    # Each pixel is taught once: by a label or by the teacher.
    assert ((mixed["label"] >= 0) ^ (pseudo >= 0)).all()


def test_keypoints_of_mixed_slices_show_their_own_slices_pixels() -> None:
    task, batch = tiny_task("copy_paste"), semi_batch(2)
    batch["image"][0], batch["image"][1] = 1.0, 2.0
    batch["keypoints"][0], batch["keypoint_mask"][:] = 2 * (batch["keypoints"][0] // 2), True
    batch["keypoints"][1] = 2 * (batch["keypoints"][1] // 2) + 1  # odd places: of the second
    mixed, _ = jax.tree.map(np.asarray, jax.jit(task.mix)(batch, np.zeros((1, 32, 32), np.int32)))
    assert mixed["keypoint_mask"].sum() > 8
    for i in (0, 1):
        places = mixed["keypoints"][i][mixed["keypoint_mask"][i]]
        shown = mixed["image"][i][places[:, 0], places[:, 1], 0]
        np.testing.assert_array_equal(shown, 1 + places[:, 0] % 2)


@pytest.fixture(scope="module")
def student_and_teacher() -> tuple[Any, Any]:
    return tiny_task("copy_paste").init(), tiny_task("copy_paste", seed=1).init()


def test_copy_paste_is_taught_by_labels_and_cleaned_classes(student_and_teacher) -> None:
    student, teacher = student_and_teacher
    task, batch = tiny_task("copy_paste"), semi_batch()
    second = {name: values[1::2] for name, values in batch.items()}
    classes = logits_in_training(task, teacher, second).argmax(-1).astype(np.int32)
    cleaned = np.stack([largest(x) for x in classes])
    assert (cleaned != classes).any()
    mixed, pseudo = jax.tree.map(np.asarray, jax.jit(task.mix)(batch, cleaned))
    logits = logits_in_training(task, student, mixed)
    by_label, by_teacher = (loss_by_loops(logits, x) for x in (mixed["label"], pseudo))
    total, (metrics, _) = jax.jit(task.loss)(*both(student), batch, teacher)
    np.testing.assert_allclose(metrics["loss_unlabelled"], by_teacher, rtol=1e-4)
    np.testing.assert_allclose(total, by_label + 0.5 * by_teacher, rtol=1e-4)
    assert (metrics["labelled_slices"], metrics["unlabelled_slices"]) == (2, 2)
    early, (metrics, _) = jax.jit(task.loss)(*both(student), semi_batch(progress=0.2), teacher)
    np.testing.assert_allclose(early, by_label, rtol=1e-4)
    assert metrics["unlabelled_weight"] == 0


def test_mean_teacher_draws_every_slice_to_the_teacher(student_and_teacher) -> None:
    student, teacher = student_and_teacher
    task, batch = tiny_task("mean_teacher", **{"semi.weight": 3.0}), semi_batch()
    ours, theirs = (logits_in_training(task, of, batch) for of in (student, teacher))
    apart = np.mean(np.sum((softmax(ours) - softmax(theirs)) ** 2, axis=-1))
    total, (metrics, _) = jax.jit(task.loss)(*both(student), batch, teacher)
    np.testing.assert_allclose(metrics["loss_unlabelled"], apart, rtol=1e-4)
    np.testing.assert_allclose(total, loss_by_loops(ours, batch["label"]) + 3 * apart, rtol=1e-4)
    # The teacher is not trained.
    gradient = jax.jit(jax.grad(lambda t: task.loss(*both(student), batch, t)[0]))(teacher)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_network_can_be_taught(name: str) -> None:
    task, batch = tiny_task("copy_paste", **{"model.name": name}), semi_batch()
    variables = variable_shapes(task._model, *example_inputs("segmentation"))
    found = jax.eval_shape(
        lambda v, b: jax.grad(task.loss, has_aux=True)(v["params"], v["batch_stats"], b, v),
        {"batch_stats": {}, **variables},
        batch,
    )
    assert jax.tree.structure(found[0]) == jax.tree.structure(variables["params"])


@pytest.mark.slow
def test_a_network_with_keypoints_learns_from_mixed_slices() -> None:
    task = tiny_task("copy_paste", **{"model.name": "kaf_unet"})
    student, batch = task.init(), semi_batch()
    step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    losses = []
    params, batch_stats = both(student)
    for _ in range(8):
        (total, (_, batch_stats)), gradient = step(params, batch_stats, batch, student)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
        losses.append(float(total))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["mean_teacher", "copy_paste"])
def test_a_batch_spread_over_devices_has_the_loss_of_the_whole(
    method: str, student_and_teacher
) -> None:
    student, teacher = student_and_teacher
    batch, spread = semi_batch(8), tiny_task(method, axis_name="batch")
    halves = {name: values.reshape(2, 4, *values.shape[1:]) for name, values in batch.items()}

    def device(half: dict[str, jax.Array]) -> Any:
        _, (metrics, batch_stats) = spread.loss(*both(student), half, teacher)
        return jax.lax.pmean((metrics, batch_stats), "batch")

    found = jax.jit(jax.vmap(device, axis_name="batch"))(halves)
    _, expected = jax.jit(tiny_task(method).loss)(*both(student), batch, teacher)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-5)


def test_the_teacher_sees_the_same_place_without_changes_of_intensity() -> None:
    config = own_finetune.get_config("scratch,copy_paste")
    config.update_from_flattened_dict(TINY)
    task, batch = make_task(config), semi_batch()
    weak, strong = (jax.tree.map(np.asarray, jax.jit(f)(batch)) for f in (task._warp, task.augment))
    for name in batch.keys() - {"image"}:
        np.testing.assert_array_equal(weak[name], strong[name])
    assert np.abs(weak["image"] - strong["image"]).max() > 0.1
    # What training on labels alone sees.
    del config.semi
    plain = jax.jit(make_task(config).augment)({**batch, "label": np.abs(batch["label"])})
    np.testing.assert_allclose(strong["image"], plain["image"], atol=1e-5)
    assert (weak["label"][1::2] == -1).all()
    assert (weak["label"][::2] >= 0).all()


def test_the_weight_rises_after_the_start() -> None:
    progress = np.array([0, 0.19, 0.2, 0.3, 0.4, 1], np.float32)
    found = ramp_up(progress, start=0.2, ramp=0.2)
    np.testing.assert_allclose(found, [0, 0, np.exp(-5), np.exp(-1.25), 1, 1], rtol=1e-4)
    np.testing.assert_array_equal(ramp_up(progress, start=0.2, ramp=0.0) == 1, progress > 0.2)


class Guard:
    """A dataset whose labels outside `allowed` volumes raise."""

    def __init__(self, dataset: Any, allowed: set[str]):
        self._dataset, self._allowed = dataset, allowed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def read(self, record: int, *, with_label: bool = False) -> Any:
        assert not with_label or self._dataset.volume_of(record) in self._allowed
        return self._dataset.read(record, with_label=with_label)


def open_guarded(phantom_dataset: Path, allowed: set[str]) -> Any:
    dataset = open_dataset(phantom_dataset.parents[1], phantom_dataset.parent.name)
    return Guard(dataset, allowed)


def options_of(**fields: Any) -> BatchOptions:
    common = {"batch_size": 6, "patch_size": (32, 32), "seed": 3, "unlabelled_share": 0.5}
    return BatchOptions(**{**common, "num_threads": 2, **fields})


def test_batches_hold_both_kinds_and_never_read_other_labels(phantom_dataset: Path) -> None:
    first, second, third, _ = open_guarded(phantom_dataset, set()).volumes
    dataset = open_guarded(phantom_dataset, {first})
    common = {"volumes": [first], "unlabelled": [second, third], "schedule_steps": 100}
    batches = semi_supervised_batches(dataset, options_of(), labelled_steps=2, **common)
    taken = [next(batches) for _ in range(10)]
    batches.close()
    names = [[dataset.volume_of(r) for r in batch["record"]] for batch in taken]
    for step, (batch, of_batch) in enumerate(zip(taken, names, strict=True)):
        expected = [True] * 6 if step < 2 else [True, False] * 3
        assert batch["labelled"].tolist() == expected
        assert [name == first for name in of_batch] == expected
        assert ((batch["label"] == -1).all((1, 2)) == ~batch["labelled"]).all()
        np.testing.assert_allclose(batch["progress"], step / 100, rtol=1e-6)
    # Eight steps take 24 unlabelled slices: both volumes, each slice once.
    seen = np.concatenate([batch["record"][~batch["labelled"]] for batch in taken])
    assert sorted(seen) == sorted([*dataset.volumes[second], *dataset.volumes[third]])
    # The labelled slices' order is an epoch's too: 12 slices in four batches of three.
    seen = np.concatenate([batch["record"][::2] for batch in taken[:4]])
    assert sorted(seen) == list(dataset.volumes[first])


def test_batches_resume_and_divide_among_processes(phantom_dataset: Path) -> None:
    first, second, *_ = open_guarded(phantom_dataset, set()).volumes
    dataset = open_guarded(phantom_dataset, {first})

    def take(start: int, **fields: Any) -> Any:
        batches = semi_supervised_batches(
            dataset,
            options_of(foreground_share=0.3, **fields),
            volumes=[first],
            unlabelled=[second],
            labelled_steps=4,
            schedule_steps=50,
            start_step=start,
        )
        taken = [next(batches) for _ in range(7 - start)]
        batches.close()
        return taken[-1]

    whole = take(0)
    parts = [take(5, process_index=i, process_count=3) for i in range(3)]
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
    assert (whole["label"][4] > 0).any()  # the last labelled place shows foreground


def test_impossible_batches_are_refused(phantom_dataset: Path) -> None:
    dataset = open_guarded(phantom_dataset, set())
    first, second, *_ = dataset.volumes
    common = {"labelled_steps": 0, "schedule_steps": 1}
    with pytest.raises(ValueError, match=f"{first}: labelled and unlabelled"):
        semi_supervised_batches(
            dataset, options_of(), volumes=[first], unlabelled=[first, second], **common
        )
    with pytest.raises(ValueError, match="0 of the batch's 6 slices are unlabelled, expected 1"):
        semi_supervised_batches(
            dataset,
            options_of(unlabelled_share=0.0),
            volumes=[first],
            unlabelled=[second],
            **common,
        )


def tiny_run(phantom_dataset: Path, method: str, **overrides: Any) -> Any:
    """`own_finetune` shrunk to the phantom, with fold 0 of two and M = 1."""
    config = own_finetune.get_config(f"scratch,{method}")
    small = {
        **{name: runs.OVERRIDES[name] for name in runs.OVERRIDES if name in config},
        "batch_size": 4,
        "model.name": "unet",
        "model.num_classes": 8,
        "model.filters": 4,
        "num_epochs": 2,
        "data.dir": str(phantom_dataset.parents[1]),
        "data.name": "phantom",
        "data.patch_size": (32, 32),
        "data.num_folds": 4,
        "data.num_labeled": 1,
        "every.log": 1,
        "every.picture": 0,
        "every.validation_epochs": 0,
    }
    config.update_from_flattened_dict({**small, **overrides})
    return config


def test_a_run_keeps_validation_volumes_out_and_refuses_to_have_no_others(
    phantom_dataset: Path, tmp_path: Path
) -> None:
    config = tiny_run(phantom_dataset, "copy_paste")
    dataset = open_run_dataset(config)
    split = split_run(config, dataset)
    assert [len(side) for side in split] == [1, 1, 2]
    assert set().union(*split) == set(dataset.volumes)
    config.data.num_labeled = None
    (finding,) = (x for x in look(config, tmp_path / "run") if x.wrong)
    assert "no volume is left to train on without labels, next to 3 to train on" in finding.text


def test_pairs_must_fit_on_a_device(phantom_dataset: Path, tmp_path: Path) -> None:
    config = tiny_run(phantom_dataset, "copy_paste", batch_size=6, num_microbatches=2)
    (finding,) = (x for x in look(config, tmp_path / "run") if x.wrong)
    assert "config.batch_size is 6, expected a multiple of the 1 devices times" in finding.text
    assert finding.text.endswith("num_microbatches 2 times 2, for pairs of slices")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mean_teacher", "copy_paste"])
def test_a_run_resumes_bit_for_bit(method: str, phantom_dataset: Path, tmp_path: Path) -> None:
    common = {"semi.start": 0.2, "semi.ramp": 0.2, "num_microbatches": 2}
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for num_steps in steps:
            config = tiny_run(phantom_dataset, method, num_steps=num_steps, **common)
            assert train(config, tmp_path / name) is None
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    whole, parts = ([row for row in rows if "loss" in row] for rows in (whole, parts))
    for row, again in zip(whole, parts, strict=True):
        for name in ("step", "loss", "loss_unlabelled", "unlabelled_weight", "dice"):
            assert again[name] == row[name], (row["step"], name)
    assert [row["unlabelled_slices"] for row in whole] == [0, 0, 0, 2]
    assert whole[-1]["unlabelled_weight"] > 0
