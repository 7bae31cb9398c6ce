"""Mixed slices against loops: boxes and keypoints."""

import jax
import numpy as np

from kafjax.mixing import draw_box, paste_keypoints

SHAPE = (24, 30)


def test_boxes_have_their_size_and_any_place() -> None:
    keys = jax.random.split(jax.random.key(0), 200)
    draw = jax.jit(jax.vmap(lambda key: draw_box(key, SHAPE, share=2 / 3)))
    boxes = np.asarray(draw(keys))
    corners = set()
    for box in boxes:
        rows, cols = np.nonzero(box)
        assert box.sum() == 16 * 20
        assert np.ptp(rows) == 15 and np.ptp(cols) == 19
        corners.add((rows.min(), cols.min()))
    assert {row for row, _ in corners} == set(range(9))
    assert {col for _, col in corners} == set(range(11))


def paste_by_loop(sides, box, num_slots):
    """Keypoints whose pixels are seen, as (row, col, side) from each side's last on."""
    seen = []
    for i, (keypoints, mask) in enumerate(sides):
        points = [(*map(int, p), i) for p, m in zip(keypoints, mask, strict=True) if m]
        shown = [p for p in points if box[p[0], p[1]] == (i == 0)]
        seen.append(shown[::-1])
    ranked = sorted((rank, side, p) for side in (0, 1) for rank, p in enumerate(seen[side]))
    return {p for *_, p in ranked[:num_slots]}


def test_keypoints_go_with_their_pixels() -> None:
    rng = np.random.default_rng(0)
    paste = jax.jit(jax.vmap(paste_keypoints))
    n, k = 40, 12
    keypoints = rng.integers(0, SHAPE, (2, n, k, 2)).astype(np.int32)
    keypoints[..., 0] = 2 * (keypoints[..., 0] // 2) + np.arange(2)[:, None, None]  # by side
    mask = rng.random((2, n, k)) < rng.uniform(0, 1, (2, n, 1))
    boxes = np.zeros((n, *SHAPE), bool)
    for box in boxes:
        top, left = rng.integers(0, (10, 14))
        box[top : top + 14, left : left + 16] = True
    # In some more are seen than there are slots: all of both slices.
    keypoints[0, :5, :, 0] %= 12
    keypoints[1, :5, :, 0] = 13 + 2 * (keypoints[1, :5, :, 0] // 2 % 5)
    boxes[:5], mask[:, :5] = np.arange(24)[:, None] < 12, rng.random((2, 5, k)) < 0.8
    found, kept = paste(keypoints[0], mask[0], keypoints[1], mask[1], boxes)
    found, kept = np.asarray(found), np.asarray(kept)
    full = 0
    for i in range(n):
        sides = [(keypoints[side, i], mask[side, i]) for side in (0, 1)]
        expected = paste_by_loop(sides, boxes[i], k)
        assert {(r, c, r % 2) for r, c in found[i][kept[i]].tolist()} == expected
        assert not found[i][~kept[i]].any()
        full += len(paste_by_loop(sides, boxes[i], 2 * k)) > k
    assert full > 0  # some did not all fit
